"""The dense layout in DeepSpec's format: what a drafter's configuration and tensors mean."""
