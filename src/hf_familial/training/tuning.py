"""Choice of the parameters that learn when a pretrained decoder becomes a family."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from ..models.familial import FamilialForCausalLM


if TYPE_CHECKING:
    from peft import LoraConfig


def train_exits_only(model: FamilialForCausalLM) -> list[str]:
    """Freeze all parameters of a model except those of its early exits, in place.

    The backbone then keeps no activations for the backward pass. The output of the deepest exit
    does not change at all.

    Args:
        model ([`FamilialForCausalLM`]): The family.

    Returns:
        `list[str]`: Names of the parameters that learn.

    Raises:
        ValueError: If the early exits have no modules of their own.

    Example:
        >>> names = train_exits_only(model)
    """
    names = model.exit_module_names()
    if not names:
        raise ValueError(
            "No parameter would learn: with `exit_norm='shared'`, `exit_head='shared'` and "
            "`num_exit_layers=0` the early exits have no modules of their own. Change one of the "
            "three, or train the whole family."
        )
    model.requires_grad_(False)
    for name in names:
        model.get_submodule(name).requires_grad_(True)
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def lora_targets(model: FamilialForCausalLM) -> str | list[str]:
    """Return peft's default LoRA targets for the backbone of a family.

    peft finds its defaults by `config.model_type`, and it has none for `familial`. This function
    uses the type of the backbone instead. Private layers have modules with the same names, so LoRA
    adapts them too.

    Raises:
        ValueError: If peft has no default for this backbone. The message names the linear modules
            to choose from.

    Example:
        >>> get_peft_model(model, LoraConfig(target_modules=lora_targets(model)))
    """
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS

    model_type = model.config.text_config.model_type
    if model_type not in DEFAULTS:
        layers = model.model.decoder.layers
        linear = {n.split(".")[-1] for n, m in layers.named_modules() if isinstance(m, nn.Linear)}
        raise ValueError(
            f"peft has no default targets for `{model_type}`. Choose `target_modules` among the "
            f"linear modules of its layers: {', '.join(sorted(linear)) or 'none'}."
        )
    targets = DEFAULTS[model_type]
    return targets if isinstance(targets, str) else list(targets)


def what_learns(model: Any) -> str | LoraConfig:
    """Return the value of `train` that describes a model to `training_flops_per_token`.

    - `"exits"`, if only modules of the early exits learn.
    - The `LoraConfig`, if the model has one LoRA and nothing else learns but `modules_to_save`.
    - `"all"` in every other case. This is the upper bound of the cost.
    """
    learning = [name for name, p in model.named_parameters() if p.requires_grad]
    adapters = list((getattr(model, "peft_config", None) or {}).values())
    if not adapters and learning:
        prefixes = tuple(f"{module}." for module in model.exit_module_names())
        if all(name.startswith(prefixes) for name in learning):
            return "exits"
    if len(adapters) == 1 and adapters[0].peft_type == "LORA":
        # peft names its low-rank updates and its copies of whole modules like this
        if all("lora_" in name or ".modules_to_save." in name for name in learning):
            return adapters[0]
    return "all"
