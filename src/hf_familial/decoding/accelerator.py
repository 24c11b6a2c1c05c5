"""The accelerator of a model: the objects that the package stores with it for faster relays."""

from __future__ import annotations

from typing import Any

import torch

from ..models.familial.configuration_familial import Accelerator
from ._fused import FusedPasses
from ._growing_cache import growing
from ._learned_drafts import LearnedDecoder, matrix_sizes


# in models up to this size in bytes, modules and masks need a large part of the time of a step
FUSED_LIMIT = 2 * 2**30
# numbers of each weight that `weights_stamp` reads to detect changes
SAMPLES = 8


class ModelAccelerator(Accelerator):
    """Fused passes, growing caches and learned draft lengths of one model.

    Attributes:
        fused ([`FusedPasses`]): The fused passes.
        draft_lengths (`dict`): The draft lengths that relays have learned, for use in the next
            text. It is replaced by a new dict when the weights change.
    """

    def __init__(self) -> None:
        self.fused = FusedPasses()
        self.draft_lengths: dict[Any, Any] = {}
        self._learned_of: int | None = None  # stamp of the weights that `draft_lengths` belongs to

    def cache(self, cache: Any) -> Any:
        """Replace full-attention layers of a cache by ones that grow by doubling, and return it."""
        return growing(cache)

    def prepare(self, relay: Any, fused_weights: bool | None) -> None:
        """Add the available fused passes, norms and heads to a [`RelayCache`].

        Args:
            relay ([`RelayCache`]): The cache to change.
            fused_weights (`bool`, *optional*): Whether to add them. `None` means only if they make
                this model faster, see `pays`.
        """
        if not (pays(relay.model) if fused_weights is None else fused_weights):
            return
        decoder = relay.model.model.decoder
        relay.norms = [self.fused.norm(norm) or norm for norm in relay.norms]
        relay.heads = [self.fused.head(head) or head for head in relay.heads]
        last = len(relay.exits) - 1

        def found(*span: int) -> Any:
            runner = relay.runner(*span)
            return self.fused.runner(decoder, runner.segment, runner.layers)

        whole, spans = found(0, last), [(i, i) for i in range(last + 1)]
        if whole is None:  # single segments may still have a fused pass
            passes = {span: found(*span) for span in spans}
            relay.passes = {span: each for span, each in passes.items() if each is not None}
        else:
            parts = {(i, i): whole.part(*relay.depths[i : i + 2]) for i, _ in spans}
            relay.passes = {**parts, (0, last): whole}

    def decoder(self, decoder: Any) -> Any:
        """Return a decoder that learns draft lengths, in place of one with the plain rule."""
        if not getattr(decoder, "adapts", False):
            return decoder
        self._follow_weights(decoder.cache.model)
        return LearnedDecoder(decoder, self.draft_lengths)

    def flops(self, relay: Any, rows: int, tokens: int) -> tuple[float | None, float | None]:
        """Return the FLOPs of a relay and of the deepest exit alone, see [`RelayStats`].

        Each weight of a matrix counts two FLOPs per position.
        """
        layers, heads = ([2 * n for n in sizes] for sizes in matrix_sizes(relay.model, relay.exits))
        spent = sum(f * n for f, n in zip(layers + heads, relay.ran + relay.reads, strict=True))
        plain = (relay.length - relay.first) * sum(layers) + tokens * heads[-1]
        return rows * spent, rows * plain

    def _follow_weights(self, model: Any) -> None:
        """Clear the learned draft lengths if the weights of the model have changed."""
        if model.model.frozen:
            return
        stamp = weights_stamp(model)
        if self._learned_of != stamp:
            # a new dict, because another thread may still write to the old one
            self.draft_lengths, self._learned_of = {}, stamp


def pays(model: Any) -> bool:
    """Return whether fused passes make a model faster. They do on a CPU if the model is small."""
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    return model.device.type == "cpu" and size <= FUSED_LIMIT


def weights_stamp(model: Any) -> int:
    """Return a number that changes when the weights of a model are trained, merged or replaced.

    The stamp covers the memory address of each weight, its version counter and a few of its
    numbers. Usual changes in place raise the version counter. Fused optimisers and writes through
    `.data` do not, but they change the numbers.

    The stamp may miss single numbers written through `.data`. So only speed may depend on it, and
    never the generated tokens.
    """
    marks: list[Any] = []
    samples: dict[Any, list[torch.Tensor]] = {}
    for parameter in model.parameters():
        tensor = parameter.detach()
        if type(tensor) is not torch.Tensor or tensor.is_meta:
            marks.append(id(parameter))  # sharded, quantised or offloaded
            continue
        version = 0 if parameter.is_inference() else parameter._version
        marks.append((tensor.data_ptr(), version, tensor.shape))
        some = tensor.reshape(-1)[:: max(1, tensor.numel() // SAMPLES)]
        samples.setdefault((tensor.dtype, tensor.device), []).append(some)
    for some in map(torch.cat, samples.values()):
        marks.append(some.view(torch.uint8).cpu().numpy().tobytes())
    return hash(tuple(marks))
