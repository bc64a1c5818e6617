"""Calibrating a drafter's confidences."""
