"""`accelerate launch` with DeepSpeed or FSDP2: two processes train, save and resume as one does."""

import json
import os
import shutil
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from backbones import tiny_model
from reference import stir
from safetensors import safe_open
from test_multi_exit import ReadsLogits
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hf_familial import FamilialForCausalLM, export_exit, multi_exit


ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "examples" / "accelerate"
WORKER = Path(__file__).with_name("launched_worker.py")
LIMIT = 600  # seconds; the first run with DeepSpeed compiles an operator for three minutes
SHARDING = {
    "zero1": ("deepspeed_zero2.yaml", 1, "DeepSpeedEngine"),
    "zero2": ("deepspeed_zero2.yaml", 2, "DeepSpeedEngine"),
    "zero3": ("deepspeed_zero3.yaml", 3, "DeepSpeedEngine"),
    "fsdp2": ("fsdp2_1node.yaml", None, "FSDPFamilialForCausalLM"),
}
needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")
CASES = [
    ("zero1", "tied", "familial"),
    ("zero2", "own", "logits"),
    ("zero3", "own", "familial"),
    ("fsdp2", "tied", "familial"),
    ("fsdp2", "own", "logits"),
]
EACH = [
    pytest.param(*case, marks=needs_deepspeed if case[0].startswith("zero") else ())
    for case in CASES
]
FAMILIES: dict[str, dict[str, Any]] = {
    "tied": {"tied": True},
    "own": {"num_exit_layers": 1, "exit_head": "own"},
}


def save_family(folder: Path, tied: bool = False, **fields: Any) -> str:
    host = tiny_model("llama", num_hidden_layers=4, tie_word_embeddings=tied)
    family = stir(FamilialForCausalLM.from_backbone(host, exits=[1, 2, 4], **fields))
    family.save_pretrained(folder)
    return f"load:{folder}"


def run(folder: Path, *given: str, sharding: str | None = None) -> dict[str, Any]:
    """Run the worker and return its log. Without `sharding`, it runs alone on all rows."""
    command = [sys.executable]
    if sharding is not None:
        name, stage, _ = SHARDING[sharding]
        config = yaml.safe_load((CONFIGS / name).read_text())
        config |= {"num_processes": 2, "mixed_precision": "no"}
        if stage is not None:
            config["deepspeed_config"]["zero_stage"] = stage
        folder.mkdir(exist_ok=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        command += ["-m", "accelerate.commands.launch", "--main_process_port", port]
        command += ["--config_file", str(folder / "config.yaml")]
    rows = "2" if sharding else "4"
    source, kind, *rest = given
    command += [str(WORKER), str(folder), source, kind, rows, *rest]
    paths = [str(ROOT / "src"), str(ROOT / "tests"), str(WORKER.parent)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    environment |= {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=LIMIT, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "log.json").read_text())


def losses_of(log: list[dict[str, Any]], first: int = 1) -> list[float]:
    names = ("loss", "exit_0_loss", "exit_1_loss", "exit_2_loss", "eval_loss", "eval_exit_0_loss")
    return [row[n] for row in log if row["step"] >= first for n in names if n in row]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def assert_close(folder: Path, other: Path) -> None:
    found, right = weights_of(folder), weights_of(other)
    assert found.keys() == right.keys()
    for name, weight in right.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=2e-5, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(("sharding", "family", "kind"), EACH)
def test_two_processes_train_and_resume_as_one(
    sharding: str, family: str, kind: str, tmp_path: Path
) -> None:
    source = save_family(tmp_path / "family", **FAMILIES[family])
    one = run(tmp_path / "one", source, kind)
    two = run(tmp_path / "two", source, kind, sharding=sharding)
    assert two["wrapper"] == SHARDING[sharding][2]
    assert losses_of(two["log"]) == pytest.approx(losses_of(one["log"]), rel=1e-5)
    assert_close(tmp_path / "two/final", tmp_path / "one/final")

    # the last checkpoint was left by a kill inside its save
    shutil.copytree(tmp_path / "two", tmp_path / "killed")
    (tmp_path / "killed/checkpoint-4/trainer_state.json").unlink()
    resumed = run(tmp_path / "killed", source, kind, "--resume", sharding=sharding)
    assert losses_of(resumed["log"]) == pytest.approx(losses_of(two["log"]), rel=1e-5)
    assert_close(tmp_path / "killed/final", tmp_path / "one/final")

    whole = FamilialForCausalLM.from_pretrained(tmp_path / "two/checkpoint-4").eval()
    ids = torch.arange(8, 20)[None]
    for k in range(3):
        export_exit(tmp_path / "two/checkpoint-4", k, tmp_path / f"member{k}")
        member = AutoModelForCausalLM.from_pretrained(tmp_path / f"member{k}").eval()
        with torch.no_grad():
            assert torch.equal(member(ids).logits, whole(ids, exit_idx=k).logits)
        if family == "tied":
            assert "lm_head.weight" not in weights_of(tmp_path / f"member{k}")


def test_zero3_rejects_losses_of_other_trainers(tmp_path: Path, monkeypatch: Any) -> None:
    """Reject them, because the gradients would be wrong without a message."""
    name = "hf_familial.training.trainer.is_deepspeed_zero3_enabled"
    monkeypatch.setattr(name, lambda: True)
    model = FamilialForCausalLM.from_backbone(
        tiny_model("llama", num_hidden_layers=2), exits=[1, 2]
    )
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    for kind in (multi_exit(ReadsLogits), multi_exit(Trainer, exits="sample")):
        with pytest.raises(ValueError, match="ZeRO-3 works neither"):
            kind(model, args)


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("how", ["backbone", "config"])
def test_zero3_partitions_a_family_made_in_another_way(how: str, tmp_path: Path) -> None:
    if how == "backbone":
        tiny_model("llama", num_hidden_layers=4).save_pretrained(tmp_path / "source")
    else:
        save_family(tmp_path / "source", **FAMILIES["own"])
    source = f"{how}:{tmp_path / 'source'}"
    one = run(tmp_path / "one", source, "familial")
    two = run(tmp_path / "two", source, "familial", sharding="zero3")
    assert losses_of(two["log"]) == pytest.approx(losses_of(one["log"]), rel=1e-5)
    assert_close(tmp_path / "two/final", tmp_path / "one/final")
