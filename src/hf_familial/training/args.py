"""Training arguments of a family: those of Transformers, and options for the loss of the exits."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

from transformers import SchedulerType, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_utils import IntervalStrategy, SaveStrategy
from transformers.training_args import OptimizerNames

from ..models.familial import Distillation
from ..models.familial.configuration_familial import check_choice
from .schedules import SCHEDULES, SCHEMES, ExitSchedule, exit_weights


# Argument: lowest value allowed, first value too high. Transformers checks these late or never.
RANGES: dict[str, tuple[float, float]] = {
    "learning_rate": (0, math.inf),
    "weight_decay": (0, math.inf),
    "adam_beta1": (0, 1),
    "adam_beta2": (0, 1),
    "adam_epsilon": (0, math.inf),
    "max_grad_norm": (0, math.inf),
    "warmup_steps": (0, math.inf),
    "logging_steps": (0, math.inf),
    "eval_steps": (0, math.inf),
    "save_steps": (0, math.inf),
    "eval_delay": (0, math.inf),
    "num_train_epochs": (0, math.inf),
    "per_device_train_batch_size": (1, math.inf),
    "per_device_eval_batch_size": (1, math.inf),
    "gradient_accumulation_steps": (1, math.inf),
    "eval_accumulation_steps": (1, math.inf),
    "dataloader_num_workers": (0, math.inf),
    "save_total_limit": (0, math.inf),
    "seed": (0, 2**32),
    "data_seed": (0, 2**32),
    "distillation_weight": (0, math.inf),
}
CHOICES: dict[str, list[str]] = {
    "optim": [name.value for name in OptimizerNames],
    "lr_scheduler_type": [name.value for name in SchedulerType],
    "eval_strategy": [name.value for name in IntervalStrategy],
    "logging_strategy": [name.value for name in IntervalStrategy],
    "save_strategy": [name.value for name in SaveStrategy],
}


def argument(default: Any, words: str) -> Any:
    """Return a dataclass field whose `words` are its help text in `HfArgumentParser`."""
    return field(default=default, metadata={"help": words})


@dataclass
class FamilialTrainingArguments(TrainingArguments):
    """Arguments of [`FamilialTrainer`]: [`~transformers.TrainingArguments`] plus the five below.

    Args:
        exit_weights (`str`, *optional*, defaults to `"uniform"`): Weight of each exit in the loss.
            Pass the name of a scheme, or one number per exit separated by commas, such as
            `"1,1,2"`. See `hf_familial.training.exit_weights` for the schemes.
        exit_schedule (`str`, *optional*, defaults to `"constant"`): Rule by which the weights of
            the early exits change during the run. See [`ExitSchedule`].
        exit_schedule_fraction (`float`, *optional*, defaults to 0.5): Share of the steps during
            which the weights change.
        distillation_weight (`float`, *optional*, defaults to 0): Weight of the KL divergence
            between each early exit and the deepest one. The cross entropy has the weight 1. See
            [`Distillation`].
        distillation_temperature (`float`, *optional*, defaults to 1): Number that divides the
            logits of both exits before the divergence is computed.

    Raises:
        ValueError: If a value is out of its range.

    Example:
        >>> args = FamilialTrainingArguments("outputs", exit_weights="linear", max_steps=1000)
    """

    exit_weights: str = argument(
        "uniform",
        f"Weight of each exit in the loss: {', '.join(SCHEMES)}, or one number per exit "
        "separated by commas.",
    )
    exit_schedule: str = argument(
        "constant", f"Change of the weights of early exits over the run: {', '.join(SCHEDULES)}."
    )
    exit_schedule_fraction: float = argument(
        0.5, "Share of the steps during which the weights of early exits change."
    )
    distillation_weight: float = argument(
        0.0, "Weight of the KL divergence between each early exit and the deepest one."
    )
    distillation_temperature: float = argument(1.0, "Temperature of that divergence.")

    def __post_init__(self) -> None:
        """Check the values before Transformers sets anything up."""
        check_host_arguments(self)
        check_label_smoothing(self)
        if self.distillation_temperature <= 0:
            raise ValueError(
                f"`distillation_temperature` must be positive, got {self.distillation_temperature}."
            )
        scheme = self._scheme()
        # the number of exits is not known yet, so the trainer compares it with the model
        count = 1 if isinstance(scheme, str) else len(scheme)
        self.schedule(list(range(1, count + 1)), 0)
        super().__post_init__()

    def schedule(self, depths: list[int], total_steps: int) -> ExitSchedule:
        """Return the weights of exits at `depths` (layers) for each of `total_steps` steps."""
        weights = exit_weights(self._scheme(), depths)
        return ExitSchedule(weights, self.exit_schedule, total_steps, self.exit_schedule_fraction)

    def _scheme(self) -> str | list[float]:
        """Return `exit_weights` as the name of a scheme or as a list of numbers."""
        scheme: str | list[float] = self.exit_weights
        named = isinstance(scheme, str) and scheme in SCHEMES
        return scheme if named else _numbers(scheme)

    def distillation(self) -> Distillation | None:
        """Return the settings of the distillation, or `None` if its weight is 0."""
        if not self.distillation_weight:
            return None
        return Distillation(self.distillation_weight, self.distillation_temperature)


def check_label_smoothing(args: TrainingArguments) -> None:
    """Raise `ValueError` if label smoothing is on.

    Transformers smooths the labels of one exit and leaves all others out of the loss.
    """
    if args.label_smoothing_factor:
        raise ValueError(
            f"`label_smoothing_factor` must be 0 for a family, got {args.label_smoothing_factor}. "
            "Transformers would smooth one exit and leave all others out of the loss."
        )


def check_host_arguments(args: TrainingArguments) -> None:
    """Raise `ValueError` for values that Transformers accepts without a check."""
    for name, (least, below) in RANGES.items():
        value = getattr(args, name, None)
        if value is None:
            continue
        right = f"{least} or more" if below == math.inf else f"from {least} to less than {below}"
        if isinstance(value, (bool, str)) or not least <= value < below:
            raise ValueError(f"`{name}` must be a number, {right}, got {value!r}.")
    for name, choices in CHOICES.items():
        check_choice(name, getattr(args, name), choices)
    reports = args.report_to if isinstance(args.report_to, list) else [args.report_to or "none"]
    for name in reports:
        check_choice("report_to", name, [*INTEGRATION_TO_CALLBACK, "all", "none"])
    for entry in fields(args):
        value, named = getattr(args, entry.name), entry.metadata.get("choices")
        if named and value is not None:
            check_choice(entry.name, value, named)


def _numbers(given: Any) -> list[float]:
    """Read one number per exit from a list or from a string such as `"1,1,2"`."""
    parts = given.strip("[]() ").split(",") if isinstance(given, str) else given
    try:
        return [float(part) for part in parts]
    except (TypeError, ValueError):
        check_choice("exit_weights", given, [*SCHEMES, "numbers separated by commas"])
        raise
