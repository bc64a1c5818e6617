"""What a frontier is worth: tokens an hour, cost a million, margin, and how sure that is."""
