"""Faster ways to run a relay. The code of a family loads them through `extension.py`."""
