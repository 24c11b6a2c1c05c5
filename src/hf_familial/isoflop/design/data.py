"""The data of a design: where they are, and how many tokens they are expected to be."""

from __future__ import annotations

import math
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import DesignError
from ...paths import is_local, no_such_path
from ...training.data import DataArguments
from ...training.data.documents import TABLE_FORMATS, TEXT_SUFFIXES
from ...training.data.sizes import text_bytes


if TYPE_CHECKING:
    from .grid import IsoFlopDesign


EMBEDDED = ("", "stdlib")  # names of the corpus that every machine has


def expected_tokens(design: IsoFlopDesign) -> float | None:
    """Return the tokens of one pass over a design's data, as far as they are known.

    Args:
        design ([`IsoFlopDesign`]): Its `data_tokens` wins over an estimate from sizes of files.

    Returns:
        `float`, or `None` for data that cannot be found here, or that are on the Hub.
    """
    if design.data_tokens:
        return float(design.data_tokens)
    bounds = ("max_train_bytes", "eval_fraction")
    given = {name: design.training[name] for name in bounds if name in design.training}
    try:
        size = text_bytes(DataArguments(**given, **data_source(design.data)))
    except (OSError, TypeError, ValueError):
        return None
    # of a byte-level vocabulary: 2 bytes a token at 512, 3.1 at 4,096, 4.4 at 50,000
    per_token = max(1.0, 0.35 * math.log2(design.vocab_size) - 1.1)
    return None if size is None else size / per_token


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
    if is_local(data) or path.suffix in TABLE_FORMATS.keys() | TEXT_SUFFIXES | {".gz"}:
        raise FileNotFoundError(
            f"`data` must be a file or a folder that exists: {no_such_path(data)}"
        )
    if near_embedded := get_close_matches(data.lower(), ["stdlib"], 1, 0.7):
        raise DesignError(f"`data` {data!r} is unknown; did you mean `{near_embedded[0]}`?", "data")
    return {"dataset_name": data}
