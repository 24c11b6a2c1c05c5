"""The data of a sweep: prepared once in a process, and known again by a fingerprint."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from functools import lru_cache

from datasets import Dataset

from ...errors import CorpusChangedError, DataError
from ...training.data import PackedData, prepare_data
from ...training.pretraining import PretrainingData
from ..design.plans import RunPlan


def prepared(args: PretrainingData, plan: RunPlan, data_print: str = "") -> PackedData:
    """The data of a run, cut so that every pass over them is a whole number of batches.

    Args:
        args ([`PretrainingData`]): Of the run.
        plan ([`RunPlan`]): The run.
        data_print (`str`, *optional*): Fingerprint that the data must have.

    Returns:
        [`PackedData`]

    Raises:
        CorpusChangedError: If the fingerprint is another one.
        DataError: If the tokenizer does not fit the design, or the data do not fill a batch.
    """
    data, vocab_size, found = corpus(args)
    if data_print and found != data_print:
        raise CorpusChangedError(
            f"the data `{data.name}` are not what this sweep began with (fingerprint {found}, was "
            f"{data_print}): bring them back, or choose another folder for a new sweep."
        )
    planned = plan.backbone["vocab_size"]
    if vocab_size > planned:
        raise DataError(
            f"`vocab_size` of the design must be at least that of the tokenizer, {vocab_size}, got "
            f"{planned}."
        )
    if not isinstance(data.train, Dataset):
        return data
    # a last, smaller batch would train on fewer tokens than its step is planned with
    whole = len(data.train) // plan.batch_sequences * plan.batch_sequences
    if not whole:
        raise DataError(
            f"the data `{data.name}` must fill one batch of {plan.batch_sequences} sequences, they "
            f"have {len(data.train)}."
        )
    return replace(data, train=data.train.select(range(whole)))


def corpus(args: PretrainingData) -> tuple[PackedData, int, str]:
    """The data, the size of their vocabulary, and their fingerprint; read once in a process.

    Raises:
        OSError: If a file cannot be read.
        DataError: If the data cannot be used.
    """
    return _corpus(json.dumps(asdict(args), sort_keys=True))


@lru_cache(maxsize=4)
def _corpus(fields: str) -> tuple[PackedData, int, str]:
    data, tokenizer = prepare_data(PretrainingData(**json.loads(fields)))
    return data, len(tokenizer), fingerprint(data)


def fingerprint(data: PackedData) -> str:
    """Hash of the tokens to train and to evaluate on; of a stream, of the latter alone.

    Args:
        data ([`PackedData`]): The data.

    Returns:
        `str`: 16 hexadecimal digits.
    """
    state = hashlib.sha256()
    for split in (data.eval, data.train):
        if isinstance(split, Dataset):
            state.update(len(split).to_bytes(8, "big"))
            for chunk in split.data.column("input_ids").chunks:
                state.update(chunk.flatten().to_numpy(zero_copy_only=False))
    return state.hexdigest()[:16]
