"""Tables of runs: every kind of file, names of columns, choices, and rows that are no runs."""

import json
import math

import numpy as np
import pytest

from hf_familial.errors import TableError
from hf_familial.runs import Backbone, RunRecord, append_run
from hf_familial.scaling import get_law
from hf_familial.scaling.tables._files import read_table
from hf_familial.scaling.tables.load import ColumnChoice, load_runs


DENSE, FAMILIAL = get_law("hoffmann"), get_law("familial")
ROWS = [
    {"N": 1e8, "D": 2e9, "C": 1.2e18, "G": 1, "loss": 3.1},
    {"N": 2e8, "D": 2e9, "C": 2.4e18, "G": 2, "loss": 2.9},
    {"N": 4e8, "D": 1e9, "C": 2.4e18, "G": 4, "loss": 2.8},
]


def record(i, **choices):
    """A line of runs.jsonl."""
    losses = (3.0 + 0.1 * i, 2.8 + 0.1 * i)
    fields = {
        "run_id": f"run-{i}",
        "N_total": 1_000_000 * (i + 1),
        "N_non_embedding": 800_000 * (i + 1),
        "N_active": 900_000 * (i + 1),
        "D_tokens": 5_000_000,
        "C_flops": 7e6 * (i + 1) * 5e6,
        "G": 2,
        "exits": (1, 4),
        "loss_mean": sum(losses) / 2,
        "loss_exits": losses,
        "loss_final": losses[-1],
        "eval_loss_mean": sum(losses) / 2 + 1,
        "eval_loss_exits": tuple(loss + 1 for loss in losses),
        "eval_loss_final": losses[-1] + 1,
        "seed": i,
        "lr": 1e-3,
        "batch_tokens": 100,
        "seq_len": 10,
        "vocab_size": 50,
        "data": "text",
        "backbone": Backbone("llama", 8, 4),
        "wall_s": 1.0,
        "tokens_per_s": 5000.0,
        "code_version": "1",
        "status": "finished",
    }
    return RunRecord(**(fields | choices))


@pytest.fixture
def runs(tmp_path):
    """Writes records to a runs.jsonl as training does, then further lines as they are."""

    def write(*records, tail=""):
        path = tmp_path / "runs.jsonl"
        for one in records:
            append_run(path, one)
        with path.open("a") as file:
            file.write(tail)
        return path

    return write


def written(folder, kind, rows=ROWS):
    path = folder / f"table.{kind}"
    names = list(rows[0])
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "json":
        path.write_text(json.dumps(rows, indent=1))
    elif kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        mark = {"csv": ",", "tsv": "\t", "ssv": ";"}[kind]
        lines = [mark.join(names), *(mark.join(str(row[n]) for n in names) for row in rows)]
        path.write_bytes(("\ufeff" + "\r\n".join(lines)).encode())
    return path


@pytest.mark.parametrize("kind", ["csv", "tsv", "ssv", "jsonl", "json", "parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, kind):
    table = read_table(written(tmp_path, kind))
    assert list(table.columns) == list(ROWS[0])
    assert {n: list(v) for n, v in table.columns.items()} == {
        name: [row[name] for row in ROWS] for name in ROWS[0]
    }
    assert table.notes == ()
    reading = load_runs(written(tmp_path, kind), FAMILIAL)
    assert reading.data.loss.tolist() == [3.1, 2.9, 2.8]
    assert reading.data.columns["G"].tolist() == [1, 2, 4]


def test_the_kind_is_in_the_bytes_not_in_the_name(tmp_path):
    path = written(tmp_path, "jsonl").rename(tmp_path / "runs.csv")
    assert len(read_table(path)) == 3


def test_lines_that_are_no_rows_are_named(tmp_path):
    path = tmp_path / "runs.jsonl"
    path.write_text('{"N": 1}\n\n{"N": 2\n[3]\n{"N": 4}\n{"N"')
    table = read_table(path)
    assert list(table.columns["N"]) == [1, 4]
    assert table.lines == (1, 5)
    assert table.notes == ("Lines 3, 4, 6 were left out: expected one JSON object.",)


def test_a_quote_left_open_costs_its_own_line_only(tmp_path):
    path = tmp_path / "runs.csv"
    path.write_text('N,D,loss\n1,2,3\n4,"5,6\n7,8,9\n1,2\n')
    table = read_table(path)
    assert list(table.columns["N"]) == [1, 7]
    assert table.notes == ("Lines 3, 5 were left out: expected 3 cells.",)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"\x89PNG\r\n\x1a\n\0\0", "is a binary file. Save the runs as CSV, JSON lines or parquet"),
        (bytes(range(128, 256)), "is a binary file"),
        (b"PAR1 and no more", "is a damaged parquet file"),
        (b"N,D,loss\n", "has no rows"),
        (b"1,2,3\n4,5,6\n", "must have column names in its first line, got 1, 2, 3"),
        (b"N,D,N\n4,5,6\n", "has two columns with the name N"),
        (b'{"law": "hoffmann",\n "fit": {}}', "is one JSON object with law, fit"),
        (b"[1, 2", "is not JSON"),
        (b"[1, 2]", "has no rows. Items 1, 2 were left out: expected an object"),
        (b"{\n{\n", "has no rows. Lines 1, 2 were left out"),
    ],
)
def test_what_is_no_table_is_refused(tmp_path, content, match):
    path = tmp_path / "runs"
    path.write_bytes(content)
    with pytest.raises(TableError, match=match):
        read_table(path)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(OSError, match="absent"):
        read_table(tmp_path / "absent.csv")


# columns


def test_names_people_use(tmp_path):
    path = tmp_path / "svg.csv"
    path.write_text("x,Model Size,Training FLOP,hex,loss\n1,1e9,6e19,#fff,2.5\n2,2e9,6e19,#000,2\n")
    reading = load_runs(path, DENSE)
    assert reading.data.columns["D"].tolist() == [1e10, 5e9]
    assert dict(reading.columns) == {
        "loss": "loss",
        "N": "Model Size",
        "C": "Training FLOP",
        "D": "C / (6 N)",
    }
    assert reading.notes == ("D is not in the file, so D = C / (6 N).",)


def test_a_mapping_goes_before_every_guess(tmp_path):
    path = tmp_path / "runs.csv"
    path.write_text("N,width,D,loss,nll\n1e6,1e7,5e7,2,3\n2e6,2e7,7e7,3,4\n")
    choice = ColumnChoice(columns={"N": "width", "loss": "nll"})
    data = load_runs(path, DENSE, choice).data
    assert data.columns["N"].tolist() == [1e7, 2e7]
    assert data.loss.tolist() == [3, 4]
    message = "no column 'depth' for N. Its columns are N, width, D, loss, nll"
    with pytest.raises(TableError, match=message):
        load_runs(path, DENSE, ColumnChoice(columns={"N": "depth"}))


def test_what_is_missing_is_named_with_what_is_there(tmp_path):
    path = tmp_path / "runs.csv"
    path.write_text("size,loss\n1,2\n")
    with pytest.raises(
        TableError,
        match=r"no column for D, G. Its columns are size, loss. Name one with `--column D=COLUMN`",
    ):
        load_runs(path, FAMILIAL)
    path.write_text("N,D,loss\nsmall,2e9,3\nlarge,2e9,3\n")
    with pytest.raises(
        TableError, match="has no number in 'N', the column used for N: 'small', 'large'"
    ):
        load_runs(path, DENSE)
    path.write_text("N,D\n1,2\n")
    with pytest.raises(
        TableError, match="no loss 'mean'. Its columns are N, D. Choose mean, final"
    ):
        load_runs(path, DENSE)


@pytest.mark.parametrize(
    ("choice", "n", "loss"),
    [
        (ColumnChoice(), 1e6, 2.9),
        (ColumnChoice(size="non_embedding", loss="final"), 8e5, 2.8),
        (ColumnChoice(size="active", loss="exit0"), 9e5, 3.0),
        (ColumnChoice(loss="exit 1"), 1e6, 2.8),
        (ColumnChoice(loss="eval_mean"), 1e6, 3.9),
        (ColumnChoice(loss="eval_exit0"), 1e6, 4.0),
        (ColumnChoice(loss="eval_final"), 1e6, 3.8),
        (ColumnChoice(loss="eval_loss_final"), 1e6, 3.8),
    ],
)
def test_choices_of_runs_jsonl(runs, choice, n, loss):
    data = load_runs(runs(record(0), record(1)), FAMILIAL, choice).data
    assert data.columns["N"][0] == n
    assert data.loss[0] == pytest.approx(loss)
    assert data.columns["C"][0] == 7e6 * 5e6
    assert data.run_names == ("run-0", "run-1")


@pytest.mark.parametrize(
    ("choice", "match"),
    [
        (ColumnChoice(size="all"), "`size` must be total, non_embedding or active, got 'all'"),
        (ColumnChoice(loss="median"), "no loss 'median'. Its columns are run_id, "),
    ],
)
def test_choices_that_are_not_offered(runs, choice, match):
    with pytest.raises(TableError, match=match):
        load_runs(runs(record(0)), DENSE, choice)


def test_runs_that_do_not_count_are_named(runs):
    again = record(1, loss_mean=2.5)
    path = runs(
        record(0),
        record(1),
        record(2, status="failed", loss_mean=None),
        record(3, loss_mean=math.nan),
        record(4, status="diverged"),
        again,
        tail='{"run_id": "torn',
    )
    reading = load_runs(path, FAMILIAL)
    assert reading.found == 6
    assert reading.data.run_names == ("run-0", "run-1")
    assert reading.data.loss.tolist() == [pytest.approx(2.9), 2.5]
    assert reading.notes == (
        "Line 7 was left out: expected one JSON object.",
        "Line 3 was left out: the status is failed.",
        "Line 5 was left out: the status is diverged.",
        "Line 2 was left out: the same run appears again later.",
        "Line 4 was left out: a number is missing.",
    )
    kept = load_runs(path, DENSE, ColumnChoice(statuses=("finished", "diverged"))).data
    assert kept.run_names == ("run-0", "run-4", "run-1")
    with pytest.raises(TableError, match="no run with status stopped, only finished, failed, div"):
        load_runs(path, DENSE, ColumnChoice(statuses=("stopped",)))


def test_checkpoints_of_one_run_are_one_cluster(tmp_path):
    path = tmp_path / "runs.csv"
    path.write_text("run_id,N,D,loss\na,1e6,1e7,4\na,1e6,2e7,3\nb,2e6,1e7,3.5\nb,2e6,1e7,3.5\n")
    data = load_runs(path, DENSE).data
    assert data.run_names == ("a", "b")
    assert data.run_id.tolist() == [0, 0, 1]


def test_every_exit_as_a_row(runs):
    reading = load_runs(runs(record(0), record(1)), get_law("branch"), ColumnChoice(loss="exits"))
    data = reading.data
    assert data.loss.tolist() == pytest.approx([3.0, 2.8, 3.1, 2.9])
    assert data.columns["U"].tolist() == [0, 1, 0, 1]
    assert data.columns["V"].tolist() == [1, 0, 1, 0]
    # 200,000 parameters around 800,000 in 4 layers, of which the first exit has one
    assert data.columns["N"].tolist() == [4e5, 1e6, 8e5, 2e6]
    assert data.run_id.tolist() == [0, 0, 1, 1]
    assert reading.columns["N"] == "N_total, layers in proportion to the exit's depth"


def test_what_a_law_cannot_take_is_left_out(tmp_path):
    path = tmp_path / "runs.csv"
    path.write_text(
        "N,D,G,loss\n1e6,1e8,0,4\n1e6,2e8,1,3\n-2e6,1e8,1,3.5\n2e6,x,1,3\n3e6,9e7,2,3\n"
        "3e6,9e7,2,3\n"
    )
    reading = load_runs(path, (DENSE, FAMILIAL))
    assert reading.data.columns["N"].tolist() == [1e6, 3e6]
    assert reading.data.run_names == ("line 3", "line 7")
    assert reading.notes == (
        "C is not in the file, so C = 6 N D.",
        "Line 6 was left out: a later row is the same.",
        "Line 2 was left out: `G` must be >= 1 and finite.",
        "Line 4 was left out: `N` must be > 0 and finite.",
        "Line 5 was left out: a number is missing.",
    )


def test_large_tables_stay_quick_and_whole(tmp_path):
    rows = 30_000
    path = tmp_path / "runs.csv"
    body = "".join(f"{1e8 + i},{1e9 + i},{2 + 1 / (1 + i)}\n" for i in range(rows))
    path.write_text("N,D,loss\n" + body)
    data = load_runs(path, DENSE).data
    assert len(data) == rows
    assert np.array_equal(data.columns["N"], 1e8 + np.arange(rows))
