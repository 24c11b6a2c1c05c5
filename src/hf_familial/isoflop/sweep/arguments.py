"""From a run's plan to the arguments of `pretrain`: those of the example's command line."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from ...training.pretraining import PretrainingArguments, PretrainingData
from ..design.fields import DesignError, near
from ..design.plans import RunPlan


EMBEDDED = ("", "stdlib")  # names of the corpus that every machine has

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
        DataError: If the data arguments contradict each other.
        ValueError: If the host refuses a value.
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
    names = {field.name for field in fields(PretrainingData)}
    values = USUAL | given
    data = {name: values.pop(name) for name in list(values) if name in names}
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
    return data_args, args


def check_training(training: Any) -> dict[str, Any]:
    """Refuse further arguments that are unknown, or that follow from the design.

    Raises:
        DesignError: Naming the argument.
    """
    known = {field.name for cls in (PretrainingData, PretrainingArguments) for field in fields(cls)}
    for name in training:
        if name in TAKEN:
            raise DesignError(
                f"`training.{name}` follows from {TAKEN[name]}; leave it out.", f"training.{name}"
            )
        if name not in known:
            hint = near(name, known)
            raise DesignError(f"`training.{name}` is unknown{hint}", f"training.{name}")
    return dict(training)


def data_source(data: str) -> dict[str, Any]:
    """The data argument that a design's `data` stands for: none, a file or folder, or a dataset.

    Args:
        data (`str`): Empty or `stdlib`, a path, or a name on the Hub.

    Raises:
        FileNotFoundError: If it looks like a path and nothing is there.
    """
    if data in EMBEDDED:
        return {}
    path = Path(data).expanduser()
    if path.exists():
        return {"train_files": [str(path)]}
    if data.startswith((".", "/", "~")) or path.suffix in (".txt", ".jsonl", ".parquet", ".gz"):
        raise FileNotFoundError(f"`data` must be a file or a folder that exists, got {data!r}.")
    return {"dataset_name": data}
