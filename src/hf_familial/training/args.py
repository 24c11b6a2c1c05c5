"""Training arguments of a family: the host's, and how its exits share the loss."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import TrainingArguments

from ..models.familial import Distillation
from .schedules import SCHEDULES, SCHEMES, ExitSchedule, exit_weights


@dataclass
class FamilialTrainingArguments(TrainingArguments):
    """[`~transformers.TrainingArguments`] and the objective of a family; other arguments as there.

    Args:
        exit_weights (`str`, *optional*, defaults to `"uniform"`): Weight of each exit's loss: the
            name of a scheme, or numbers separated by commas; see `hf_familial.training.schedules`.
        exit_schedule (`str`, *optional*, defaults to `"constant"`): How the weights of early exits
            change over the run; see [`ExitSchedule`].
        exit_schedule_fraction (`float`, *optional*, defaults to 0.5): Share of the steps over which
            they do.
        distillation_weight (`float`, *optional*, defaults to 0): Weight of the divergence of early
            exits from the deepest one, beside the cross entropy's 1; see [`Distillation`].
        distillation_temperature (`float`, *optional*, defaults to 1): Divides the logits of both.

    Raises:
        ValueError: If one of them is out of its range.
    """

    exit_weights: str = field(
        default="uniform",
        metadata={"help": f"{', '.join(SCHEMES)}, or one number per exit separated by commas."},
    )
    exit_schedule: str = field(default="constant", metadata={"help": ", ".join(SCHEDULES)})
    exit_schedule_fraction: float = field(
        default=0.5, metadata={"help": "Share of the steps over which the exit weights change."}
    )
    distillation_weight: float = field(
        default=0.0, metadata={"help": "Weight of the divergence from the deepest exit."}
    )
    distillation_temperature: float = field(
        default=1.0, metadata={"help": "Temperature of that divergence."}
    )

    def __post_init__(self) -> None:
        """Refuse what cannot work, before the host sets anything up."""
        if self.distillation_weight < 0:
            raise ValueError(
                f"`distillation_weight` must be 0 or more, got {self.distillation_weight}."
            )
        if self.distillation_temperature <= 0:
            raise ValueError(
                f"`distillation_temperature` must be positive, got {self.distillation_temperature}."
            )
        ExitSchedule((1.0,), self.exit_schedule, fraction=self.exit_schedule_fraction)
        super().__post_init__()

    def schedule(self, depths: list[int], total_steps: int) -> ExitSchedule:
        """The weights of a family's exits over a run.

        Args:
            depths (`list[int]`): Depth of every exit, in layers.
            total_steps (`int`): Optimiser steps of the run.

        Returns:
            [`ExitSchedule`]

        Raises:
            ValueError: If the weights do not fit the number of exits.
        """
        scheme: str | list[float] = self.exit_weights
        if isinstance(scheme, str) and scheme not in SCHEMES:
            scheme = _numbers(scheme)
        weights = exit_weights(scheme, depths)
        return ExitSchedule(weights, self.exit_schedule, total_steps, self.exit_schedule_fraction)

    def distillation(self) -> Distillation | None:
        """What the deepest exit teaches; `None` if nothing."""
        if not self.distillation_weight:
            return None
        return Distillation(self.distillation_weight, self.distillation_temperature)


def _numbers(text: str) -> list[float]:
    """Numbers separated by commas."""
    try:
        return [float(part) for part in text.strip("[]()").split(",")]
    except ValueError:
        raise ValueError(
            f"`exit_weights` must be one of {', '.join(SCHEMES)} or numbers separated by commas, "
            f"got {text!r}."
        ) from None
