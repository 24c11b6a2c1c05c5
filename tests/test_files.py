"""Files that are whole or absent, lines that are whole, digests; folders: hub/test_crashes.py."""

import errno
import hashlib
import os

import pytest

from hf_familial._files import append_lines, digest, file_digest, write_whole


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "a" / "b.txt"
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        write_whole(path, "x")
    write_whole(path, "é", parents=True)
    write_whole(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(path.parent) == ["b.txt"]


def test_a_failure_leaves_what_was_there_and_keeps_its_number(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_whole(path, "old")

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"cannot write .*a\.txt: No space left") as caught:
        write_whole(path, "new")
    assert caught.value.errno == errno.ENOSPC
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_torn_line_is_ended_before_the_next(tmp_path):
    path = tmp_path / "a.jsonl"
    append_lines(path, ["1", "2"])
    path.write_bytes(path.read_bytes() + b"to")
    append_lines(path, [])
    append_lines(path, ["3"])
    assert path.read_bytes() == b"1\n2\nto\n3\n"


def test_digests(tmp_path):
    assert digest(["ab", "c"]) != digest(["a", "bc"])
    assert digest(["ab"]) == digest([b"ab"])
    path = tmp_path / "a"
    path.write_bytes(b"data")
    assert file_digest(path) == hashlib.sha256(b"data").hexdigest()
    assert file_digest(path, b"start", "sha1") == hashlib.sha1(b"startdata").hexdigest()
