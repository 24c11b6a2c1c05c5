"""The package's answer to the files of a checkpoint, which ask for it by one name.

The classes that travel with a family look for this module, see `Extension` in
`models/familial/configuration_familial.py`. Nothing else imports it.
"""

from __future__ import annotations

from typing import Any

from .models.familial.configuration_familial import SEAM, Accelerator, Extension


def offer(seam: int) -> Extension | None:
    """Return what this package adds to code that asks in the words of `seam`, if it knows them."""
    return PackageExtension() if seam == SEAM else None


class PackageExtension(Extension):
    """What the package adds."""

    def accelerator(self, model: Any) -> Accelerator:
        """Return fused passes, growing caches and learned draft lengths."""
        from .decoding._accelerator import ModelAccelerator

        return ModelAccelerator()
