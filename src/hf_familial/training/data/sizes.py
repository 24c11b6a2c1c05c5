"""How much text there is, known without reading it."""

import sysconfig
from pathlib import Path

from .arguments import DataArguments
from .corpus import stdlib_files
from .documents import find_files


# bytes of text for a byte of a compressed file, about
COMPRESSED = {".gz": 4.0, ".parquet": 2.5}


def text_bytes(args: DataArguments) -> float | None:
    """Estimate the bytes of text to train on from the sizes of files.

    Args:
        args (`DataArguments`): Source and bounds.

    Returns:
        `float`, or `None` for a dataset of the Hub without `max_train_bytes`.

    Raises:
        FileNotFoundError: If a file does not exist.
        EmptyCorpusError: If a folder holds no file that can be read.
    """
    found: float | None = None
    if args.train_files:
        found = sum(_bytes_of(path) for path in find_files(args.train_files))
    elif args.dataset_name is None:
        root = Path(sysconfig.get_path("stdlib"))
        found = sum(path.stat().st_size for path in stdlib_files(root))
    if found is not None and args.eval_files is None:
        found *= 1 - args.eval_fraction
    bounds = [bound for bound in (found, args.max_train_bytes) if bound is not None]
    return min(bounds, default=None)


def _bytes_of(path: Path) -> float:
    return path.stat().st_size * COMPRESSED.get(path.suffix.lower(), 1.0)
