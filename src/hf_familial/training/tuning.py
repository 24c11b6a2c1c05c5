"""Turning a pretrained decoder into a family: which parameters learn."""

from __future__ import annotations

from ..models.familial import FamilialForCausalLM


def train_exits_only(model: FamilialForCausalLM) -> list[str]:
    """Freeze all but the modules of the early exits, in place.

    The backbone then runs without keeping activations, and the deepest exit stays what it was, bit
    for bit.

    Args:
        model ([`FamilialForCausalLM`]): The family; `requires_grad` of its parameters is set.

    Returns:
        `list[str]`: Names of the parameters that learn.

    Raises:
        ValueError: If early exits have no module of their own.
    """
    names = model.exit_module_names()
    if not names:
        raise ValueError(
            "no parameter is left to train: with `exit_norm='shared'`, `exit_head='shared'` and "
            "`num_exit_layers=0` the early exits have no module of their own."
        )
    model.requires_grad_(False)
    for name in names:
        model.get_submodule(name).requires_grad_(True)
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]
