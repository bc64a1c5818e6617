"""Load on real servers: several ways of serving one target, compared in paired blocks."""
