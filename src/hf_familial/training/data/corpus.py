"""The corpus: train and eval documents from the Hub, from files, or from Python itself."""

import hashlib
import platform
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset, IterableDataset, load_dataset

from ...errors import EmptyCorpusError
from .arguments import DataArguments
from .cache import first_process_first
from .documents import (
    TEXT_FEATURES,
    Documents,
    as_documents,
    datasets_cache_dir,
    read_files,
)


@dataclass(frozen=True)
class Corpus:
    """Documents to train and to evaluate on, disjoint.

    Args:
        train (`datasets.Dataset` or `datasets.IterableDataset`): One column, `text`.
        eval (`datasets.Dataset` or `datasets.IterableDataset`): One column, `text`.
        name (`str`): Short, for the record of a run.
        description (`str`): A sentence, for a model card.
    """

    train: Documents
    eval: Documents
    name: str
    description: str


def load_corpus(args: DataArguments) -> Corpus:
    """Load the corpus that the arguments name, split into train and eval documents.

    Without an eval split or eval files a document is held out by a hash of its text (of its
    path, for the standard library), so it stays on its side whatever the order or its
    neighbours; if the hash holds out none, the document of the lowest hash is. Of a single
    document, such as one text file, the last lines are held out. A stream holds out its first
    `args.stream_eval_documents` instead.

    Args:
        args (`DataArguments`): Source, split and bounds.

    Returns:
        `Corpus`, whose splits are `datasets.IterableDataset` with `args.streaming`.

    Raises:
        FileNotFoundError: If a file does not exist.
        UnknownFileTypeError: If a file is neither text nor a table.
        TextColumnError: If there is no `args.text_column`.
        EmptyCorpusError: If a split has no document.
        DataError: If a file is damaged or not UTF-8.
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
            cache_dir=datasets_cache_dir(args),
        )
        return as_documents(dataset, args.text_column, f"{dataset_name!r}, split {split!r}")

    train = load(args.dataset_train_split)
    held_out = None if args.dataset_eval_split is None else load(args.dataset_eval_split)
    train, held_out = (train, held_out) if held_out is not None else _split(train, args)
    name = "/".join(filter(None, [dataset_name, args.dataset_config_name]))
    return Corpus(train, held_out, name, f"The dataset {name}, split {args.dataset_train_split}.")


def _from_files(args: DataArguments, train_files: list[str]) -> Corpus:
    documents = read_files(train_files, args)
    if args.eval_files:
        train, held_out = documents, read_files(args.eval_files, args)
    else:
        train, held_out = _split(documents, args)
    names = [Path(name).name for name in train_files]
    return Corpus(train, held_out, "+".join(names), f"Local files: {', '.join(names)}.")


def _from_stdlib(args: DataArguments) -> Corpus:
    root = Path(sysconfig.get_path("stdlib"))
    files = dict(_stdlib_sources(root))
    key_of: dict[str, str] = {}
    # in order of hash, so that any prefix is a fair sample of the whole library
    for key in sorted(files, key=_hash_fraction):
        # the first of equal files alone, or copies would stand on both sides
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
    """Find the source files of Python's standard library.

    Args:
        root (`pathlib.Path`): Its folder.

    Yields:
        `pathlib.Path`: Each file, installed packages aside.
    """
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).parts
        if not {"site-packages", "dist-packages", "__pycache__"}.intersection(parts):
            yield path


def _stdlib_sources(root: Path) -> Iterator[tuple[str, str]]:
    for path in stdlib_files(root):
        try:
            yield path.relative_to(root).as_posix(), path.read_bytes().decode()
        except (UnicodeDecodeError, OSError):
            # a few of the library's own tests are written in other encodings on purpose
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
    """One document as two: what stands before the end of a line, and what is held out after it."""
    if not text.strip():
        raise EmptyCorpusError("A corpus must hold text, got one document, which is empty.")
    last = min(round(len(text) * (1 - eval_fraction)), len(text) - 1)
    # the nearest line end before the place asked for, or the first behind it
    cut = text.rfind("\n", 0, max(0, last)) + 1 or text.find("\n") + 1
    if cut in (0, len(text)):
        raise EmptyCorpusError(
            "A corpus of one document must have two lines or more to be split into train and eval, "
            "got one line. A text file is one document: give more files, `eval_files`, or a jsonl "
            "file, of which each line is a document."
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
        raise EmptyCorpusError("A corpus must hold at least one document, got none.")
    # the lowest hash is held out in any case, so a small corpus has an eval split too
    bar = max(eval_fraction, min(fractions))
    held_out = [index for index, fraction in enumerate(fractions) if fraction <= bar]
    kept = [index for index, fraction in enumerate(fractions) if fraction > bar]
    if not kept:
        raise EmptyCorpusError(
            "A corpus must hold different documents to be split into train and eval, got "
            f"{len(held_out)}, all held out; give others, `eval_files` or an eval split."
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
                f"The {split} split of {corpus.name} must hold at least one document{bound}, "
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
