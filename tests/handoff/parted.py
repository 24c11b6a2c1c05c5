"""Helpers that build both sides of a hand-off and run texts through them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from reference import tiny_family, token_ids

from hf_familial import FamilialForCausalLM
from hf_familial.checkpoints.cuts import check_cut, cut_config, cut_names, find_layout
from hf_familial.handoff import HandoffState, server_side


DEPTH = 2
NEW = 8


def family_and_device(
    model_type: str, dtype: Any = torch.float32, **fields: Any
) -> tuple[Any, Any]:
    """Build a family with exits at depths 2 and 4 of 4, and a copy cut at its first exit."""
    family = tiny_family(model_type, [DEPTH, 4], **fields).to(dtype)
    # without this, tiny models end their texts at once
    family.generation_config.eos_token_id = None
    return family, cut(family)


def cut(family: Any) -> Any:
    """Return a copy of a family cut at exit 0. It does not share weights."""
    check_cut(family.config, 0)
    config, weights = cut_config(family.config, 0), family.state_dict()
    device = FamilialForCausalLM(config).to(family.dtype).eval()
    names = cut_names(family.config, 0, weights, find_layout(config.text_config))
    device.load_state_dict({new: weights[old].clone() for old, new in names.items()})
    device.generation_config = copy.deepcopy(family.generation_config)
    return device


def padded_text(batch: int = 2, length: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Return prompts of different lengths, padded on the left, and their mask."""
    ids = token_ids(batch, length)
    mask = torch.ones_like(ids)
    for row in range(batch - 1):
        mask[row, : 4 - row] = 0
    return ids, mask


def sent(state: HandoffState) -> HandoffState:
    """Return the state that the other process reads."""
    return HandoffState.from_bytes(state.to_bytes())


class Passes:
    """A recorder of the positions that each layer of a model runs inside a `with` block."""

    def __init__(self, model: Any) -> None:
        self.ran: dict[int, list[int]] = {}
        self._layers = model.model.decoder.layers

    def __enter__(self) -> dict[int, list[int]]:
        self._handles = [
            layer.register_forward_hook(self._record(i), with_kwargs=True)
            for i, layer in enumerate(self._layers)
        ]
        return self.ran

    def _record(self, i: int) -> Any:
        def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            self.ran.setdefault(i, []).extend(kwargs["position_ids"][0].tolist())

        return hook

    def __exit__(self, *raised: Any) -> None:
        for handle in self._handles:
            handle.remove()


def hand_off(
    side: Any, deep: Any, mode: str, ids: Any, mask: Any = None, dtype: Any = None, **settings: Any
) -> Any:
    """Send a text to the server side after its prompt, and return it finished."""
    shallow = side.start(ids, mask, **{"max_new_tokens": NEW, **settings})
    text = deep.resume(sent(shallow.state(mode, dtype)))
    if mode == "split":
        while True:
            tokens = text.step()
            if text.done:
                break
            shallow.take(tokens)
            text.take(sent(shallow.state(mode, dtype)))
    else:
        text.generate()
    return text


def whole(family: Any, ids: Any, mask: Any = None, **settings: Any) -> Any:
    """Return the same text, generated in one process."""
    return family.generate(
        ids, attention_mask=mask, **{"max_new_tokens": NEW, "do_sample": False, **settings}
    )


def other_side(family: Any, mode: str) -> Any:
    return server_side(family, 0, keep_lower=False) if mode == "split" else server_side(family, 0)
