"""What layers keep of a text, learnt by running a few single positions."""

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
def probe_layers(model: Any, start: int, stop: int) -> dict[int, LayerState]:
    """Return what one position leaves in the cache of the layers `[start, stop)`, by layer.

    A second position runs after the first twice: on the same cache, and on a new one that was
    given the first one's state, after another text ran in between. If the results differ, the
    layers keep a part of the text outside the cache, and a `ValueError` says so.
    """
    if model.training:
        raise ValueError("the model is in training mode; call `model.eval()` before a hand-off.")

    def run(cache: DynamicCache, index: int) -> torch.Tensor:
        return _run_position(model, start, stop, cache, index)

    def fresh() -> DynamicCache:
        return DynamicCache(config=model.model.backbone.config)

    first, carried = fresh(), fresh()
    run(first, 0)
    state = capture(first, range(start, stop))
    expected = run(first, 1)
    run(fresh(), 2)
    restore(carried, state, model.device)
    found = run(carried, 1)
    allowed = SAME.get(found.dtype, ROUNDED) * expected.abs().max()
    if not bool((found - expected).abs().max() <= allowed):
        raise ValueError(
            f"`{model.config.text_config.model_type}` cannot be handed over: its layers keep "
            "a part of the text in themselves, not in the cache."
        )
    return state


def _run_position(
    model: Any, start: int, stop: int, cache: DynamicCache, index: int
) -> torch.Tensor:
    """Run input 0 or 2 at position 0, or input 1 at position 1, through the layers."""
    inner, token = model.model, torch.tensor([[index]], device=model.device)
    inputs = {"input_ids": token}
    if start:
        # hidden states unlike those of another index: a wave of its own length
        wave = torch.arange(inner.backbone.config.hidden_size, device=model.device) * (index + 1)
        inputs = {"inputs_embeds": wave.cos().to(inner.backbone.dtype)[None, None]}
    seen = torch.ones((1, 1 + int(index == 1)), dtype=torch.long, device=model.device)
    segment = inner.members.segment(start, stop)
    runner = SegmentRunner(inner.decoder, segment, cache)
    return runner(position_ids=token * 0 + (index == 1), attention_mask=seen, **inputs)
