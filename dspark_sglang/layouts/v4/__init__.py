"""DeepSeek-V4: what its checkpoints hold, and in plain torch what target and drafter compute."""
