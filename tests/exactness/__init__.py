"""Proof through the real server that the plugin's output distribution is plain decoding's."""
