"""Preparation of a corpus: load it, tokenise it, and pack it into blocks for a Trainer."""

import logging
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ...errors import DataError
from ...paths import check_model_place, check_output_folder, is_local, no_such_path
from ._cache import resolve_cache_dir
from .arguments import DataArguments
from .corpus import Documents, find_files, load_corpus
from .packing import pack_documents
from .tokenization import load_or_train_tokenizer


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PackedData:
    """Data for a Trainer: blocks for training and evaluation, columns `input_ids` and `labels`.

    A loss in nats per token is `loss / ln(2) / eval_bytes_per_token` bits per byte.
    """

    train: Documents  # lazy when streaming
    eval: Dataset  # never lazy
    train_tokens: int | None  # tokens in the train blocks; None when streaming
    train_dropped_tokens: int | None  # tokens after the last train block; None when streaming
    eval_tokens: int  # tokens in the eval blocks
    eval_dropped_tokens: int  # tokens that were read but are not in an eval block
    eval_bytes_per_token: float  # mean UTF-8 bytes per token; an end-of-text token has 0 bytes
    name: str  # name of the corpus, for the row of runs.jsonl


def prepare_data(args: DataArguments) -> tuple[PackedData, PreTrainedTokenizerBase]:
    """Load the corpus, load or train the tokenizer, and pack both splits into blocks.

    Call this function in every process of a launch. The first process of each machine writes the
    caches, while the others wait. They stop waiting at the timeout of the process group. For a very
    large corpus, run the function once in a single process first, or set `args.streaming`.

    Raises:
        FileNotFoundError: If a file does not exist.
        DataError: If a file is damaged or not UTF-8.
        UnknownFileTypeError: If a file has an unknown type.
        TextColumnError: If the text column is missing or has no strings.
        EmptyCorpusError: If a split has no document, or if it does not fill one block.
        TokenizerError: If the tokenizer has no end-of-text token.

    Example:
        >>> data, tokenizer = prepare_data(DataArguments(train_files=["book.txt"]))
        >>> data.train[0]["input_ids"]
    """
    _check_places(args)
    logger.info("Preparing the text. The first run takes a while, later runs use the cache.")
    corpus = load_corpus(args)
    tokenizer = load_or_train_tokenizer(corpus, args)
    cache_dir = resolve_cache_dir(args.cache_dir)
    train = pack_documents(corpus.train, tokenizer, args.seq_length, cache_dir=cache_dir)
    held_out = pack_documents(
        corpus.eval,
        tokenizer,
        args.seq_length,
        max_tokens=args.max_eval_tokens,
        lazy=False,
        cache_dir=cache_dir,
    )
    assert isinstance(held_out.blocks, Dataset)
    # packing that is not lazy counts the tokens
    assert held_out.num_tokens is not None
    assert held_out.dropped_tokens is not None
    assert held_out.num_bytes is not None
    data = PackedData(
        train.blocks,
        held_out.blocks,
        train.num_tokens,
        train.dropped_tokens,
        held_out.num_tokens,
        held_out.dropped_tokens,
        held_out.num_bytes / held_out.num_tokens,
        corpus.name,
    )
    logger.info(
        "Corpus %s: %s train tokens (%s dropped), %d eval tokens (%d dropped), "
        "%.3f bytes per eval token.",
        data.name,
        data.train_tokens,
        data.train_dropped_tokens,
        data.eval_tokens,
        data.eval_dropped_tokens,
        data.eval_bytes_per_token,
    )
    return data, tokenizer


def _check_places(args: DataArguments) -> None:
    """Check all paths in the arguments before anything is read or downloaded."""
    for names in (args.train_files, args.eval_files):
        for _ in find_files(names or []):
            pass
    if args.tokenizer_name is not None:
        check_model_place("tokenizer_name", args.tokenizer_name)
    name = args.dataset_name
    if name is not None and Path(name).is_file():
        raise DataError(f"`dataset_name` {name!r} is a file. Pass it as `train_files`.")
    if name is not None and not Path(name).exists() and is_local(name):
        raise FileNotFoundError(f"`dataset_name`: {no_such_path(name, 'folder')}")
    check_output_folder("cache_dir", resolve_cache_dir(args.cache_dir))
