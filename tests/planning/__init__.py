"""Plans against what real servers allocate."""
