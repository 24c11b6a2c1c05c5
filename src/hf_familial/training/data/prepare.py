"""From the user's arguments to blocks ready for a Trainer."""

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
    """Blocks to train and to evaluate on, columns `input_ids` and `labels`.

    The loss in bits per byte is `loss / ln(2) / eval_bytes_per_token`, the loss in nats per token.
    """

    train: Documents  # lazy when streaming
    eval: Dataset  # always in full
    train_tokens: int | None  # tokens in the train blocks; None when streaming
    train_dropped_tokens: int | None  # tokens left over after the last train block
    eval_tokens: int  # tokens in the eval blocks
    eval_dropped_tokens: int  # tokens read but not in an eval block
    eval_bytes_per_token: float  # UTF-8 bytes of text; an end of text is a token of no bytes
    name: str  # name of the corpus, for the record of a run


def prepare_data(args: DataArguments) -> tuple[PackedData, PreTrainedTokenizerBase]:
    """Load the corpus, load or train the tokenizer, and pack both splits.

    Call it in every process of a launch: the first one of each machine writes the caches, the
    others wait and read. Their patience is the process group's timeout, so prepare a very large
    corpus once in a single process, or stream it.

    Raises:
        FileNotFoundError: If a file does not exist.
        DataError: If a file is damaged, not UTF-8 or of unknown type (`UnknownFileTypeError`), a
            column is missing (`TextColumnError`), a split has no document or does not fill one
            block (`EmptyCorpusError`), or the tokenizer has no end-of-text token
            (`TokenizerError`).
    """
    _check_places(args)
    logger.info("Preparing the text, which is kept for the next run; the first time takes a while.")
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
    # a pack that is not lazy has its counts
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
    """Check every place that the arguments name, before anything is read or downloaded."""
    for names in (args.train_files, args.eval_files):
        for _ in find_files(names or []):
            pass
    if args.tokenizer_name is not None:
        check_model_place("tokenizer_name", args.tokenizer_name)
    name = args.dataset_name
    if name is not None and Path(name).is_file():
        raise DataError(f"`dataset_name` {name!r} is a file: give it as `train_files`.")
    if name is not None and not Path(name).exists() and is_local(name):
        raise FileNotFoundError(f"`dataset_name`: {no_such_path(name, 'folder')}")
    check_output_folder("cache_dir", resolve_cache_dir(args.cache_dir))
