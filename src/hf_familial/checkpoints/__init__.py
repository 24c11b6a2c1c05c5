"""Checkpoints of families and members as files: safetensors, indexes, names, cuts.

This room never opens the Hub: [`FamilyFiles`] is given a callable that fetches files.
"""

from .plain import plain_config, plain_tensors


__all__ = ["plain_config", "plain_tensors"]
