"""The simulator against a real server, and the tables of its document."""
