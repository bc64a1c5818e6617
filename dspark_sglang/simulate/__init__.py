"""A serving system as discrete events: the server's own scheduler on modelled steps and acceptance."""
