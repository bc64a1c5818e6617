"""One report of what was measured, what was simulated and what it is worth."""
