"""Which layers, which norm and which cache slots make up each member of a family."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.cache_utils import Cache, DynamicCache

from .contract import Contract
from .segments import Segment, UnusedLayer, grow_cache, hide_unused, slice_config


@dataclass(frozen=True)
class Members:
    """The members of a family, as segments of its backbone.

    Attributes:
        config ([`FamilialConfig`]): Depths of the exits, number of private layers.
        backbone (`PreTrainedModel`): The host's decoder.
        contract ([`Contract`]): Where it keeps its layers and norm.
        exits (`nn.ModuleList`): The modules of the early exits.
    """

    config: Any
    backbone: Any
    contract: Contract
    exits: nn.ModuleList

    @property
    def layers(self) -> nn.ModuleList:
        """The backbone's layers."""
        return self.contract.parts(self.backbone)[0]

    def norm(self, exit_idx: int) -> nn.Module:
        """The norm that an exit reads its tap with: its own, or the backbone's final norm."""
        own = self._exit(exit_idx).norm if exit_idx < len(self.exits) else None
        return self.contract.parts(self.backbone)[1] if own is None else own

    def _exit(self, exit_idx: int) -> Any:
        return self.exits[exit_idx]

    def whole(self, exit_idx: int) -> Segment:
        """All layers of a member, from the embedding to its norm."""
        layers = list(self.layers[: self.config.exits[exit_idx]])
        if exit_idx < len(self.exits):
            layers += self._exit(exit_idx).layers
        return Segment(layers, start=0, norm=self.norm(exit_idx), slots=self.slots(exit_idx))

    def private(self, exit_idx: int) -> Segment:
        """The private layers of an early exit and its norm, to be run on its tap."""
        layers, depth = list(self._exit(exit_idx).layers), self.config.exits[exit_idx]
        slots = self.slots(exit_idx)[depth:]
        return Segment(layers, start=depth, norm=self.norm(exit_idx), slots=slots)

    def trunk(self, start: int, stop: int) -> Segment:
        """The backbone's layers `[start, stop)`, from tap to tap."""
        layers = list(self.layers[start:stop])
        return Segment(layers, start=start, norm=None, slots=range(start, stop))

    def slots(self, exit_idx: int) -> list[int]:
        """Cache slots of a member: the backbone's up to its depth, then its private layers' own.

        Private slots stand after all of the backbone's, exit by exit.
        """
        slots = list(range(self.config.exits[exit_idx]))
        if exit_idx < len(self.exits):
            count = self.config.num_exit_layers
            first = self.config.num_hidden_layers + exit_idx * count
            slots += range(first, first + count)
        return slots

    def grow(self, cache: Cache, exits: Iterable[int]) -> None:
        """Give a cache every slot that these exits write to.

        Args:
            cache ([`Cache`]): Grown in place where it is too short.
            exits (`Iterable[int]`): Indices of the exits to be run.

        Raises:
            ValueError: If it is of a kind that cannot be extended.
        """
        slots = {slot for exit_idx in exits for slot in self.slots(exit_idx)}
        if max(slots) < len(cache.layers) and not any(
            isinstance(cache.layers[slot], UnusedLayer) for slot in slots
        ):
            return
        config, count = self.backbone.config, self.config.num_exit_layers
        sources = [(config, i) for i in range(config.num_hidden_layers)]
        for depth in self.config.exits[:-1]:
            member = slice_config(config, 0, depth + count)
            sources += [(member, depth + j) for j in range(count)]
        grow_cache(cache, slots, sources)

    def show_only(self, cache: DynamicCache, exit_idx: int) -> None:
        """Give a cache the slots of one member and hide the others that are empty.

        Args:
            cache ([`DynamicCache`]): Changed in place.
            exit_idx (`int`): Exit at which the member ends.
        """
        self.grow(cache, (exit_idx,))
        hide_unused(cache, self.slots(exit_idx))


def matrix_sizes(model: Any, exits: Sequence[int]) -> tuple[list[int], list[int]]:
    """Count the weights in matrices: each is multiplied and added once per position.

    Args:
        model ([`FamilialForCausalLM`]): The family.
        exits (`Sequence[int]`): Indices of exits, shallowest first.

    Returns:
        `tuple[list[int], list[int]]`: For each exit, the weights of the backbone's layers from the
        exit before it on, and those of its head.
    """
    members = model.model.members
    depths = [0, *(model.config.exits[k] for k in exits)]
    spans = zip(depths, depths[1:], strict=False)
    layers = [_matrix_weights(members.trunk(*span).layers) for span in spans]
    return layers, [_matrix_weights([model.head(k)]) for k in exits]


def _matrix_weights(modules: Iterable[nn.Module]) -> int:
    weights = {id(p): p for module in modules for p in module.parameters() if p.dim() > 1}
    return sum(p.numel() for p in weights.values())
