"""A sweep begun by an older version is continued: its ids, files and checkpoints are still read.

`data/begun_sweep.tar.gz` holds such a folder, and one in which the same design was done in one go.
Of four runs the first has its row, the second a record without a row, the third a checkpoint at
step 6 and one failure, the fourth nothing.
"""

import tarfile
from pathlib import Path

import pytest
from shelf import rows_of
from sweep_harness import Here, design_of, write_corpus

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

    found, whole = (rows_of(str(folder)) for folder in (begun, begun.parent / "whole"))
    for name, rows in whole.items():
        assert found[name].keys() == rows.keys()
        for key, row in rows.items():
            assert found[name][key].keys() == row.keys()
            for field, value in row.items():
                if isinstance(value, (float, list)):  # machines differ in the last bits
                    value = pytest.approx(value, rel=1e-3)
                assert found[name][key][field] == value, field
    assert kept.read_bytes() == before
    assert not list((begun / "runs").iterdir())
