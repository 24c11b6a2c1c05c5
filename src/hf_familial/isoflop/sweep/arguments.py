"""From a run's plan to the arguments of `pretrain`: those of the example's command line."""

from __future__ import annotations

import os
import types
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from ...errors import DesignError
from ...paths import check_model_place
from ...training.args import CHOICES
from ...training.pretraining import PretrainingArguments, PretrainingData
from ..design.data import data_source
from ..design.fields import coerced, near
from ..design.plans import RunPlan


if TYPE_CHECKING:
    from ..design.grid import IsoFlopDesign


# what follows from the design, or from how the sweep is started, may not stand in `training`
TAKEN = {
    "output_dir": "the folder of the sweep",
    "max_steps": "`budgets`",
    "num_train_epochs": "`budgets`",
    "learning_rate": "`rule`",
    "gradient_accumulation_steps": "`rule` and `per_device_train_batch_size`",
    "seed": "`seeds`",
    "data_seed": "`seeds`",
    "seq_length": "`seq_length`",
    "vocab_size": "`vocab_size`",
    "dataset_name": "`data`",
    "train_files": "`data`",
    "cache_dir": "`$HF_HOME`",
    "resume_from_checkpoint": "the checkpoints of the sweep",
    "save_strategy": "the sweep's option `save_seconds`",
    "save_steps": "the sweep's option `save_seconds`",
    "save_total_limit": "the sweep",
    "dataloader_drop_last": "the sweep",
    "disable_tqdm": "the sweep's own display",
}

# logs stand close enough for checkpoints, evaluations are few: both cost time
USUAL: dict[str, Any] = {
    "logging_steps": 0.05,
    "eval_steps": 0.25,
    "max_eval_tokens": 65_536,
    "report_to": "none",
}


HINTS: dict[str, Any] = {
    field.name: hints[field.name]
    for cls in (PretrainingData, PretrainingArguments)
    for hints in [typing.get_type_hints(cls)]
    for field in fields(cls)
}


def run_arguments(
    plan: RunPlan, output_dir: str, processes: int = 1
) -> tuple[PretrainingData, PretrainingArguments]:
    """The arguments of a run.

    `training` of the design may hold any argument of data or training, as the command line of
    `examples/pretrain.py` has them. `per_device_train_batch_size` is the most sequences that a
    device has at once: the largest divisor of its share of the batch below it is used, the rest is
    accumulation.

    Args:
        plan ([`RunPlan`]): The run.
        output_dir (`str`): Where its checkpoints go.
        processes (`int`, *optional*, defaults to 1): Processes that share it.

    Returns:
        `tuple` of [`PretrainingData`] and [`PretrainingArguments`].

    Raises:
        DesignError: If `training` has a name that is unknown or follows from the design, or the
            batch cannot be shared out.
    """
    given = check_training(plan.training)
    share, rest = divmod(plan.batch_sequences, processes)
    if rest:
        raise DesignError(
            f"`processes` must divide the batch of run {plan.id}, {plan.batch_sequences} "
            f"sequences, got {processes}.",
            "processes",
        )
    most = min(share, given.pop("per_device_train_batch_size", share))
    micro = max(size for size in range(1, most + 1) if share % size == 0)
    data, values = _shared_out(given)
    with in_training():
        data_args = PretrainingData(
            **(data | data_source(plan.data)),
            seq_length=plan.seq_length,
            vocab_size=plan.backbone["vocab_size"],
        )
        args = PretrainingArguments(
            **values,
            output_dir=output_dir,
            max_steps=plan.steps,
            learning_rate=plan.lr,
            seed=plan.seed,
            data_seed=plan.seed,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=share // micro,
            # the sweep saves by the clock, where a log ends, so that a break leaves no trace
            save_strategy="no",
            save_total_limit=2,
            dataloader_drop_last=True,
            disable_tqdm=True,
        )
        args.schedule(list(plan.exits), plan.steps)
    return data_args, args


def check_design(design: IsoFlopDesign) -> None:
    """Refuse what no run of a design could start with, before its runs are worked out.

    Args:
        design ([`IsoFlopDesign`]): Its fields are checked already.

    Raises:
        DesignError: Naming the argument of `training` that is wrong.
        FileNotFoundError: If the data or the tokenizer are not where the design says.
    """
    data, values = _shared_out(check_training(design.training))
    sizes: dict[str, Any] = {"seq_length": design.seq_length, "vocab_size": design.vocab_size}
    with in_training():
        PretrainingData(**(data | data_source(design.data)), **sizes)
        args = PretrainingArguments(**values, output_dir=os.devnull)
        for G in design.granularities:
            args.schedule(list(range(1, G + 1)), 1)
    if data.get("tokenizer_name"):
        check_model_place("training.tokenizer_name", data["tokenizer_name"])


def _shared_out(given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what of the arguments the data take, and what the training."""
    names = {field.name for field in fields(PretrainingData)}
    values = USUAL | given
    return {name: values.pop(name) for name in list(values) if name in names}, values


@contextmanager
def in_training() -> Iterator[None]:
    """Turn what the arguments refuse into a refusal of the design's `training`.

    Raises:
        DesignError: With the message of the arguments.
    """
    try:
        yield
    except DesignError:
        raise
    except (TypeError, ValueError) as error:
        raise DesignError(f"`training`: {' '.join(str(error).split())}", "training") from error


def check_training(training: Any) -> dict[str, Any]:
    """Check the names and types of further arguments, which must not follow from the design.

    Numbers in words, as YAML 1.1 reads `1e-1`, become numbers.

    Args:
        training (`Mapping[str, Any]`): Arguments by name.

    Returns:
        `dict[str, Any]`: The same, each of the type that it has in training.

    Raises:
        DesignError: Naming the argument.
    """
    for name in training:
        if name in TAKEN:
            raise DesignError(
                f"`training.{name}` follows from {TAKEN[name]}; leave it out.", f"training.{name}"
            )
        if name not in HINTS:
            hint = near(name, HINTS)
            raise DesignError(f"`training.{name}` is unknown{hint}", f"training.{name}")
    return {name: _typed(name, value) for name, value in training.items()}


def _typed(name: str, value: Any) -> Any:
    """Return an argument as its annotation has it, where that is simple."""
    hint = HINTS[name]
    if name == "exit_weights" and isinstance(value, (list, tuple)):
        value = ",".join(map(str, value))
    if value is False and "no" in CHOICES.get(name, ()):
        value = "no"  # which YAML takes for false
    simple = {str, int, float, bool, types.NoneType}
    if not {*(typing.get_args(hint) or (hint,))} <= simple:
        return value
    try:
        value = coerced(value, hint)
    except TypeError as error:
        field = f"training.{name}"
        raise DesignError(f"`{field}` must be {error}, got {value!r}.", field) from None
    if name == "per_device_train_batch_size" and value < 1:
        raise DesignError(f"`training.{name}` must be 1 or more, got {value}.", f"training.{name}")
    return value
