"""The demo: the real server, without and with DSPARK, on the same prompts, measured."""
