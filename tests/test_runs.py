"""runs.jsonl: what is written is what is read, whatever happens to the file in between."""

import json
import math
import multiprocessing
from dataclasses import FrozenInstanceError, asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_familial.errors import RunRecordError
from hf_familial.runs import STATUSES, Backbone, RunRecord, append_run, read_runs


RECORD = RunRecord(
    run_id="a",
    N_total=1000,
    N_non_embedding=600,
    N_active=1000,
    D_tokens=4096,
    C_flops=1e19,
    G=2,
    exits=(2, 4),
    loss_mean=3.5,
    loss_exits=(4.0, 3.0),
    loss_final=3.0,
    eval_loss_mean=None,
    eval_loss_exits=None,
    eval_loss_final=None,
    seed=0,
    lr=1e-3,
    batch_tokens=512,
    seq_len=64,
    vocab_size=128,
    data="corpus",
    backbone=Backbone("llama", 32, 4),
    wall_s=2.0,
    tokens_per_s=2048.0,
    code_version="0.1",
    status="finished",
)

# the names that design and fitter agree on
FIELDS = (
    "run_id N_total N_non_embedding N_active D_tokens C_flops G exits loss_mean loss_exits "
    "loss_final eval_loss_mean eval_loss_exits eval_loss_final seed lr batch_tokens seq_len "
    "vocab_size data backbone wall_s tokens_per_s code_version status target_tokens computed_tokens"
)


def records() -> st.SearchStrategy[RunRecord]:
    """Valid records, with every finite loss and every text."""
    counts, losses = st.integers(0, 2**62), st.none() | st.floats(allow_nan=False, width=64)
    finite = losses.map(lambda x: x if x is None or math.isfinite(x) else None)
    sizes = st.floats(0, 1e30)

    def of(exits: list[int]) -> st.SearchStrategy[RunRecord]:
        per_exit = st.none() | st.lists(finite, min_size=len(exits), max_size=len(exits))
        return st.builds(
            RunRecord,
            run_id=st.text(min_size=1),
            **dict.fromkeys(("N_total", "N_non_embedding", "N_active", "D_tokens"), counts),
            G=st.just(len(exits)),
            exits=st.just(tuple(exits)),
            **dict.fromkeys(("loss_mean", "loss_final"), finite),
            **dict.fromkeys(("eval_loss_mean", "eval_loss_final"), finite),
            **dict.fromkeys(("loss_exits", "eval_loss_exits"), per_exit),
            **dict.fromkeys(("target_tokens", "computed_tokens"), st.none() | counts),
            **dict.fromkeys(("seed", "batch_tokens", "seq_len", "vocab_size"), counts),
            **dict.fromkeys(("C_flops", "lr", "wall_s", "tokens_per_s"), sizes),
            backbone=st.builds(Backbone, st.text(), counts, counts),
            **dict.fromkeys(("data", "code_version"), st.text()),
            status=st.sampled_from(STATUSES),
        )

    depths = st.lists(st.integers(1, 200), min_size=1, max_size=6, unique=True)
    return depths.map(sorted).flatmap(of)


def row_of(**changes: Any) -> dict[str, Any]:
    row = json.loads(RECORD.to_json())
    return {name: value for name, value in (row | changes).items() if value is not ...}


def test_the_fields_are_those_of_the_contract() -> None:
    assert list(row_of()) == FIELDS.split()
    with pytest.raises(FrozenInstanceError):
        RECORD.G = 3  # type: ignore[misc]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(records(), max_size=4))
def test_what_is_written_is_read(tmp_path: Path, runs: list[RunRecord]) -> None:
    path = tmp_path / "new" / "folder" / "runs.jsonl"
    path.unlink(missing_ok=True)
    for run in runs:
        append_run(path, run)
    if runs:
        assert read_runs(path) == runs
        assert path.read_bytes().count(b"\n") == len(runs)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_what_json_lacks_becomes_null(tmp_path: Path, wrong: float) -> None:
    path = tmp_path / "runs.jsonl"
    record = replace(RECORD, loss_final=wrong, loss_exits=(1.0, wrong), status="diverged")
    append_run(path, record)
    assert "NaN" not in path.read_text()
    assert "Infinity" not in path.read_text()
    (back,) = read_runs(path)
    assert back == replace(record, loss_final=None, loss_exits=(1.0, None))


@pytest.mark.parametrize("cut", [1, 40, -1])
def test_a_torn_last_line_is_reported_and_left_out(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "runs.jsonl"
    append_run(path, RECORD)
    with path.open("a") as file:
        file.write(RECORD.to_json()[:cut])
    with pytest.warns(UserWarning, match="runs.jsonl, line 2 is incomplete"):
        assert read_runs(path) == [RECORD]
    append_run(path, replace(RECORD, run_id="b"))
    lines = path.read_text().splitlines()
    assert RunRecord.from_dict(json.loads(lines[-1])).run_id == "b"
    with pytest.raises(RunRecordError, match="line 2: not one JSON object") as caught:
        read_runs(path)
    assert (caught.value.line, caught.value.path) == (2, str(path))


def test_a_whole_last_line_needs_no_end(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    path.write_text(f"\n{RECORD.to_json()}")
    assert read_runs(path) == [RECORD]
    append_run(path, RECORD)
    assert read_runs(path) == [RECORD, RECORD]


def _append_many(path: Path, worker: int, count: int) -> None:
    for i in range(count):
        append_run(path, replace(RECORD, run_id=f"{worker}-{i}", data="x" * (1 + 997 * i % 9000)))


def test_processes_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    path, workers, count = tmp_path / "runs.jsonl", 4, 25
    context = multiprocessing.get_context("fork")
    started = [context.Process(target=_append_many, args=(path, w, count)) for w in range(workers)]
    for process in started:
        process.start()
    for process in started:
        process.join()
        assert process.exitcode == 0
    names = [record.run_id for record in read_runs(path)]
    assert sorted(names) == sorted(f"{w}-{i}" for w in range(workers) for i in range(count))


@pytest.mark.parametrize(
    ("changes", "field", "message"),
    [
        ({"N_total": 1.5}, "N_total", "`N_total` must be an integer of 0 or more, got 1.5"),
        ({"seed": True}, "seed", "must be an integer"),
        ({"D_tokens": -1}, "D_tokens", "0 or more, got -1"),
        ({"C_flops": "1e19"}, "C_flops", "must be a number, got '1e19'"),
        ({"C_flops": None}, "C_flops", "must be a number, got None"),
        ({"wall_s": -1.0}, "wall_s", "a finite number of 0 or more"),
        ({"loss_exits": [1.0]}, "loss_exits", "one value for each of G = 2 exits, got \\[1.0\\]"),
        ({"loss_exits": 3.0}, "loss_exits", "must be a list"),
        ({"exits": [2, "4"]}, "exits", "must be a list, each item an integer of 0 or more"),
        ({"exits": [4, 2]}, "exits", "strictly increasing"),
        ({"run_id": ""}, "run_id", "must not be empty"),
        ({"status": "done"}, "status", "one of finished, stopped, diverged, failed, got 'done'"),
        ({"lr": ...}, "lr", "`lr` is missing"),
        ({"extra": 1}, "extra", "`extra` is unknown"),
        ({"backbone": "llama"}, "backbone", "must be an object"),
        ({"backbone": {"model_type": "llama"}}, "backbone.hidden", "is missing"),
        (
            {"backbone": {"model_type": 1, "hidden": 1, "layers": 1}},
            "backbone.model_type",
            "must be a string, got 1",
        ),
    ],
)
def test_a_wrong_row_is_named(
    tmp_path: Path, changes: dict[str, Any], field: str, message: str
) -> None:
    path = tmp_path / "runs.jsonl"
    append_run(path, RECORD)
    with path.open("a") as file:
        file.write(json.dumps(row_of(**changes)) + "\n")
    append_run(path, RECORD)
    with pytest.raises(RunRecordError, match=f"runs.jsonl, line 2: .*{message}") as caught:
        read_runs(path)
    assert (caught.value.field, caught.value.line) == (field, 2)


@pytest.mark.parametrize("line", [b"[1, 2]\n", b"3\n", b"\xff\xfe\n"])
def test_a_line_that_is_no_record_is_named(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "runs.jsonl"
    path.write_bytes(line)
    with pytest.raises(RunRecordError, match="line 1: "):
        read_runs(path)


def test_a_dict_is_no_record(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="must be a RunRecord, got dict"):
        append_run(tmp_path / "runs.jsonl", asdict(RECORD))  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError):
        read_runs(tmp_path / "none.jsonl")


@pytest.mark.parametrize("field", ["N_total", "seed", "C_flops", "loss_mean"])
def test_a_number_of_any_length_is_named_and_breaks_nothing(tmp_path: Path, field: str) -> None:
    path = tmp_path / "runs.jsonl"
    path.write_text(json.dumps(row_of(**{field: 10**400})) + "\n")
    with pytest.raises(RunRecordError, match=f"line 1: `{field}` must be .*below 1e\\+40"):
        read_runs(path)


def test_a_line_nested_too_deeply_is_named(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    path.write_text("[" * 100_000 + "\n" + RECORD.to_json() + "\n")
    with pytest.raises(RunRecordError, match="line 1: not one JSON object"):
        read_runs(path)
