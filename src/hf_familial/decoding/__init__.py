"""Faster ways to run a relay, found by a family's own code through the seam in `extension.py`."""
