"""Read files into documents: datasets with one column, `text`."""

import glob
import gzip
import logging
import os
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeAlias

from datasets import (
    Dataset,
    Features,
    IterableDataset,
    Value,
    concatenate_datasets,
    load_dataset,
)
from datasets.exceptions import DatasetGenerationError

from ...errors import DataError, EmptyCorpusError, TextColumnError, UnknownFileTypeError
from ...paths import near_path
from .arguments import DataArguments


logger = logging.getLogger(__name__)

Documents: TypeAlias = Dataset | IterableDataset

TEXT_FEATURES = Features({"text": Value("string")})
TABLE_FORMATS = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".parquet": "parquet"}
TEXT_SUFFIXES = frozenset(
    ".txt .text .md .rst .tex .html .css .py .pyi .c .h .cc .cpp .hpp .cu .rs .go .java .js .ts "
    ".jl .r .rb .lua .sh .sql".split()
)


def read_files(names: list[str], args: DataArguments) -> Documents:
    """Read text, jsonl and parquet files, or folders of them, as documents.

    A text file is one document, byte for byte; a row of a table is one document. A folder is
    searched in sorted order; its hidden files and those of other types are left out.

    Args:
        names (`list[str]`): Files and folders.
        args (`DataArguments`): For `text_column`, `streaming` and `cache_dir`.

    Returns:
        `datasets.Dataset`, or `datasets.IterableDataset` with `args.streaming`, with one column
        `text`: first the text files, then the tables.

    Raises:
        FileNotFoundError: If a name does not exist.
        UnknownFileTypeError: If a file is neither text nor a table.
        EmptyCorpusError: If a folder holds no file that can be read.
        DataError: If a file is damaged or not UTF-8.
        TextColumnError: If a table has no `args.text_column`.
    """
    by_format: dict[str, list[str]] = {"text": [], "json": [], "parquet": []}
    for path in find_files(names):
        by_format[_format_of(path)].append(str(path.resolve()))
    parts = [_read_format(name, paths, args) for name, paths in by_format.items() if paths]
    return parts[0] if len(parts) == 1 else concatenate_datasets(parts)


def as_documents(dataset: Documents, text_column: str, origin: str) -> Documents:
    """Keep the text column alone and call it `text`.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`): Any dataset.
        text_column (`str`): Its column of strings.
        origin (`str`): What to call the dataset in an error.

    Returns:
        The same kind of dataset, with one column `text`.

    Raises:
        TextColumnError: If there is no such column, or it holds no strings.
        EmptyCorpusError: If a stream of unknown columns holds nothing.
    """
    types = _column_types(dataset, origin)
    if text_column not in types:
        raise TextColumnError(
            f"`text_column` must name a column of {origin}, got {text_column!r}; "
            f"its columns are {sorted(types)}.{_hint(text_column, types)}"
        )
    if types[text_column] not in {"str", "string", "large_string", "null"}:
        raise TextColumnError(
            f"`text_column` must hold strings, got {text_column!r} of {origin}, "
            f"which holds {types[text_column]}."
        )
    dataset = dataset.select_columns([text_column])
    if text_column != "text":
        dataset = dataset.rename_column(text_column, "text")
    return dataset.cast(TEXT_FEATURES) if dataset.features != TEXT_FEATURES else dataset


def _hint(text_column: str, types: Iterable[str]) -> str:
    near = get_close_matches(text_column, list(types), 1)
    return f" Did you mean {near[0]!r}?" if near else ""


def iter_texts(documents: Documents, batch_size: int = 1) -> Iterator[list[str]]:
    """Walk over the texts of a dataset, lazily; missing texts are left out.

    Args:
        documents (`datasets.Dataset` or `datasets.IterableDataset`): With a column `text`.
        batch_size (`int`): Rows read at once.

    Yields:
        `list[str]`, at most `batch_size` texts.
    """
    for batch in documents.iter(batch_size):
        yield [text for text in batch["text"] if text is not None]


def find_files(names: list[str]) -> Iterator[Path]:
    """Find the files that names of files and folders stand for; nothing is read.

    Args:
        names (`list[str]`): Files and folders.

    Yields:
        `pathlib.Path`: Each file; of folders those of a known type, in sorted order.

    Raises:
        FileNotFoundError: If a name does not exist.
        EmptyCorpusError: If a folder holds no file that can be read.
    """
    for name in names:
        path = Path(name).expanduser()
        if path.is_dir():
            yield from _files_of(path)
        elif path.is_file():
            yield path
        else:
            near = near_path(name)
            hint = f" Did you mean {near!r}?" if near else ""
            hint = hint or (" Several are separated by spaces." if "," in name else "")
            raise FileNotFoundError(
                f"`train_files` and `eval_files` must exist, got {name!r}.{hint}"
            )


def _files_of(folder: Path) -> Iterable[Path]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    visible = [path for path in files if not _is_hidden(path.relative_to(folder))]
    known = [path for path in visible if _suffix_of(path) in TEXT_SUFFIXES | TABLE_FORMATS.keys()]
    if not known:
        raise EmptyCorpusError(
            f"The folder `{folder}` must hold text, jsonl or parquet files, "
            f"got {len(files)} others."
        )
    if len(known) < len(visible):
        logger.warning(
            "%d files of `%s` are of unknown type and left out.", len(visible) - len(known), folder
        )
    return known


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in path.parts)


def _suffix_of(path: Path) -> str:
    return (path.with_suffix("") if path.suffix.lower() == ".gz" else path).suffix.lower()


def _format_of(path: Path) -> str:
    suffix = _suffix_of(path)
    if suffix in TEXT_SUFFIXES:
        return "text"
    if suffix in TABLE_FORMATS:
        return TABLE_FORMATS[suffix]
    raise UnknownFileTypeError(
        f"A file's extension must be one of {sorted(TEXT_SUFFIXES | TABLE_FORMATS.keys())}, "
        f"`.gz` after it or not, got {path.name!r}."
    )


def _read_format(name: str, paths: list[str], args: DataArguments) -> Documents:
    cache_dir = datasets_cache_dir(args)
    try:
        if name == "text":
            return _read_text_files(paths, args.streaming, cache_dir)
        table = load_dataset(
            name,
            # datasets takes names for patterns: brackets in one would match nothing
            data_files=[glob.escape(path) for path in paths],
            split="train",
            streaming=args.streaming,
            cache_dir=cache_dir,
        )
    except StopIteration:
        raise EmptyCorpusError(
            f"The {name} files must hold documents, got empty {paths}."
        ) from None
    except DatasetGenerationError as error:
        # datasets wraps what a reader says; ours is the better message
        if isinstance(error.__cause__, DataError):
            raise error.__cause__ from None
        raise DataError(f"These {name} files could not be read: {paths}.") from error
    return as_documents(table, args.text_column, f"the {name} files")


def datasets_cache_dir(args: DataArguments) -> str | None:
    """Give the folder for what `datasets` prepares, None for its own default.

    Args:
        args (`DataArguments`): For `cache_dir`.

    Returns:
        `str` or None.
    """
    return None if args.cache_dir is None else str(Path(args.cache_dir).expanduser() / "datasets")


def _read_text_files(paths: list[str], streaming: bool, cache_dir: str | None) -> Documents:
    if streaming:
        return IterableDataset.from_generator(
            _stream_text_files, features=TEXT_FEATURES, gen_kwargs={"paths": paths}
        )
    # sizes and times enter the key of datasets' cache, so an edited file is read again
    stamps = [(os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in paths]
    return Dataset.from_generator(
        _stream_text_files,
        features=TEXT_FEATURES,
        cache_dir=cache_dir,
        gen_kwargs={"paths": tuple(paths), "stamps": tuple(stamps)},
    )


def _stream_text_files(paths: Iterable[str], stamps: object = None) -> Iterator[dict[str, str]]:
    for path in paths:
        with gzip.open(path) if path.lower().endswith(".gz") else open(path, "rb") as file:
            data: bytes = file.read()
        try:
            yield {"text": data.decode()}
        except UnicodeDecodeError as error:
            raise DataError(f"A text file must be UTF-8, got `{path}`: {error}.") from None


def _column_types(dataset: Documents, origin: str) -> dict[str, str]:
    if dataset.features is not None:
        features: dict[str, Any] = dataset.features
        return {name: str(getattr(feature, "dtype", feature)) for name, feature in features.items()}
    row = next(iter(dataset), None)
    if row is None:
        raise EmptyCorpusError(f"{origin} must hold at least one document, got an empty stream.")
    # a missing text says nothing of its column's type
    return {name: "null" if value is None else type(value).__name__ for name, value in row.items()}
