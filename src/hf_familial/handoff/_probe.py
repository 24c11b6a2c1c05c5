"""What a segment's layers remember of a text, learnt by running a few single positions."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from ..models.familial.segments import SegmentRunner
from ._cache_layers import LayerState, capture, restore


# two passes over the same numbers may be rounded differently, as a share of the largest
SAME = {torch.float32: 1e-4, torch.float64: 1e-8}
ROUNDED = 2e-2  # of the shorter dtypes


@torch.no_grad()
def what_layers_keep(model: Any, start: int, stop: int) -> dict[int, LayerState]:
    """Learn what one position leaves in the cache, and that nothing is left anywhere else.

    A second position is run after the first twice: on the same cache, and on a new one to which
    only the first one's state was carried, another text having been run in between.

    Args:
        model ([`FamilialForCausalLM`]): Holds the layers `[start, stop)`.
        start (`int`): First layer.
        stop (`int`): One past the last.

    Returns:
        `dict[int, LayerState]`: By slot, for one row and one position.

    Raises:
        RelayStateError: If a layer's cache is of a kind that cannot travel.
        ValueError: If the model is in training mode, or the second position comes out different:
            the layers keep something of a text in themselves, so that no process can go on with
            what another began.
    """
    if model.training:
        raise ValueError("the model is in training mode; call `model.eval()` before a hand-over.")
    run = _Single(model, start, stop)
    first = run.fresh()
    run(first, 0)
    state = capture(first, range(start, stop))
    expected = run(first, 1)
    run(run.fresh(), 2)
    carried = run.fresh()
    restore(carried, state, model.device)
    found = run(carried, 1)
    allowed = SAME.get(found.dtype, ROUNDED) * expected.abs().max()
    if not bool((found - expected).abs().max() <= allowed):
        raise ValueError(
            f"`{model.config.text_config.model_type}` cannot be handed over: its layers keep "
            "a part of the text in themselves, not in the cache."
        )
    return state


class _Single:
    """One position at a time through the layers `[start, stop)` of a family."""

    def __init__(self, model: Any, start: int, stop: int) -> None:
        self.inner, self.start, self.stop = model.model, start, stop
        self.device, self.config = model.device, model.model.backbone.config
        self.dtype = model.model.backbone.dtype

    def fresh(self) -> DynamicCache:
        """An empty cache."""
        return DynamicCache(config=self.config)

    def __call__(self, cache: DynamicCache, index: int) -> torch.Tensor:
        """Run position 0 or 1, with one of three tokens or taps."""
        inner, token = self.inner, torch.tensor([[index]], device=self.device)
        inputs = {"input_ids": token}
        if self.start:
            # a tap unlike that of another index: a wave of its own length
            wave = torch.arange(self.config.hidden_size, device=self.device) * (index + 1)
            inputs = {"inputs_embeds": wave.cos().to(self.dtype)[None, None]}
        position = token * 0 + (index == 1)
        seen = torch.ones((1, 1 + int(index == 1)), dtype=torch.long, device=self.device)
        trunk = inner.members.trunk(self.start, self.stop)
        runner = SegmentRunner(inner.backbone, inner.contract, trunk, cache)
        return runner(position_ids=position, attention_mask=seen, **inputs)
