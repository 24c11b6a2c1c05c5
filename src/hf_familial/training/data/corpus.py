"""Corpora: documents to train and evaluate on, from the Hub, from files or from Python itself.

Documents are datasets with one column, `text`.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import logging
import os
import platform
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeAlias

from datasets import Dataset, Features, IterableDataset, Value, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetGenerationError

from ...errors import DataError, EmptyCorpusError, TextColumnError, UnknownFileTypeError
from ...paths import near_path
from ._cache import first_process_first
from .arguments import DataArguments


logger = logging.getLogger(__name__)

Documents: TypeAlias = Dataset | IterableDataset

TEXT_FEATURES = Features({"text": Value("string")})
TABLE_FORMATS = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".parquet": "parquet"}
CHAT_COLUMNS = frozenset({"messages", "conversations", "conversation", "chat"})
TEXT_SUFFIXES = frozenset(
    ".txt .text .md .rst .tex .html .css .py .pyi .c .h .cc .cpp .hpp .cu .rs .go .java .js .ts "
    ".jl .r .rb .lua .sh .sql".split()
)


@dataclass(frozen=True)
class Corpus:
    """Documents to train on, and other documents to evaluate on."""

    train: Documents  # one column, `text`
    eval: Documents  # one column, `text`
    name: str  # short name for the row of runs.jsonl
    description: str  # sentence for a model card


def load_corpus(args: DataArguments) -> Corpus:
    """Load the corpus that `args` selects, split into train and eval documents.

    If there is neither an eval split nor eval files, some documents are held out for evaluation:

    - A hash of the text decides about each document (for the standard library, a hash of its path).
      A document therefore stays in its split when other documents are added or reordered. At least
      one document is held out.
    - A corpus of one document, such as one text file, holds out the last lines.
    - A stream holds out its first `args.stream_eval_documents` documents.

    Raises:
        FileNotFoundError: If a file does not exist.
        DataError: If a file is damaged, not UTF-8, or of an unknown type.
        TextColumnError: If `args.text_column` is missing or has no strings.
        EmptyCorpusError: If a split has no document.

    Example:
        >>> corpus = load_corpus(DataArguments(train_files=["book.txt"]))
        >>> corpus.train[0]["text"]
    """
    with first_process_first():
        if args.dataset_name is not None:
            corpus = _from_dataset(args, args.dataset_name)
        elif args.train_files:
            corpus = _from_files(args, args.train_files)
        else:
            corpus = _from_stdlib(args)
        return _bound(corpus, args.max_train_bytes)


def _from_dataset(args: DataArguments, dataset_name: str) -> Corpus:
    def load(split: str) -> Documents:
        dataset = load_dataset(
            dataset_name,
            args.dataset_config_name,
            split=split,
            streaming=args.streaming,
            cache_dir=_datasets_cache(args),
        )
        return _as_documents(dataset, args.text_column, f"{dataset_name!r}, split {split!r}")

    train = load(args.dataset_train_split)
    held_out = None if args.dataset_eval_split is None else load(args.dataset_eval_split)
    train, held_out = (train, held_out) if held_out is not None else _split(train, args)
    name = "/".join(filter(None, [dataset_name, args.dataset_config_name]))
    return Corpus(train, held_out, name, f"The dataset {name}, split {args.dataset_train_split}.")


def _from_files(args: DataArguments, train_files: list[str]) -> Corpus:
    documents = _read_files(train_files, args)
    if args.eval_files:
        train, held_out = documents, _read_files(args.eval_files, args)
    else:
        train, held_out = _split(documents, args)
    names = [Path(name).name for name in train_files]
    return Corpus(train, held_out, "+".join(names), f"Local files: {', '.join(names)}.")


def _from_stdlib(args: DataArguments) -> Corpus:
    root = Path(sysconfig.get_path("stdlib"))
    files = dict(_stdlib_sources(root))
    key_of: dict[str, str] = {}
    # sorted by hash, so that the first documents are a fair sample of the whole library
    for key in sorted(files, key=_hash_fraction):
        # skip copies of a file, because a copy could be in the other split
        key_of.setdefault(files[key], key)
    texts = Dataset.from_dict({"text": list(key_of)}, features=TEXT_FEATURES)
    train, held_out = _split_by_keys(texts, key_of.values(), args.eval_fraction)
    version = platform.python_version()
    return Corpus(
        train,
        held_out,
        f"python-stdlib-{version}",
        f"Source code of the standard library of Python {version}: {len(texts)} files.",
    )


def stdlib_files(root: Path) -> Iterator[Path]:
    """Yield the source files of Python's standard library in `root`, without installed packages."""
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).parts
        if not {"site-packages", "dist-packages", "__pycache__"}.intersection(parts):
            yield path


def _stdlib_sources(root: Path) -> Iterator[tuple[str, str]]:
    for path in stdlib_files(root):
        try:
            yield path.relative_to(root).as_posix(), path.read_bytes().decode()
        except (UnicodeDecodeError, OSError):
            # a few tests of the library use other encodings on purpose
            continue


def _split(documents: Documents, args: DataArguments) -> tuple[Documents, Documents]:
    if isinstance(documents, IterableDataset):
        size = args.stream_eval_documents
        return documents.skip(size), documents.take(size)
    if len(documents) == 1:
        return _split_by_lines(documents[0]["text"] or "", args.eval_fraction)
    keys = (text or "" for batch in documents.iter(1000) for text in batch["text"])
    return _split_by_keys(documents, keys, args.eval_fraction)


def _split_by_lines(text: str, eval_fraction: float) -> tuple[Dataset, Dataset]:
    """Split one document in two at the end of a line."""
    if not text.strip():
        raise EmptyCorpusError("The corpus must contain text, got one document, which is empty.")
    last = min(round(len(text) * (1 - eval_fraction)), len(text) - 1)
    # the nearest line end before the requested position, or the first one after it
    cut = text.rfind("\n", 0, max(0, last)) + 1 or text.find("\n") + 1
    if cut in (0, len(text)):
        raise EmptyCorpusError(
            "A corpus of one document must have two lines or more to be split into train and eval, "
            "got one line. Each text file is one document. Pass more files, `eval_files`, or a "
            "jsonl file with one document per line."
        )
    kept, held_out = (
        Dataset.from_dict({"text": [part]}, features=TEXT_FEATURES)
        for part in (text[:cut], text[cut:])
    )
    return kept, held_out


def _split_by_keys(
    documents: Dataset, keys: Iterable[str], eval_fraction: float
) -> tuple[Dataset, Dataset]:
    fractions = [_hash_fraction(key) for key in keys]
    if not fractions:
        raise EmptyCorpusError("The corpus must have at least one document, got none.")
    # the document with the lowest hash is always held out, so a small corpus has an eval split too
    bar = max(eval_fraction, min(fractions))
    held_out = [index for index, fraction in enumerate(fractions) if fraction <= bar]
    kept = [index for index, fraction in enumerate(fractions) if fraction > bar]
    if not kept:
        raise EmptyCorpusError(
            f"The corpus has {len(held_out)} documents, and all would be held out for evaluation. "
            "Pass more or other documents, `eval_files` or an eval split."
        )
    return documents.select(kept), documents.select(held_out)


def _hash_fraction(key: str) -> float:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:6], "big") / 2**48


def _bound(corpus: Corpus, max_train_bytes: int | None) -> Corpus:
    train = corpus.train
    if max_train_bytes is not None and isinstance(train, IterableDataset):
        train = IterableDataset.from_generator(
            _within_bytes,
            features=TEXT_FEATURES,
            gen_kwargs={"documents": train, "max_bytes": max_train_bytes},
        )
    elif max_train_bytes is not None:
        train = train.select(range(sum(1 for _ in _within_bytes(train, max_train_bytes))))
    for split, documents in {"train": train, "eval": corpus.eval}.items():
        if isinstance(documents, Dataset) and len(documents) == 0:
            bound = f" within `max_train_bytes` ({max_train_bytes})" if max_train_bytes else ""
            raise EmptyCorpusError(
                f"The {split} split of {corpus.name} must have at least one document{bound}, "
                "got none."
            )
    return Corpus(train, corpus.eval, corpus.name, corpus.description)


def _within_bytes(documents: Documents, max_bytes: int) -> Iterator[dict[str, str]]:
    size = 0
    for text in (row["text"] or "" for row in documents):
        size += len(text.encode())
        if size > max_bytes:
            return
        yield {"text": text}


def iter_texts(documents: Documents, batch_size: int = 1) -> Iterator[list[str]]:
    """Yield the texts of a dataset in lists, without missing texts."""
    for batch in documents.iter(batch_size):
        yield [text for text in batch["text"] if text is not None]


def _read_files(names: list[str], args: DataArguments) -> Documents:
    """Read text, jsonl and parquet files, or folders of them. Text files come first.

    A text file is one document. In a jsonl or parquet file, each row is one document.
    """
    by_format: dict[str, list[str]] = {"text": [], "json": [], "parquet": []}
    for path in find_files(names):
        by_format[_format_of(path)].append(str(path.resolve()))
    parts = [_read_format(name, paths, args) for name, paths in by_format.items() if paths]
    return parts[0] if len(parts) == 1 else concatenate_datasets(parts)


def find_files(names: list[str]) -> Iterator[Path]:
    """Yield the files among `names`, and the files of known types in the folders among `names`."""
    for name in names:
        path = Path(name).expanduser()
        if path.is_dir():
            yield from _files_of(path)
        elif path.is_file():
            yield path
        else:
            near = near_path(name)
            hint = f" Did you mean {near!r}?" if near else ""
            hint = hint or (" Separate several files by spaces." if "," in name else "")
            raise FileNotFoundError(
                f"`train_files` and `eval_files` must exist, got {name!r}.{hint}"
            )


def _files_of(folder: Path) -> list[Path]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    visible = [path for path in files if not _is_hidden(path.relative_to(folder))]
    known = [path for path in visible if _suffix_of(path) in TEXT_SUFFIXES | TABLE_FORMATS.keys()]
    if not known:
        raise EmptyCorpusError(
            f"The folder `{folder}` must contain text, jsonl or parquet files, "
            f"got {len(files)} other files."
        )
    if unknown := len(visible) - len(known):
        logger.warning("%d files in `%s` have an unknown type and are skipped.", unknown, folder)
    return known


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in path.parts)


def _suffix_of(path: Path) -> str:
    return (path.with_suffix("") if path.suffix.lower() == ".gz" else path).suffix.lower()


def _format_of(path: Path) -> str:
    suffix = _suffix_of(path)
    if suffix not in TEXT_SUFFIXES | TABLE_FORMATS.keys():
        raise UnknownFileTypeError(
            f"A file's extension must be one of {sorted(TEXT_SUFFIXES | TABLE_FORMATS.keys())}, "
            f"with or without `.gz` at the end, got {path.name!r}."
        )
    return TABLE_FORMATS.get(suffix, "text")


def _read_format(name: str, paths: list[str], args: DataArguments) -> Documents:
    try:
        if name == "text":
            return _read_text_files(paths, args)
        table = load_dataset(
            name,
            # datasets reads names as patterns, so a name with brackets would match nothing
            data_files=[glob.escape(path) for path in paths],
            split="train",
            streaming=args.streaming,
            cache_dir=_datasets_cache(args),
        )
    except StopIteration:
        raise EmptyCorpusError(
            f"The {name} files must contain documents, but these are empty: {', '.join(paths)}."
        ) from None
    except DatasetGenerationError as error:
        # datasets wraps the errors of a reader; the original message is clearer
        if isinstance(error.__cause__, DataError):
            raise error.__cause__ from None
        reason = error.__cause__ or error
        raise DataError(f"The {name} files {paths} could not be read: {reason}") from error
    return _as_documents(table, args.text_column, f"the {name} files")


def _datasets_cache(args: DataArguments) -> str | None:
    return None if args.cache_dir is None else str(Path(args.cache_dir).expanduser() / "datasets")


def _read_text_files(paths: list[str], args: DataArguments) -> Documents:
    if args.streaming:
        return IterableDataset.from_generator(
            _stream_text_files, features=TEXT_FEATURES, gen_kwargs={"paths": paths}
        )
    # the cache key of datasets includes sizes and times, so an edited file is read again
    stamps = [(os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in paths]
    return Dataset.from_generator(
        _stream_text_files,
        features=TEXT_FEATURES,
        cache_dir=_datasets_cache(args),
        gen_kwargs={"paths": tuple(paths), "stamps": tuple(stamps)},
    )


def _stream_text_files(paths: Iterable[str], stamps: object = None) -> Iterator[dict[str, str]]:
    for path in paths:
        with gzip.open(path) if path.lower().endswith(".gz") else open(path, "rb") as file:
            data: bytes = file.read()
        try:
            yield {"text": data.decode()}
        except UnicodeDecodeError as error:
            raise DataError(f"Text files must be UTF-8, got `{path}`: {error}.") from None


def _as_documents(dataset: Documents, text_column: str, origin: str) -> Documents:
    """Return a dataset with the text column only, renamed to `text`.

    `origin` describes the dataset in error messages.
    """
    types = _column_types(dataset, origin)
    if text_column not in types:
        close = get_close_matches(text_column, list(types), 1)
        hint = f" Did you mean {close[0]!r}?" if close else _chat_hint(types)
        raise TextColumnError(
            f"`text_column` must name a column of {origin}, got {text_column!r}. "
            f"The columns are {sorted(types)}.{hint}"
        )
    if types[text_column] not in {"str", "string", "large_string", "null"}:
        raise TextColumnError(
            f"`text_column` must contain strings, got {text_column!r} of {origin}, "
            f"which contains {types[text_column]}.{_chat_hint(types)}"
        )
    dataset = dataset.select_columns([text_column])
    if text_column != "text":
        dataset = dataset.rename_column(text_column, "text")
    return dataset.cast(TEXT_FEATURES) if dataset.features != TEXT_FEATURES else dataset


def _chat_hint(columns: Iterable[str]) -> str:
    """Return what to do with chats, if a column has a usual name of chats."""
    if CHAT_COLUMNS.isdisjoint(columns):
        return ""
    return (
        " To train on chats, use `multi_exit(SFTTrainer)`. Text columns are read as plain text, "
        "so special tokens such as `<|im_start|>` in them would be split."
    )


def _column_types(dataset: Documents, origin: str) -> dict[str, str]:
    if dataset.features is not None:
        features: dict[str, Any] = dataset.features
        return {name: str(getattr(feature, "dtype", feature)) for name, feature in features.items()}
    row = next(iter(dataset), None)
    if row is None:
        raise EmptyCorpusError(f"{origin} must have at least one document, got an empty stream.")
    # a missing text does not show the type of its column
    return {name: "null" if value is None else type(value).__name__ for name, value in row.items()}
