"""The algorithm: draft, score, schedule, accept. Depends on torch and numpy only."""
