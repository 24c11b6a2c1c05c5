"""From a file to its text: compression, encodings, and files that hold no table."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

from ...errors import TableError


KINDS = "runs come as CSV, JSON lines or parquet"

# first bytes -> name, and what undoes it
COMPRESSED: tuple[tuple[bytes, str, Callable[[bytes], bytes]], ...] = (
    (b"\x1f\x8b", "gzip", gzip.decompress),
    (b"BZh", "bzip2", bz2.decompress),
    (b"\xfd7zXZ\x00", "xz", lzma.decompress),
)

# first bytes of files that hold tables which this room does not read, and what to do instead
OTHERS: tuple[tuple[bytes, str], ...] = (
    (b"\xd0\xcf\x11\xe0", "an Excel workbook: save the sheet as CSV"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd: decompress it first (`zstd -d`)"),
    (b"ARROW1", "an Arrow file: save it as parquet or CSV"),
    (b"SQLite format 3", "a database: export the table as CSV"),
    (b"\x93NUMPY", "an array of numpy, without names: save it as CSV with a line of names"),
    (b"%PDF", "a PDF: copy its table into a CSV file"),
)
PAGES = ("<!doctype", "<html", "<table", "<?xml")


def read_content(path: str | os.PathLike[str]) -> bytes:
    """Return the bytes of a file, decompressed if it is compressed.

    Args:
        path (`str` or `os.PathLike`): The file. gzip, bzip2, xz, and zip of one file are undone.

    Raises:
        OSError: If the file cannot be read.
        TableError: If its kind is known and holds no table that can be read.
    """
    content = Path(path).read_bytes()
    for magic, name, undo in COMPRESSED:
        if content.startswith(magic):
            try:
                content = undo(content)
            except (OSError, EOFError, zlib.error, lzma.LZMAError, ValueError):
                raise TableError(f"{path} is broken {name}, or was cut off.") from None
            break
    if content.startswith(b"PK\x03\x04"):
        content = _unzipped(str(path), content)
    for magic, words in OTHERS:
        if content.startswith(magic):
            raise TableError(f"{path} is {words}.")
    return content


def _unzipped(source: str, content: bytes) -> bytes:
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            names = [name for name in archive.namelist() if not name.endswith("/")]
            if any(name.startswith("xl/") for name in names):
                raise TableError(f"{source} is an Excel workbook: save the sheet as CSV.")
            if len(names) != 1:
                raise TableError(f"{source} is a zip of {len(names)} files: unzip it, name one.")
            return archive.read(names[0])
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, zlib.error, EOFError):
        raise TableError(f"{source} is a zip file that cannot be opened: unzip it.") from None


def as_text(source: str, content: bytes) -> tuple[str, str]:
    """Return the text of some bytes, and a note if its encoding is not UTF-8.

    Args:
        source (`str`): Name of the file, for errors.
        content (`bytes`): The bytes.

    Raises:
        TableError: If the bytes are no text, or a web page.
    """
    text, note = _decoded(content)
    if text is None or "\0" in text:
        raise TableError(f"{source} is binary; {KINDS}.")
    if text.lstrip()[:9].lower().startswith(PAGES):
        raise TableError(f"{source} is a web page; {KINDS}.")
    return text, note


def _decoded(content: bytes) -> tuple[str | None, str]:
    wide = content[:2] in (b"\xff\xfe", b"\xfe\xff")
    for encoding in ("utf-16",) if wide else ("utf-8-sig", "cp1252"):
        try:
            text = content.decode(encoding)
        except UnicodeDecodeError:
            continue
        return text, "" if encoding == "utf-8-sig" else f"Read as {encoding}, not UTF-8."
    return None, ""


__all__ = ["TableError", "as_text", "read_content"]
