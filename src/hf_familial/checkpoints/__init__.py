"""Checkpoints of a family: their files, and the parts of them that one member needs."""
