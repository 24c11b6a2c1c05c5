"""Training arguments and data of one run of a sweep."""

from __future__ import annotations

import hashlib
import json
import os
import types
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset

from .._wording import known_words
from ..errors import CorpusChangedError, DataError, DesignError
from ..paths import check_model_place, is_local, no_such_path
from ..training.args import CHOICES
from ..training.data import PackedData, prepare_data
from ..training.data.corpus import TABLE_FORMATS, TEXT_SUFFIXES
from ..training.pretraining import PretrainingArguments, PretrainingData
from ._fields import FIELDS
from .plan import RunPlan


if TYPE_CHECKING:
    from .design import IsoFlopDesign


EMBEDDED = ("", "stdlib")  # names of the corpus that every machine has

# arguments that `training` must not contain, and what sets them
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

# defaults: frequent logs, because checkpoints need them, and few evaluations, which take time
USUAL: dict[str, Any] = {
    "logging_steps": 0.05,
    "eval_steps": 0.25,
    "max_eval_tokens": 65_536,
    "report_to": "none",
}

HINTS: dict[str, Any] = typing.get_type_hints(PretrainingData) | typing.get_type_hints(
    PretrainingArguments
)


def run_arguments(
    plan: RunPlan, output_dir: str, processes: int = 1
) -> tuple[PretrainingData, PretrainingArguments]:
    """Return the data arguments and training arguments of a run.

    `training` of the design may contain any option of `examples/pretrain.py`.
    `per_device_train_batch_size` is an upper limit. The run uses the largest divisor of the batch
    per process that is within the limit, and accumulates gradients for the rest.
    """
    given = check_training(plan.training)
    share, rest = divmod(plan.batch_sequences, processes)
    if rest:
        raise DesignError(
            f"`processes` must divide the batch of run {plan.id}, which has "
            f"{plan.batch_sequences} sequences, got {processes}.",
            "processes",
        )
    most = min(share, given.pop("per_device_train_batch_size", share))
    micro = max(size for size in range(1, most + 1) if share % size == 0)
    data, values = _split(given)
    with _naming_training():
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
            # the sweep itself saves, at steps that log, so that a resumed run logs the same means
            save_strategy="no",
            save_total_limit=2,
            dataloader_drop_last=True,
            disable_tqdm=True,
        )
        args.schedule(list(plan.exits), plan.steps)
    return data_args, args


def check_design(design: IsoFlopDesign) -> None:
    """Check `data` and `training` of a design, before its runs are planned.

    Raises:
        DesignError: If an argument in `training` is wrong. The message names it.
        FileNotFoundError: If the data or the tokenizer do not exist.
    """
    data, values = _split(check_training(design.training))
    sizes: dict[str, Any] = {"seq_length": design.seq_length, "vocab_size": design.vocab_size}
    with _naming_training():
        PretrainingData(**(data | data_source(design.data)), **sizes)
        args = PretrainingArguments(**values, output_dir=os.devnull)
        for G in design.granularities:
            args.schedule(list(range(1, G + 1)), 1)
    if data.get("tokenizer_name"):
        check_model_place("training.tokenizer_name", data["tokenizer_name"])


def data_source(data: str) -> dict[str, Any]:
    """Return the data argument for `data` of a design: files, a dataset, or nothing."""
    if data in EMBEDDED:
        return {}
    path = Path(data).expanduser()
    if path.exists():
        return {"train_files": [str(path)]}
    if is_local(data) or path.suffix in TABLE_FORMATS.keys() | TEXT_SUFFIXES | {".gz"}:
        raise FileNotFoundError(
            f"`data` must be a file or a folder that exists: {no_such_path(data)}"
        )
    if close := get_close_matches(data.lower(), ["stdlib"], 1, 0.7):
        raise DesignError(f"`data` {data!r} is unknown; did you mean `{close[0]}`?", "data")
    return {"dataset_name": data}


def _split(given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the data arguments and the training arguments."""
    names = {field.name for field in fields(PretrainingData)}
    values = USUAL | given
    return {name: values.pop(name) for name in list(values) if name in names}, values


@contextmanager
def _naming_training() -> Iterator[None]:
    """Convert errors of the arguments to a `DesignError` about `training`."""
    try:
        yield
    except DesignError:
        raise
    except (TypeError, ValueError) as error:
        raise DesignError(f"`training`: {' '.join(str(error).split())}", "training") from error


def check_training(training: Mapping[str, Any]) -> dict[str, Any]:
    """Return `training` of a design with values of the right types.

    Raise `DesignError` if an argument is wrong.
    """
    for name in training:
        if name in TAKEN:
            raise DesignError(
                f"`training.{name}` is set by {TAKEN[name]}. Leave it out.", f"training.{name}"
            )
        if name not in HINTS:
            hint = known_words(name, HINTS)
            raise DesignError(f"`training.{name}` is unknown{hint}", f"training.{name}")
    return {name: _typed(name, value) for name, value in training.items()}


def _typed(name: str, value: Any) -> Any:
    """Convert an argument to its annotated type, if that type is simple."""
    hint = HINTS[name]
    if name == "exit_weights" and isinstance(value, (list, tuple)):
        value = ",".join(map(str, value))
    if value is False and "no" in CHOICES.get(name, ()):
        value = "no"  # YAML reads `no` as false
    simple = {str, int, float, bool, types.NoneType}
    if not {*(typing.get_args(hint) or (hint,))} <= simple:
        return value
    field = f"training.{name}"
    try:
        value = FIELDS.convert(value, hint)
    except TypeError as error:
        raise DesignError(f"`{field}` must be {error}, got {value!r}.", field) from None
    if name == "per_device_train_batch_size" and value < 1:
        raise DesignError(f"`{field}` must be 1 or more, got {value}.", field)
    return value


def prepared(args: PretrainingData, plan: RunPlan, data_print: str = "") -> PackedData:
    """Return the data of a run, cut to a whole number of batches.

    Raises:
        CorpusChangedError: If the fingerprint of the data is not `data_print`.
        DataError: If the tokenizer has more tokens than the design, or if the data do not fill one
            batch.
    """
    data, vocab_size, found = corpus(args)
    if data_print and found != data_print:
        raise CorpusChangedError(
            f"The data `{data.name}` have changed since this sweep began (fingerprint {found}, was "
            f"{data_print}). Restore the old data, or use another folder for a new sweep."
        )
    planned = plan.backbone["vocab_size"]
    if vocab_size > planned:
        raise DataError(
            f"`vocab_size` of the design must be at least {vocab_size}, as in the tokenizer, got "
            f"{planned}."
        )
    if not isinstance(data.train, Dataset):
        return data
    # without this cut, the last batch would have fewer tokens than planned
    whole = len(data.train) // plan.batch_sequences * plan.batch_sequences
    if not whole:
        raise DataError(
            f"The data `{data.name}` must fill one batch of {plan.batch_sequences} sequences, got "
            f"{len(data.train)}."
        )
    return replace(data, train=data.train.select(range(whole)))


def corpus(args: PretrainingData) -> tuple[PackedData, int, str]:
    """Return data, vocabulary size and fingerprint. A process reads the data only once."""
    return _corpus(json.dumps(asdict(args), sort_keys=True))


@lru_cache(maxsize=4)
def _corpus(fields: str) -> tuple[PackedData, int, str]:
    data, tokenizer = prepare_data(PretrainingData(**json.loads(fields)))
    return data, len(tokenizer), _fingerprint(data)


def _fingerprint(data: PackedData) -> str:
    """Return a hash of the training and evaluation tokens.

    If the training data are a stream, hash only the evaluation tokens.
    """
    state = hashlib.sha256()
    for split in (data.eval, data.train):
        if isinstance(split, Dataset):
            state.update(len(split).to_bytes(8, "big"))
            for chunk in split.data.column("input_ids").chunks:
                state.update(chunk.flatten().to_numpy(zero_copy_only=False))
    return state.hexdigest()[:16]
