"""An export that fails or is killed leaves nothing that loads, and nothing for ever."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from reference import logits, tiny_family, token_ids
from transformers import AutoModelForCausalLM, LlamaConfig

from hf_familial import FamilialConfig, FamilialForCausalLM, _files
from hf_familial.hub import export_exit


# what an export asks of the system, one by one
CALLS = ("open", "write", "copy_file_range", "sendfile", "fsync", "mkdir", "rename")


@contextmanager
def failing(monkeypatch, at, error):
    """The system call number `at` raises; those before and after it do not. Yields a counter."""
    count = [0]

    def wrap(original):
        def call(*args, **kwargs):
            count[0] += 1
            if count[0] == at:
                raise error
            return original(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, wrap(getattr(os, name)))
        yield count


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    folder = tmp_path_factory.mktemp("family") / "family"
    tiny_family("llama", [1, 2], depth=2).save_pretrained(folder)
    return folder


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize("occupied", [False, True])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_failure_of_any_call_leaves_what_was_there(
    occupied, number, family, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    with failing(monkeypatch, 0, None) as count:
        export_exit(family, 1, tmp_path / "probe", max_shard_size="30KB")
    calls = count[0]
    assert calls > 20
    shutil.rmtree(tmp_path / "probe")
    if occupied:
        export_exit(family, 0, out)
    before = contents(out) if occupied else {}
    failed = 0
    for at in range(1, calls + 4):
        with failing(monkeypatch, at, OSError(number, os.strerror(number))):
            raised = attempt(family, out, occupied)
        assert raised in (None, number)
        failed += raised is not None
        if out.exists() and contents(out) != before:
            # all was written: what failed is the disk's word for it, or to remove the old folder
            AutoModelForCausalLM.from_pretrained(out)
            export_exit(family, 0, out, overwrite=True)
            if not occupied:
                shutil.rmtree(out)
        assert (contents(out) if out.exists() else {}) == before
        assert {p.name for p in tmp_path.iterdir()} <= {"out"}
    assert failed >= calls - 6


def attempt(family, out, overwrite):
    """Export, and tell the number of the error."""
    try:
        export_exit(family, 1, out, max_shard_size="30KB", overwrite=overwrite)
    except OSError as error:
        return error.errno
    return None


def test_a_full_disk_is_told_before_anything_is_written(family, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    model = FamilialForCausalLM.from_pretrained(family)
    for source in (family, model):
        with pytest.raises(OSError, match="MiB are free") as found:
            export_exit(source, 0, tmp_path / "out")
        assert found.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def test_the_message_of_a_failed_write_names_the_file(family, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "copy_file_range", full)
    with pytest.raises(OSError, match=r"No space left on device.*model\.safetensors"):
        export_exit(family, 0, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, RuntimeError])
@pytest.mark.parametrize("source", ["files", "memory"])
def test_an_interrupt_leaves_nothing(error, source, family, tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise error

    target = LlamaConfig if source == "files" else "torch.nn.Module.state_dict"
    model = FamilialForCausalLM.from_pretrained(family) if source == "memory" else family
    if source == "files":
        monkeypatch.setattr(target, "save_pretrained", interrupt)
    else:
        monkeypatch.setattr("transformers.modeling_utils.safe_save_file", interrupt)
    with pytest.raises(error):
        export_exit(model, 0, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_kept_unless_it_is_to_be_replaced(family, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    export_exit(family, 0, out)  # empty: nothing to lose
    kept = contents(out)
    for k, source in ((1, family), (0, FamilialForCausalLM.from_pretrained(family))):
        with pytest.raises(FileExistsError, match="`overwrite=True`"):
            export_exit(source, k, out)
    assert contents(out) == kept
    (out / "mine.txt").write_text("mine")
    assert export_exit(family, 1, out, overwrite=True).depth == 2
    assert not (out / "mine.txt").exists()
    (tmp_path / "file").write_text("a file")
    with pytest.raises(FileExistsError, match="is a file"):
        export_exit(family, 0, tmp_path / "file", overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "out"]


def test_the_current_folder_is_not_replaced(family, tmp_path, monkeypatch):
    """A process that stands in a folder would stand nowhere once another is put in its place."""
    (tmp_path / "here" / "inner").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "inner")
    for out in (".", tmp_path / "here"):
        with pytest.raises(FileExistsError, match="the current folder"):
            export_exit(family, 0, out, overwrite=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["here", "inner"]
    assert export_exit(family, 0, "member").depth == 1


def test_a_family_is_not_replaced_by_its_member(family, tmp_path):
    copied = tmp_path / "all" / "family"
    shutil.copytree(family, copied)
    for out in (copied, tmp_path / "all", copied / "."):
        with pytest.raises(ValueError, match="must not be the folder of the family"):
            export_exit(copied, 0, out, overwrite=True)
    assert contents(copied) == contents(family)
    assert export_exit(copied, 0, copied / "exit_0").depth == 1


def test_out_may_be_a_link(family, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    export_exit(family, 0, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "config.json").is_file()


def test_a_folder_killed_between_its_two_renames_comes_back(family, tmp_path, monkeypatch):
    out = tmp_path / "out"
    export_exit(family, 0, out)
    kept = contents(out)
    os.rename(out, tmp_path / ".out.replaced-0123abcd")
    with pytest.raises(FileExistsError):
        export_exit(family, 1, out)
    assert contents(out) == kept
    assert os.listdir(tmp_path) == ["out"]


def test_leftovers_go_and_what_is_being_written_stays(family, tmp_path):
    left, busy = tmp_path / ".out.writing-0a", tmp_path / ".out.writing-0b"
    for folder in (left, busy, tmp_path / ".other.writing-0c"):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
    lock = _files._lock(busy)
    export_exit(family, 0, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == [".other.writing-0c", ".out.writing-0b", "out"]
    os.close(lock)
    export_exit(family, 1, tmp_path / "out", overwrite=True)
    assert sorted(os.listdir(tmp_path)) == [".other.writing-0c", "out"]


# killed


KILLED = """
import os, sys
sys.path.insert(0, sys.argv[1])
from test_crashes import CALLS
from hf_familial.hub import export_exit
from transformers.models.llama import modeling_llama

family, out, first, last = sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
for at in range(first, last):
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        print(at, os.waitstatus_to_exitcode(status), flush=True)
        # the parent looks, and answers
        sys.stdin.readline()
        continue
    count = [0]

    def wrap(original):
        def call(*args, **kwargs):
            count[0] += 1
            if count[0] == at:
                os._exit(99)
            return original(*args, **kwargs)
        return call

    for name in CALLS:
        setattr(os, name, wrap(getattr(os, name)))
    try:
        export_exit(family, 1, out, max_shard_size="30KB", overwrite=True)
    except BaseException:
        os._exit(1)
    os._exit(0)
"""


def loadable(folder):
    """Whether stock transformers would take a folder for a model."""
    try:
        AutoModelForCausalLM.from_pretrained(folder)
    except Exception:
        return False
    return True


def test_killed_before_any_call_it_leaves_nothing_half(family, tmp_path):
    out = tmp_path / "out"
    right = logits(FamilialForCausalLM.from_pretrained(family), token_ids(), exit_idx=1)
    here = str(Path(__file__).parent)
    command = [sys.executable, "-c", KILLED, here, str(family), str(out), "1", "200"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    killed = 0
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        for line in process.stdout:
            _, status = map(int, line.split())
            assert status in (0, 99), "an export failed that was to be killed"
            whole = out.exists()
            assert whole or status == 99
            if whole:
                loaded = AutoModelForCausalLM.from_pretrained(out)
                assert torch.equal(logits(loaded, token_ids()), right)
                shutil.rmtree(out)
            for hidden in tmp_path.glob(".out.*"):
                finished = (hidden / "config.json").exists()
                # the config comes last: what has none does not load
                assert finished or not loadable(hidden)
            assert len(list(tmp_path.glob(".out.*"))) <= 1, "an earlier leftover stayed"
            killed += status == 99
            if status == 0:
                break
            process.stdin.write("\n")
            process.stdin.flush()
        process.kill()
    assert killed > 20
    export_exit(family, 1, out)
    assert os.listdir(tmp_path) == ["out"]


RANDOMLY = """
import os, sys
from hf_familial.hub import export_exit
from transformers.models.llama import modeling_llama

for line in sys.stdin:
    child = os.fork()
    if not child:
        export_exit(sys.argv[1], 0, sys.argv[2], max_shard_size="5MB", overwrite=True)
        os._exit(0)
    print(child, flush=True)
    sys.stdin.readline()  # until then it is not waited for, and keeps its number
    os.waitpid(child, 0)
    print("over", flush=True)
"""


@pytest.mark.slow
def test_killed_a_hundred_times_at_random_moments(tmp_path):
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4}
    text_config = LlamaConfig(num_hidden_layers=16, vocab_size=32768, **sizes)
    torch.manual_seed(0)
    model = FamilialForCausalLM(FamilialConfig(text_config=text_config, exits=[12, 16])).eval()
    model.save_pretrained(tmp_path / "family")
    right = logits(model, token_ids(), exit_idx=0)
    out, chance, duration = tmp_path / "out", random.Random(0), 0.0
    found = {"nothing": 0, "whole": 0}
    command = [sys.executable, "-c", RANDOMLY, str(tmp_path / "family"), str(out)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        for i in range(101):
            process.stdin.write("\n")
            process.stdin.flush()
            child, start = int(process.stdout.readline()), time.perf_counter()
            if i:  # the first is left alone, to see how long it takes
                time.sleep(chance.uniform(0, 1.2 * duration))
                os.kill(child, signal.SIGKILL)
            process.stdin.write("\n")
            process.stdin.flush()
            process.stdout.readline()
            duration = duration or time.perf_counter() - start
            if out.exists():
                loaded = AutoModelForCausalLM.from_pretrained(out)
                assert torch.equal(logits(loaded, token_ids()), right)
                found["whole"] += 1
                shutil.rmtree(out)
            else:
                found["nothing"] += 1
            for hidden in tmp_path.glob(".out.*"):
                assert (hidden / "config.json").exists() or not loadable(hidden)
            assert len(list(tmp_path.glob(".out.*"))) <= 1
        process.kill()
    export_exit(tmp_path / "family", 0, out)
    assert sorted(os.listdir(tmp_path)) == ["family", "out"]
    assert found["nothing"] > 10, found
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == 12
