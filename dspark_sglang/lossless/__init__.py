"""Proof through the real server that the plugin's output law is plain decoding's."""
