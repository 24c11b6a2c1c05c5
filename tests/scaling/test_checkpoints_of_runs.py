"""Rows of one run: by which column, when it is guessed, and how the user decides."""

import numpy as np
import pytest

from hf_familial.errors import TableError
from hf_familial.scaling import RunTable, fit, get_law
from hf_familial.scaling._covariance import CoefficientCovariance
from hf_familial.scaling.tables.load import ColumnChoice, load_runs


LAW = get_law("hoffmann")
VALUES = {"E": 1.8172, "A": 482.01, "B": 2085.43, "alpha": 0.3478, "beta": 0.3658}
RUNS, STEPS = 8, 12


def rows():
    """Twelve checkpoints of each of eight runs, whose noise they share."""
    noise = np.random.default_rng(3)
    found = []
    for run in range(RUNS):
        size, shared = 1e7 * 2**run, noise.normal(0, 0.003)
        for tokens in np.geomspace(2e9, 8e10, STEPS) * noise.uniform(0.9, 1.1):
            loss = float(LAW.predict(VALUES, N=size, D=tokens)) * np.exp(shared)
            found.append((run, size, tokens, loss))
    return found


@pytest.fixture
def put(tmp_path):
    """Writes a table of checkpoints under a column of labels, or of none."""

    def write(column, label):
        path = tmp_path / "runs.csv"
        head = f"{column},N,D,loss" if column else "N,D,loss"
        lines = [
            ",".join(map(str, ([label(i, run, size)] if column else []) + [size, tokens, loss]))
            for i, (run, size, tokens, loss) in enumerate(rows())
        ]
        path.write_text("\n".join([head, *lines]))
        return path

    return write


def by_run(i, run, size):
    return f"m{run}"


@pytest.mark.parametrize(
    "column", ["run_id", "run", "model", "name", "exp", "Experiment Name", "trial_id", "checkpoint"]
)
def test_rows_that_share_a_name_a_size_and_no_tokens_are_one_run(put, column):
    reading = load_runs(put(column, by_run), LAW)
    assert reading.data.runs == RUNS
    assert reading.columns["run_id"] == column


def test_what_is_guessed_is_said_and_the_user_decides(put):
    path = put("model", lambda i, run, size: f"{size / 1e6:g}M")
    reading = load_runs(path, LAW)
    assert reading.data.runs == RUNS
    assert (
        "96 rows count as checkpoints of 8 runs, named in 'model' (each has one N and several D). "
        "If they are not, pass `--runs-are independent`."
    ) in reading.notes
    alone = load_runs(path, LAW, ColumnChoice(runs_are="independent"))
    assert alone.data.runs == RUNS * STEPS
    assert "Every row counts as a separate run (`--runs-are independent`)." in alone.notes
    with pytest.raises(TableError, match="checkpoints or independent, got 'both'"):
        load_runs(path, LAW, ColumnChoice(runs_are="both"))


def test_intervals_of_checkpoints_are_those_of_their_runs(put):
    """Checkpoints that share their noise say less than as many runs."""
    path = put("model", by_run)
    spreads = [
        np.sqrt(
            np.diag(
                CoefficientCovariance.of(fit(LAW, load_runs(path, LAW, choice).data)).covariance
            )
        )
        for choice in (ColumnChoice(), ColumnChoice(runs_are="independent"))
    ]
    assert (spreads[0] > 1.5 * spreads[1]).sum() >= 3


def test_steps_in_names_of_checkpoints_do_not_part_a_run(put):
    path = put("name", lambda i, run, size: f"m{run}-step{i % STEPS * 1000}")
    assert load_runs(path, LAW).data.runs == RUNS


def test_a_name_of_an_architecture_is_no_run(put):
    path = put("model", lambda i, run, size: "llama")
    reading = load_runs(path, LAW)
    assert reading.data.runs == RUNS * STEPS
    assert any("say" in note or "--runs-are checkpoints" in note for note in reading.notes)


def test_rows_without_names_are_clustered_by_size_if_the_user_says_so(put):
    path = put("", None)
    reading = load_runs(path, LAW)
    assert reading.data.runs == RUNS * STEPS
    assert any("`--runs-are checkpoints`" in note for note in reading.notes)
    assert load_runs(path, LAW, ColumnChoice(runs_are="checkpoints")).data.runs == RUNS


def test_a_name_of_a_sweep_is_parted_by_size(put):
    reading = load_runs(put("run", lambda i, run, size: "sweep"), LAW)
    assert reading.data.runs == RUNS
    assert any("have several N" in note for note in reading.notes)


@pytest.mark.parametrize("empty", ["", "None", "nan", "NA"])
def test_an_empty_column_of_runs_names_none(put, empty):
    reading = load_runs(put("run_id", lambda i, run, size: empty), LAW)
    assert len(reading.data) == reading.data.runs == RUNS * STEPS
    assert "'run_id' is empty, so each row is a separate run." in reading.notes


@pytest.mark.parametrize("empty", ["", "None", "nan", "NA"])
def test_rows_without_a_name_are_runs_of_their_own(put, empty):
    path = put("run_id", lambda i, run, size: empty if i % 2 else f"m{run}")
    reading = load_runs(path, LAW)
    assert len(reading.data) == RUNS * STEPS
    assert reading.data.runs == RUNS + RUNS * STEPS // 2
    assert "48 rows without 'run_id' count as separate runs." in reading.notes


@pytest.mark.parametrize("empty", [None, float("nan"), ""])
def test_missing_names_of_a_table_in_memory_are_no_run(empty):
    columns = {"N": [1e8, 2e8, 3e8, 4e8], "D": [1e9, 2e9, 3e9, 4e9], "loss": [3.0, 2.9, 2.8, 2.7]}
    data = RunTable.read({**columns, "run_id": ["a", "a", empty, empty]}, run_id="run_id")
    assert data.runs == 3
    assert data.run_id.tolist() == [0, 0, 1, 2]


def test_the_last_row_of_each_run_is_that_of_most_tokens(put):
    path = put("model", by_run)
    reading = load_runs(path, LAW, ColumnChoice(last_of_run=True))
    tokens = np.array([row[2] for row in rows()]).reshape(RUNS, STEPS)
    assert reading.data.columns["D"] == pytest.approx(tokens.max(1))
    assert (
        "The last row of each of 8 runs was kept. 88 earlier rows were left out." in reading.notes
    )
    assert (reading.found, reading.used) == (RUNS * STEPS, RUNS)


def test_rows_are_chosen_by_conditions(put):
    path = put("model", by_run)
    reading = load_runs(path, LAW, ColumnChoice(where=("model != m3", "D > 1e10 and N >= 2e7")))
    assert "m3" not in reading.data.run_names
    assert reading.data.columns["D"].min() > 1e10
    assert reading.data.columns["N"].min() == 2e7
    assert "12 rows were left out because they do not meet 'model != m3'." in reading.notes
