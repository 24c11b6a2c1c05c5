"""The upper part of a family: a model without the layers that another process runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from torch import nn

from ..models.familial.exits import Exit


class Absent(nn.Module):
    """Stands where a module stood that this process does not hold.

    Args:
        name (`str`): What it was.
        depth (`int`): Depth from which on the process holds the layers.
    """

    def __init__(self, name: str, depth: int) -> None:
        super().__init__()
        self.name, self.depth = name, depth

    def forward(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Never runs.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            f"{self.name} is not here: this process holds the layers from depth {self.depth} on, "
            "and another one runs those below."
        )


def without_lower_part(model: Any, exit_idx: int) -> Any:
    """A family that shares the layers above an exit and holds nothing of what stands below.

    Dropped are the token embedding, what else acts once before the first layer, the layers below
    the exit, and norm, private layers and head of every exit up to it. An output head that is tied
    to the embedding is kept, for it is the head.

    Args:
        model ([`FamilialForCausalLM`]): The whole family; left as it is.
        exit_idx (`int`): Exit at which another process ends.

    Returns:
        [`FamilialForCausalLM`]: Running anything that was dropped raises a `ValueError`.

    Raises:
        IndexError: If there is no such exit.
        ValueError: If nothing stands above it.
    """
    config, contract = model.config, model.model.contract
    exit_idx = config.resolve_exit(exit_idx)
    if exit_idx == config.num_exits - 1:
        raise ValueError(f"exit {exit_idx} is the deepest: there is no part above it.")
    depth, backbone = config.exits[exit_idx], model.model.backbone
    owner = f"{contract.owner}." if contract.owner else ""
    embedding = model.get_input_embeddings()
    dropped = [name for name, module in backbone.named_modules() if module is embedding]
    parts = backbone.get_submodule(contract.owner)._modules
    dropped += [owner + name for name in contract.once if parts.get(name) is not None]
    dropped += [f"{owner}{contract.layers}.{i}" for i in range(depth)]
    new: dict[str, nn.Module] = {
        f"model.backbone.{name}": Absent(f"`{name}`", depth) for name in dropped
    }
    for k in range(exit_idx + 1):
        new[f"model.exits.{k}"] = _absent_exit(model.model.exits[k], k, depth)
        if config.exit_head == "own":
            new[f"exit_heads.{k}"] = Absent(f"the head of exit {k}", depth)
    return _replaced(model, new)


def _absent_exit(own: Any, exit_idx: int, depth: int) -> Exit:
    """An exit of the same shape without its modules."""
    norm = None if own.norm is None else Absent(f"the norm of exit {exit_idx}", depth)
    layers: list[nn.Module] = [
        Absent(f"private layer {j} of exit {exit_idx}", depth) for j in range(len(own.layers))
    ]
    return Exit(norm, layers)


def _replaced(root: nn.Module, new: Mapping[str, nn.Module]) -> nn.Module:
    """A model that shares all modules but these, in containers of its own where they differ."""
    copies = {"": _shallow(root)}
    for path, module in new.items():
        parent, *names = "", *path.split(".")
        for name in names[:-1]:
            child = f"{parent}.{name}".lstrip(".")
            if child not in copies:
                copies[child] = _shallow(copies[parent].get_submodule(name))
                copies[parent]._modules[name] = copies[child]
            parent = child
        copies[parent]._modules[names[-1]] = module
    return copies[""]


def _shallow(module: nn.Module) -> nn.Module:
    """A module of the same class that shares everything, with a list of submodules of its own."""
    copied: nn.Module = object.__new__(type(module))
    copied.__dict__.update(module.__dict__)
    copied.__dict__["_modules"] = dict(module._modules)
    # accelerate binds `forward` to the original module
    for name in ("forward", "_hf_hook", "_old_forward"):
        copied.__dict__.pop(name, None)
    return copied
