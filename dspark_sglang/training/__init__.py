"""Training drafters: data from the target itself, online target states, the paper's loss."""
