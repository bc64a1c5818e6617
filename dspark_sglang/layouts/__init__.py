"""Layouts of published checkpoints whose drafter is not the dense one, one folder a family."""
