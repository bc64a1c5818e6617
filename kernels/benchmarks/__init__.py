"""Measurements of the kernels, of a step, of placements and of loads: run from a checkout, not in the wheel."""
