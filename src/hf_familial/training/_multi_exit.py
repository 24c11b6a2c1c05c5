"""The function `multi_exit`, with which any trainer class trains every exit of a family."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from transformers import Trainer

from ._each_exit import MultiExitOptions
from .trainer import MultiExitTrainer


def multi_exit(
    trainer_class: type[Trainer],
    *,
    exits: str = "all",
    exit_weights: str | Sequence[float] = "uniform",
    generation_exit: int = -1,
    reference_exit: int | None = None,
) -> type[Any]:
    """Return a subclass of a trainer class that trains every exit of a family.

    The subclass keeps the loss of the trainer class. With `exits="all"` the backbone runs once for
    a batch. Then the loss is computed for one exit after the other, from the exit's hidden states.
    The gradient is the weighted sum over the exits. Metrics that the trainer collects while it
    computes its loss are also logged by exit, for example as `exit_0_mean_token_accuracy`.

    With `exits="sample"` each optimiser step draws one exit, with its weight as probability, and
    runs the layers below that exit only. The expected gradient is the same. A trainer that
    generates uses the drawn exit for the generation, for the old log-probabilities and for the
    loss.

    Args:
        trainer_class (`type`): A subclass of [`~transformers.Trainer`], such as trl's `SFTTrainer`,
            `DPOTrainer` or `GRPOTrainer`.
        exits (`str`, *optional*, defaults to `"all"`): `"all"` or `"sample"`.
        exit_weights (`str` or `Sequence[float]`, *optional*, defaults to `"uniform"`): Weight of
            each exit's loss, see [`exit_weights`]. If the arguments are
            [`FamilialTrainingArguments`], set the weights there.
        generation_exit (`int`, *optional*, defaults to -1): Exit that generates texts in
            reinforcement learning when `exits="all"`.
        reference_exit (`int`, *optional*): Exit that a reference family (`trainer.ref_model`) runs.
            Defaults to the exit that learns. Log-probabilities that are computed before the loss
            come from this exit, or from the deepest one.

    Returns:
        `type`: The subclass. Its constructor accepts the arguments of `trainer_class`.

    Raises:
        TypeError: If `trainer_class` is not a subclass of [`~transformers.Trainer`].
        ValueError: If an option is wrong.

    Example:
        >>> from trl import SFTTrainer
        >>> trainer = multi_exit(SFTTrainer)(model=model, args=args, train_dataset=dataset)
    """
    if not (isinstance(trainer_class, type) and issubclass(trainer_class, Trainer)):
        got = getattr(trainer_class, "__name__", f"an object of {type(trainer_class).__name__}")
        raise TypeError(
            "`trainer_class` must be a subclass of `transformers.Trainer`, such as "
            f"`trl.SFTTrainer`, got {got}. Pass the class itself."
        )
    weights = exit_weights if isinstance(exit_weights, str) else tuple(exit_weights)
    options = MultiExitOptions(exits, weights, generation_exit, reference_exit)
    kind: Any = trainer_class
    return _subclass(kind, options)


@functools.cache
def _subclass(trainer_class: type[Any], options: MultiExitOptions) -> type[Any]:
    bases: tuple[type[Any], ...] = (trainer_class,)
    if not issubclass(trainer_class, MultiExitTrainer):
        bases = (MultiExitTrainer, trainer_class)
    members = {
        "__doc__": f"{trainer_class.__name__} that trains every exit of a family.",
        "__module__": trainer_class.__module__,
        "multi_exit_options": options,
    }
    return type(f"MultiExit{trainer_class.__name__}", bases, members)
