"""Accepted length and calibration of a drafter, without a server or through one."""
