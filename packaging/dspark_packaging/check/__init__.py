"""The end-to-end check of packaging (``dspark package-check``) and the stand-ins it needs."""
