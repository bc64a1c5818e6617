"""Golden traces: what scheduling decides and learns, step by step, recorded before the structure of the plugin changes."""
