"""The accelerator of a model: all that the package keeps with it to make relays faster."""

from __future__ import annotations

from typing import Any

import torch

from ..models.familial.configuration_familial import Accelerator
from ._fused import FusedPasses
from ._growing_cache import growing
from ._learned_drafts import LearnedDecoder, matrix_sizes


# bytes of weights up to which modules and masks take a good part of a step
FUSED_LIMIT = 2 * 2**30
# numbers of each weight that are looked at before a text, in search of changes
SAMPLES = 8


class ModelAccelerator(Accelerator):
    """Fused passes, growing caches and learned draft lengths of one model.

    Attributes:
        fused ([`FusedPasses`]): The fused passes.
        draft_lengths (`dict`): What relays learned of draft lengths, for the next text. A dict of
            its own for each state of the weights.
    """

    def __init__(self) -> None:
        self.fused = FusedPasses()
        self.draft_lengths: dict[Any, Any] = {}
        self._learned_of: int | None = None  # stamp of the weights that it was learned of

    def cache(self, cache: Any) -> Any:
        """Let full-attention layers grow by doubling."""
        return growing(cache)

    def prepare(self, relay: Any, fused_weights: bool | None) -> None:
        """Give a [`RelayCache`] fused passes, norms and heads, where there are some."""
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
        if whole is None:  # some of its segments may do
            passes = {span: found(*span) for span in spans}
            relay.passes = {span: each for span, each in passes.items() if each is not None}
        else:
            parts = {(i, i): whole.part(*relay.depths[i : i + 2]) for i, _ in spans}
            relay.passes = {**parts, (0, last): whole}

    def decoder(self, decoder: Any) -> Any:
        """Return a decoder that learns draft lengths, for one that drafts by the plain rule."""
        if not getattr(decoder, "adapts", False):
            return decoder
        self._follow_weights(decoder.cache.model)
        return LearnedDecoder(decoder, self.draft_lengths)

    def flops(self, relay: Any, rows: int, tokens: int) -> tuple[float | None, float | None]:
        """Count two for each weight of a matrix and position, see [`RelayStats`]."""
        layers, heads = ([2 * n for n in sizes] for sizes in matrix_sizes(relay.model, relay.exits))
        spent = sum(f * n for f, n in zip(layers + heads, relay.ran + relay.reads, strict=True))
        plain = (relay.length - relay.first) * sum(layers) + tokens * heads[-1]
        return rows * spent, rows * plain

    def _follow_weights(self, model: Any) -> None:
        """Forget what was learned of a model whose weights have changed since."""
        if model.model.frozen:
            return
        stamp = weights_stamp(model)
        if self._learned_of != stamp:
            # a new dict: a text that another thread is writing leaves what it learned in the old
            self.draft_lengths, self._learned_of = {}, stamp


def pays(model: Any) -> bool:
    """Return whether fused passes are faster: on a CPU, for a small model."""
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    return model.device.type == "cpu" and size <= FUSED_LIMIT


def weights_stamp(model: Any) -> int:
    """Return a number that changes when the weights of a model are trained, merged or replaced.

    It looks at where each weight lies, at its version, which usual changes in place raise, and at
    a few of its numbers, which fused optimisers and writes through `.data` change too. That takes a
    thousandth of a short text. It may miss single numbers written through `.data`, so it must not
    decide what a text says: only learned numbers that make it faster depend on it.
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
