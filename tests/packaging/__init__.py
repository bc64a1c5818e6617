"""Tests of packaging, and its end-to-end check (``make package-check``) with the stand-ins it needs."""
