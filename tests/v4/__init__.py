"""DeepSeek-V4 on the real server, against a reference that shares nothing with it."""
