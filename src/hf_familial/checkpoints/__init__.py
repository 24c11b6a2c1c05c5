"""Checkpoints of families and members: safetensors files, indexes, tensor names, cuts at exits.

These modules never access the Hub. [`FamilyFiles`] gets a callable that fetches files.
"""

from .plain import plain_config, plain_tensors


__all__ = ["plain_config", "plain_tensors"]
