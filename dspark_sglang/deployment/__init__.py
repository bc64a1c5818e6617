"""Making what ``deploy/`` holds of generated files."""
