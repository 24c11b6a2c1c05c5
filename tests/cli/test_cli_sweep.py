"""`hf-familial sweep` as a user types it: what it says, what it leaves, what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from hf_familial.isoflop import IsoFlopDesign, SweepFolder
from hf_familial.isoflop._folder import FAILURE
from hf_familial.runs import read_runs


DESIGN: dict[str, Any] = {
    "budgets": [4.3e8],
    "sizes": ["16x2", "32x2"],
    "granularities": [1, 2],
    "vocab_size": 300,
    "seq_length": 32,
    "backbone": {"head_dim": 16, "multiple": 16},
    "rule": {"kind": "fixed", "lr": 8e-3, "batch_tokens": 32},
    "training": {"max_eval_tokens": 2048, "eval_steps": 0.5},
}
Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture(name="cli")
def cli_at_80_columns(cli: Cli) -> Cli:
    """The command on a narrow terminal."""

    def run(*words: object) -> tuple[int, str, str]:
        return cli("sweep", *words, columns=80)

    return run


def write(path: Path, **fields: Any) -> Path:
    path.write_text(yaml.safe_dump(DESIGN | fields), encoding="utf-8")
    return path


@pytest.fixture
def design(tmp_path: Path) -> Path:
    return write(tmp_path / "design.yaml")


def test_plan_trains_nothing(cli: Cli, design: Path, tmp_path: Path) -> None:
    code, out, _ = cli("plan", design, "--seconds", 0)
    assert code == 0
    assert "4 runs, 1.72" in out
    assert "G = 2: needs three sizes or more" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["design.yaml"]


def test_plan_as_json_is_the_runs(cli: Cli, design: Path) -> None:
    code, out, _ = cli("plan", design, "--json")
    assert code == 0
    ids = [row["id"] for row in json.loads(out)]
    assert ids == [run.id for run in IsoFlopDesign.from_yaml(design).runs()]


def test_plan_says_how_long(cli: Cli, design: Path) -> None:
    code, out, _ = cli("plan", design, "--seconds", 0.1, "--workers", 2)
    assert code == 0
    assert "tokens, " in out
    assert "with 2 runs at once" in out


def test_status_before_anything_ran(cli: Cli, design: Path, tmp_path: Path) -> None:
    out_folder = tmp_path / "sweep"
    code, out, _ = cli("status", design, "--out", out_folder)
    assert code == 0
    assert "4 runs: 4 waiting" in out
    assert not out_folder.exists()


def test_status_shows_why_a_run_failed_and_retry_resets_it(
    cli: Cli, design: Path, tmp_path: Path
) -> None:
    folder, run = SweepFolder(tmp_path / "sweep"), IsoFlopDesign.from_yaml(design).runs()[1]
    message = f"KeyError: {'lost ' * 40}"
    failure = {"attempts": 3, "step": 0, "message": message, "trace": ""}
    folder.write(json.dumps(failure), "runs", run.id, FAILURE)
    _, out, _ = cli("status", design, "--out", tmp_path / "sweep")
    # the table keeps its columns, and the error its words
    assert "id C size G seed state steps loss" in " ".join(out.split())
    assert f"{run.id[:8]} 4.3e+08 16x2 2 0 failed 0/{run.steps}" in " ".join(out.split())
    assert f"run {run.id} failed 3 times: {message.strip()}" in out.splitlines()
    assert "4 runs: 1 failed, 3 waiting" in out
    rows = json.loads(cli("status", design, "--out", tmp_path / "sweep", "--json")[1])
    assert [row["state"] for row in rows] == ["waiting", "failed", "waiting", "waiting"]
    assert rows[1]["error"] == message
    code, out, _ = cli("retry", design, "--out", tmp_path / "sweep")
    go_on = f"hf-familial sweep run {design} --out {tmp_path / 'sweep'}"
    assert (code, out) == (0, f"Reset 1 failed run.\nNext: `{go_on}`\n")
    assert cli("retry", design, "--out", tmp_path / "sweep")[1] == "No run has failed.\n"
    _, out, _ = cli("status", design, "--out", tmp_path / "sweep")
    assert "4 runs: 4 waiting" in out


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"training": {"max_step": 3}}, "`training.max_step` is unknown; did you mean `max_steps`"),
        ({"training": {"max_steps": 3}}, "`training.max_steps` is set by `budgets`. Leave it"),
        ({"data": "./gone.txt"}, "`data` must be a file or a folder that exists"),
        ({"sizes": ["16x2", "512x2"]}, "no whole number of steps meets the budget within 0.5 %"),
        ({"budget": [1]}, "`budget` is unknown; did you mean `budgets`?"),
    ],
)
def test_what_is_wrong_ends_in_one_line(
    cli: Cli, tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    design = write(tmp_path / "design.yaml", **fields)
    code, out, err = cli("run", design, "--out", tmp_path / "sweep")
    assert code == 1
    waiting = "Preparing the runs and their data.\n"
    assert err.removeprefix(waiting).startswith("error: ")
    assert message in err
    assert not (tmp_path / "sweep").exists()


def test_a_design_that_is_not_there(cli: Cli, tmp_path: Path) -> None:
    code, _, err = cli("plan", tmp_path / "none.yaml")
    assert code == 1
    assert "none.yaml" in err


def test_options_of_this_machine_do_not_go_with_a_cluster(cli: Cli, design: Path) -> None:
    code, _, err = cli("run", design, "--ray", "auto", "--threads", 2)
    assert code == 1
    assert "`--threads` is for this machine" in err


@pytest.mark.slow
def test_run_leaves_every_row_and_then_has_nothing_to_do(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    texts = tmp_path / "texts"
    texts.mkdir()
    for k in range(40):
        (texts / f"{k}.txt").write_text(f"Text {k}: " + "the quick brown fox. " * 60)
    design, out = write(tmp_path / "design.yaml", data=str(texts)), tmp_path / "sweep"
    code, shown, err = cli("run", design, "--out", out, "--workers", 1)
    assert code == 0, err
    assert "4 runs finished (4 now, 0 diverged)" in shown
    assert f"Next: `hf-familial fit {out}/runs.jsonl`" in shown
    rows = read_runs(out / "runs.jsonl")
    assert [row.run_id for row in rows] == [r.id for r in IsoFlopDesign.from_yaml(design).runs()]
    assert "\x1b" not in err
    before = (out / "runs.jsonl").read_bytes()
    code, shown, _ = cli("run", design, "--out", out, "--workers", 1)
    assert "4 runs finished (0 now" in shown
    assert (out / "runs.jsonl").read_bytes() == before
    assert "4 runs: 4 finished" in cli("status", design, "--out", out)[1]
