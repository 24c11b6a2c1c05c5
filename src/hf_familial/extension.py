"""The features that the installed package adds to a family, as an `Extension`.

The files in `models/familial`, which are copied into every checkpoint, import this module if the
package is installed. Nothing else imports it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from .models.familial.configuration_familial import SEAM, Accelerator, Extension


def offer(seam: int) -> Extension | None:
    """Return the package's extension, or `None` if the calling code has another version `seam`."""
    return PackageExtension() if seam == SEAM else None


class PackageExtension(Extension):
    """The package's extension. Each method imports its code when it is called."""

    def warm_start(self, cls: Any, backbone: Any, loading: Any, **fields: Any) -> Any:
        """Build a family from a decoder, or from its name and `loading` options."""
        from .models.warm_start import family_of, load_host

        return family_of(cls, load_host(backbone, **loading), **fields)

    def check_backbone(self, model: Any) -> None:
        """Raise if a backbone of an unknown type fails the numeric checks."""
        from .models.backbone_verification import check_family

        check_family(model)

    def construction(self, model: Any) -> AbstractContextManager[None]:
        """Return a context in which DeepSpeed ZeRO-3 partitions no module of a new model."""
        from .models.zero3 import construction

        return construction(model)

    def load_cut(self, load: Any, name: Any, max_exit: int, *args: Any, **kwargs: Any) -> Any:
        """Load the members up to one exit."""
        from .checkpoints.partial_load import load_cut

        return load_cut(load, name, max_exit, *args, **kwargs)

    def save(self, save: Any, model: Any, folder: Any, *args: Any, **kwargs: Any) -> None:
        """Save a family atomically, and large ones by segment."""
        from .checkpoints.by_segment import save_checkpoint

        save_checkpoint(save, model, folder, *args, **kwargs)

    def gathered(self, head: Any, read: Callable[..., Any]) -> Callable[..., Any] | None:
        """Return a function that gathers a head sharded by FSDP2 and calls `read`."""
        from .models.sharded_heads import gather_head

        return gather_head(head, read)

    def compiled_loss(self) -> Callable[..., Any] | None:
        """Return the chunked loss as one operator that a compiler can trace."""
        from .models.compiled_loss import compiled_cross_entropy

        return compiled_cross_entropy

    def accelerator(self, model: Any) -> Accelerator:
        """Build an accelerator with fused passes, growing caches and learned draft lengths."""
        from .decoding.accelerator import ModelAccelerator

        return ModelAccelerator()
