"""A net of random requests: a plain server and one with DSPARK, of equal flags, must answer alike, and neither may end."""
