"""A sweep begun by an older version is continued: its ids, files and checkpoints are still read.

`data/begun_sweep.tar.gz` holds such a folder and the rows of the same design done in one go. Of its
four runs the first has its row, the second a record without a row, the third a checkpoint at step 6
and one failure, the fourth nothing.
"""

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from sweep_harness import CLOCKS, Here, design_of, write_corpus

from hf_familial.isoflop import IsoFlopDesign, Sweep, SweepFolder, WorkerEvent, run_states


BEGUN = Path(__file__).with_name("data") / "begun_sweep.tar.gz"
IDS = ["5e2fe5e4592012d7", "0813ac2d37372d81", "ff7932619792e78e"]


@pytest.fixture
def begun(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder as the older version left it, beside the data that its design names."""
    with tarfile.open(BEGUN) as archive:
        archive.extractall(tmp_path, filter="data")
    write_corpus(tmp_path / "corpus")
    monkeypatch.chdir(tmp_path)  # ids depend on the name of the data, so it is a relative one
    return tmp_path / "sweep"


def rows_of(path: Path) -> dict[tuple[str, int], dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    keyed = {(row["run_id"], row.get("step", 0)): row for row in rows}
    assert len(keyed) == len(rows)
    return {k: {n: v for n, v in row.items() if n not in CLOCKS} for k, row in keyed.items()}


def test_a_sweep_of_an_older_version_is_continued(begun: Path) -> None:
    design = design_of("corpus", seeds=(0, 1))
    (kept,) = (begun / "designs").iterdir()
    assert IsoFlopDesign.from_yaml(kept) == design
    before = kept.read_bytes()
    assert [plan.id for plan in design.runs()][:3] == IDS
    states = run_states(SweepFolder(begun), design.runs())
    assert [state.state for state in states] == ["finished", "waiting", "waiting", "waiting"]
    assert (states[2].step, states[2].failure and states[2].failure.attempts) == (6, 1)

    steps: dict[str, int] = {}

    def hear(event: WorkerEvent) -> None:
        steps.setdefault(event.run_id, event.step)

    executor = Here(hear=hear)
    outcome = Sweep(design, "sweep", executor, save_seconds=0).run()
    assert (outcome.done_now, outcome.failed) == (3, {})
    # the second run is not done again, the third goes on from its checkpoint
    assert executor.submitted == [plan.id for plan in design.runs()[2:]]
    assert list(steps.values()) == [6, 0]

    for name in ("runs", "evaluations"):
        found, whole = (
            rows_of(p) for p in (begun / f"{name}.jsonl", begun.parent / f"whole_{name}.jsonl")
        )
        assert found.keys() == whole.keys()
        for key, row in found.items():
            assert row.keys() == whole[key].keys()
            for field, value in row.items():
                inexact = isinstance(value, (float, list))
                expected = whole[key][field]
                assert value == (pytest.approx(expected, rel=1e-3) if inexact else expected), field
    assert kept.read_bytes() == before
    assert not list((begun / "runs").iterdir())
