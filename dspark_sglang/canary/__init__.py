"""A running server compared with itself, speculation off."""
