"""The parameters of a pretrained decoder that learn when it becomes a family."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from ..models.familial import FamilialForCausalLM


if TYPE_CHECKING:
    from peft import LoraConfig


def train_exits_only(model: FamilialForCausalLM) -> list[str]:
    """Freeze all but the modules of the early exits, in place.

    The backbone then runs without keeping activations, and the deepest exit stays what it was, bit
    for bit.

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


def lora_targets(model: FamilialForCausalLM) -> str | list[str]:
    """Return the modules that peft would adapt in the family's decoder by default.

    peft looks its defaults up by `config.model_type`, which is `familial` here, so it asks for
    `target_modules`. This function looks them up by the type of the decoder. The names hold for
    private layers too.

    Raises:
        ValueError: If peft has no default for this decoder. The message names its linear modules.

    Example:
        >>> get_peft_model(model, LoraConfig(target_modules=lora_targets(model)))
    """
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS

    model_type = model.config.text_config.model_type
    if model_type not in DEFAULTS:
        layers = model.model.decoder.layers
        linear = {n.split(".")[-1] for n, m in layers.named_modules() if isinstance(m, nn.Linear)}
        raise ValueError(
            f"peft has no default targets for a `{model_type}`: choose `target_modules` among the "
            f"linear modules of its layers, {', '.join(sorted(linear)) or 'none'}."
        )
    targets = DEFAULTS[model_type]
    return targets if isinstance(targets, str) else list(targets)


def what_learns(model: Any) -> str | LoraConfig:
    """Return what of a family learns, for the `train` of `training_flops_per_token`.

    `"exits"` if nothing learns but modules that only early exits have; the config of its one LoRA
    if nothing learns but the adapters and `modules_to_save`; otherwise `"all"`, the most that a
    step can cost.
    """
    learning = [name for name, p in model.named_parameters() if p.requires_grad]
    adapters = list((getattr(model, "peft_config", None) or {}).values())
    if not adapters and learning:
        prefixes = tuple(f"{module}." for module in model.exit_module_names())
        if all(name.startswith(prefixes) for name in learning):
            return "exits"
    if len(adapters) == 1 and adapters[0].peft_type == "LORA":
        # names of peft's own: of the updates, and of the wrappers of what it saves whole
        if all("lora_" in name or ".modules_to_save." in name for name in learning):
            return adapters[0]
    return "all"
