"""examples/cluster: its figures follow from its design, its files are what Ray and bash read."""

import os
import runpy
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from sweep_harness import Here, Killed, design_of, killed_at, rows_of, write_corpus

from hf_familial.isoflop import IsoFlopDesign, Sweep, check_budgets


CLUSTER = Path(__file__).resolve().parents[2] / "examples" / "cluster"
FIGURES = runpy.run_path(str(CLUSTER / "figures.py"))


def test_runs_begin_in_their_turn_where_a_worker_is_free() -> None:
    assert FIGURES["makespan"]([3, 1, 1, 1, 6], workers=2) == 9
    assert FIGURES["makespan"]([6, 3, 1, 1, 1], workers=2) == 6
    assert FIGURES["makespan"]([1, 2], workers=8) == 2


@pytest.mark.slow
def test_the_readme_says_what_the_design_takes() -> None:
    """1,000 runs, each curve with its optimum inside, and every row of both tables."""
    design = IsoFlopDesign.from_yaml(CLUSTER / "design.yaml")
    runs, refused = design.layout()
    assert (len(runs), refused) == (1000, ())
    assert len({run.id for run in runs}) == 1000
    curves = check_budgets(runs, design.expected)
    assert len(curves) == 20
    assert all(curve.brackets for curve in curves)
    assert design.data_tokens is not None
    assert max(run.tokens for run in runs) < design.data_tokens
    # Step Law was fitted on no smaller ones
    assert min(run.N for run in runs) >= 6e7

    text, given = (CLUSTER / "README.md").read_text(), FIGURES["Assumptions"]()
    for rows in (FIGURES["by_budget"](runs, given), FIGURES["by_topic"](runs, given)):
        assert "\n".join(rows) in text


def test_bytes_of_a_checkpoint_are_those_of_a_real_one(tmp_path: Path) -> None:
    """12 bytes a parameter, beside some kB, in a checkpoint that the trainer wrote."""
    corpus = write_corpus(tmp_path / "corpus")
    design = design_of(corpus, sizes=("64x2",), budgets=(5.915e8,), granularities=(1,))
    with pytest.raises(Killed):
        Sweep(design, tmp_path / "sweep", Here(hear=killed_at(3)), save_seconds=0).run()
    (saved,) = (tmp_path / "sweep" / "runs").glob("*/checkpoint-*")
    sizes = {path.name: path.stat().st_size for path in saved.rglob("*") if path.is_file()}
    heavy = sizes.pop("model.safetensors") + sizes.pop("optimizer.pt")
    (plan,) = design.runs()
    assert heavy == pytest.approx(FIGURES["checkpoint_bytes"](plan), abs=32_000)
    assert heavy > 20 * 32_000
    assert sum(sizes.values()) < 1_000_000
    assert FIGURES["FILES"] / 2 < len(sizes) + 2 <= FIGURES["FILES"]


def test_the_cluster_file_is_what_ray_reads() -> None:
    util = pytest.importorskip("ray.autoscaler._private.util")
    config = yaml.safe_load((CLUSTER / "ray_cluster.yaml").read_text())
    util.validate_config(util.prepare_config(config))
    types = config["available_node_types"]
    assert config["head_node_type"] in types
    assert types["h100"]["max_workers"] * types["h100"]["resources"]["GPU"] == 64
    assert FIGURES["Assumptions"]().gpus == 64


def test_the_slurm_script_is_bash() -> None:
    script = CLUSTER / "slurm.sh"
    assert script.stat().st_mode & stat.S_IXUSR
    subprocess.run(["bash", "-n", script], check=True)
    checker = Path(sys.executable).with_name("shellcheck")
    found = str(checker) if checker.exists() else shutil.which("shellcheck")
    if found:
        subprocess.run([found, script], check=True)


STAND_INS = {
    # SLURM's own: runs its command here, without its own options
    "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
    "scontrol": 'echo "$*" >>"$LOG"; [[ $1 != show ]] || echo this-node',
    "hostname": "echo 127.0.0.1",
    "hf-familial": 'exec "$PYTHON" -m hf_familial "$@"',
    "ray": 'exec "$PYTHON" -m ray.scripts.scripts "$@"',
}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="bash and SLURM")
def test_the_slurm_script_runs_a_sweep(tmp_path: Path) -> None:
    """SLURM stands in, Ray and the sweep are real; nothing of them is left."""
    pytest.importorskip("ray")
    bin_dir, log = tmp_path / "bin", tmp_path / "log"
    bin_dir.mkdir()
    for name, body in STAND_INS.items():
        (bin_dir / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (bin_dir / name).chmod(0o755)
    design = design_of(write_corpus(tmp_path / "corpus"))
    (tmp_path / "design.yaml").write_text(design.to_yaml())
    environment = {
        "PATH": f"{bin_dir}:{os.environ['PATH']}",
        "LOG": str(log),
        "PYTHON": sys.executable,
        "HF_HOME": str(tmp_path / "home"),
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "this-node",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_CPUS_PER_TASK": "2",
        "CPUS": "1",
        "GPUS": "0",
    }
    command = ["bash", CLUSTER / "slurm.sh", tmp_path / "design.yaml", tmp_path / "out"]
    done = subprocess.run(
        [*command, "--retries", "1"],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=540,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(rows_of(tmp_path / "out")) == len(design.runs())
    assert log.read_text().splitlines() == ["show hostnames this-node"]
    port = 20000 + os.getpid() % 20000
    left = subprocess.run(
        ["bash", "-c", f"</dev/tcp/127.0.0.1/{port}"], capture_output=True, check=False
    )
    assert left.returncode, "Ray's head lives on"
