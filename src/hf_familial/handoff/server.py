"""The other side of a hand-over: it holds the layers above an exit, or the whole family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from transformers.cache_utils import DynamicCache

from ..models.familial.relay_cache import check_relay
from ..models.familial.segments import SegmentRunner
from ._cache_layers import LayerState
from ._probe import what_layers_keep
from ._server_text import DeepText
from ._upper_half import without_lower_part
from .state import RelayState
from .weights_digest import fingerprint


@dataclass(frozen=True)
class DeepSide:
    """A process that holds the layers above an exit; made by `deep_side` or `upper_part`.

    Attributes:
        model ([`FamilialForCausalLM`]): The family, whole or without its lower part.
        exit_idx (`int`): The exit whose taps come from elsewhere.
        fingerprint (`str`): Of the layers below it when the side was made.
        like (`Mapping[int, LayerState]`): What one position leaves in the cache of each layer below
            the exit; empty when they are not here.
    """

    model: Any
    exit_idx: int
    fingerprint: str
    like: Mapping[int, LayerState]

    @property
    def whole(self) -> bool:
        """Whether the layers below the exit are here too."""
        return bool(self.like)

    @property
    def depth(self) -> int:
        """Layers below the exit."""
        return self.model.config.exits[self.exit_idx]

    def fingerprint_now(self) -> str:
        """Fingerprint of the layers below the exit, that the taps of a new text must come from.

        It is computed anew, since weights may have changed; not where `model.freeze_weights()`
        promises that they do not, nor where the layers are not here.
        """
        if not self.whole or self.model.model.frozen:
            return self.fingerprint
        return fingerprint(self.model, self.depth)

    def below(self, cache: DynamicCache) -> SegmentRunner:
        """The layers below the exit on a cache."""
        inner = self.model.model
        trunk = inner.members.trunk(0, self.depth)
        return SegmentRunner(inner.backbone, inner.contract, trunk, cache)

    def resume(self, state: RelayState, **options: Any) -> DeepText:
        """Go on with a text from another process.

        Args:
            state ([`RelayState`]): The text from its beginning.
            **options: As for `generate`; they win over the settings that came with the text.

        Returns:
            [`DeepText`]: The text on this side.

        Raises:
            RelayStateError: If the taps come from other layers, or do not fit these.
        """
        return DeepText(self, state, options)


def deep_side(model: Any, exit_idx: int) -> DeepSide:
    """The side that holds a whole family, and can go on alone.

    Args:
        model ([`FamilialForCausalLM`]): The family.
        exit_idx (`int`): The exit whose taps come from elsewhere, not the deepest.

    Returns:
        [`DeepSide`]: With the fingerprint of the layers below the exit.

    Raises:
        IndexError: If there is no such exit.
        ValueError: If nothing stands above it, or the host's layers cannot go on from a tap or from
            what is in the cache.
    """
    check_relay(model)
    exit_idx = model.config.resolve_exit(exit_idx)
    if exit_idx == model.config.num_exits - 1:
        raise ValueError(f"exit {exit_idx} is the deepest: no layers go on from its taps.")
    depth = model.config.exits[exit_idx]
    found = fingerprint(model, depth)
    what_layers_keep(model, depth, model.config.exits[-1])
    return DeepSide(model, exit_idx, found, like=what_layers_keep(model, 0, depth))


def upper_part(model: Any, exit_idx: int) -> DeepSide:
    """The side that holds nothing of what stands below an exit.

    Layers, embedding and private layers below are neither held nor runnable: when nothing else
    refers to `model`, their memory is free. The fingerprint is taken before.

    Args:
        model ([`FamilialForCausalLM`]): The whole family; left as it is.
        exit_idx (`int`): The exit whose taps come from elsewhere, not the deepest.

    Returns:
        [`DeepSide`]: For splitting only.

    Raises:
        IndexError: If there is no such exit.
        ValueError: As from `deep_side`.
    """
    side = deep_side(model, exit_idx)
    return replace(side, model=without_lower_part(model, exit_idx), like={})
