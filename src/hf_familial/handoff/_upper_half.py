"""A copy of a family without the lower layers, which another process runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from torch import nn

from ..models.familial.modeling_base import Exit
from ..models.familial.segments import shallow_copy


class MissingModule(nn.Module):
    """A placeholder for a module that this process does not have. Its `forward` raises."""

    def __init__(self, name: str, depth: int) -> None:
        super().__init__()
        self.name, self.depth = name, depth

    def forward(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ValueError(
            f"{self.name} is not in this process, which has only the layers above depth "
            f"{self.depth}. The other process runs the layers below."
        )


def without_lower_layers(model: Any, exit_idx: int) -> Any:
    """Return a copy of a family that shares the modules above an exit and has none of those below.

    The copy lacks the token embedding, other modules that run once before the first layer, and the
    layers below the exit. It also lacks the norm, private layers and head of each exit up to
    `exit_idx`. It keeps an output head that is tied to the embedding. The function does not change
    `model`.
    """
    config, spec = model.config, model.model.spec
    depth, backbone = config.exits[exit_idx], model.model.backbone
    embedding = model.get_input_embeddings()
    dropped = [name for name, module in backbone.named_modules() if module is embedding]
    parts = backbone.get_submodule(spec.host.owner)._modules
    dropped += [spec.path(name) for name in spec.entry_only if parts.get(name) is not None]
    dropped += [f"{spec.path(spec.layers)}.{i}" for i in range(depth)]
    new: dict[str, nn.Module] = {
        f"model.backbone.{name}": MissingModule(f"`{name}`", depth) for name in dropped
    }
    for k in range(exit_idx + 1):
        new[f"model.exits.{k}"] = _missing_exit(model.model.exits[k], k, depth)
        if config.exit_head == "own":
            new[f"exit_heads.{k}"] = MissingModule(f"the head of exit {k}", depth)
    return _replaced(model, new)


def _missing_exit(own: Any, exit_idx: int, depth: int) -> Exit:
    """Return an exit with a placeholder for its norm and for each of its private layers."""
    norm = None if own.norm is None else MissingModule(f"the norm of exit {exit_idx}", depth)
    layers: list[nn.Module] = [
        MissingModule(f"private layer {j} of exit {exit_idx}", depth)
        for j in range(len(own.layers))
    ]
    return Exit(norm, layers)


def _replaced(root: nn.Module, new: Mapping[str, nn.Module]) -> nn.Module:
    """Return a copy of `root` that shares all modules except those replaced in `new`, by path."""
    copies: dict[str, Any] = {"": shallow_copy(root)}
    for path, module in new.items():
        parent, *names = "", *path.split(".")
        for name in names[:-1]:
            child = f"{parent}.{name}".lstrip(".")
            if child not in copies:
                copies[child] = shallow_copy(copies[parent].get_submodule(name))
                copies[parent]._modules[name] = copies[child]
            parent = child
        copies[parent]._modules[names[-1]] = module
    return copies[""]
