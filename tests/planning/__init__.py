"""Plans against what is published and against what real servers allocate."""
