"""Examples: as a new user runs them, at toy sizes, offline."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from backbones import tiny_config
from datasets import Dataset
from matplotlib.image import imread
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_familial import FamilialForCausalLM


ROOT = Path(__file__).resolve().parents[1]
PRETRAIN = ROOT / "examples" / "pretrain.py"
TEXTS = [f"def f_{i}(x):\n    return x * {i}  # {'ab ' * (i % 7)}\n" * 4 for i in range(60)]
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "vocab_size": 300,
    "seq_length": 32,
    "eval_fraction": 0.1,
    "max_eval_tokens": 1024,
    "max_steps": 4,
    "logging_steps": 1,
    "use_cpu": True,
}
OFFLINE = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of text, and the same as tables."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "text").mkdir()
    for i, text in enumerate(TEXTS):
        (folder / "text" / f"{i:02d}.txt").write_text(text)
    rows = Dataset.from_dict({"content": TEXTS})
    rows.to_parquet(folder / "rows.parquet")
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    return folder


def line_of(corpus: Path, output: Path, **choices: Any) -> list[str]:
    """A command line; `None` leaves an argument out."""
    defaults = {"train_files": corpus / "text", "cache_dir": corpus / "cache"}
    fields = SIZES | defaults | {"output_dir": output} | choices
    words: list[str] = []
    for name, value in fields.items():
        values = value if isinstance(value, list) else [value]
        words += [f"--{name}", *map(str, values)] if value is not None else []
    return words


def start(words: list[str], *launcher: str) -> subprocess.CompletedProcess[str]:
    """Run the example in a process of its own."""
    return subprocess.run(
        [*(launcher or (sys.executable,)), str(PRETRAIN), *words],
        env=os.environ | OFFLINE,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def pretrain() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pretrain", PRETRAIN)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["pretrain"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(pretrain: ModuleType, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the example in this process, which is sooner done."""

    def run_(output: Path, *first: str, **choices: Any) -> Path:
        words = [*first, *line_of(corpus, output, **choices)]
        monkeypatch.setattr(sys, "argv", [str(PRETRAIN), *words])
        pretrain.main()
        return output

    return run_


@pytest.fixture(scope="module")
def finished(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """The folder, the output and the errors of a whole run."""
    output = tmp_path_factory.mktemp("finished") / "run"
    done = start(line_of(corpus, output))
    assert done.returncode == 0, done.stderr
    return output, done.stdout, done.stderr


def history_of(output: Path) -> list[dict[str, Any]]:
    (state,) = output.glob("checkpoint-*/trainer_state.json")
    return json.loads(state.read_text())["log_history"]


def losses_of(output: Path) -> list[float]:
    return [row["loss"] for row in history_of(output) if "loss" in row]


# a whole run


def test_what_a_run_leaves(finished: tuple[Path, str, str]) -> None:
    output, shown, _ = finished
    assert (output / "checkpoint-4").is_dir()
    assert imread(output / "losses.png").shape[:2] == (675, 1200)
    members = json.loads((output / "members.json").read_text())
    assert [row["depth"] for row in members] == [1, 2, 3, 4]
    body = [line.split() for line in shown.splitlines()]
    for k, row in enumerate(members):
        cells = [cells for cells in body if cells[:2] == [str(k), str(row["depth"])]]
        assert [cell[2] for cell in cells] == [f"{row['parameters']:,}"]
        assert f"─ exit {k} (depth {row['depth']}) ─" in shown
    assert "perplexity" in shown


def test_a_run_is_quiet(finished: tuple[Path, str, str]) -> None:
    _, shown, errors = finished
    assert "Warning" not in shown + errors
    # checkpoints of this toy are written within a second of each other
    lines = [line for line in errors.splitlines() if "mtime" not in line]
    assert not any("[transformers]" in line for line in lines)


def test_the_members_are_those_of_the_evaluation(finished: tuple[Path, str, str]) -> None:
    output, _, _ = finished
    members = json.loads((output / "members.json").read_text())
    last = [row for row in history_of(output) if "eval_loss" in row][-1]
    for k, row in enumerate(members):
        assert row["eval_loss"] == pytest.approx(last[f"eval_exit_{k}_loss"], rel=1e-6)


def test_the_checkpoint_loads(finished: tuple[Path, str, str]) -> None:
    output, _, _ = finished
    for folder in (output, output / "checkpoint-4"):
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert isinstance(model, FamilialForCausalLM)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = tokenizer("def f", return_tensors="pt").input_ids
        made = model.generate(ids, exit_idx=0, max_new_tokens=4, do_sample=False)
        assert made.shape[1] == ids.shape[1] + 4


def test_it_learns(run: Any, tmp_path: Path) -> None:
    output = run(tmp_path / "run", max_steps=20, learning_rate=0.02, save_steps=20)
    rows = [row for row in history_of(output) if "loss" in row]
    for k in range(4):
        assert rows[-1][f"exit_{k}_loss"] < 0.8 * rows[0][f"exit_{k}_loss"]


def test_help_explains_itself(
    pretrain: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(PRETRAIN), "--help-all"])
    with pytest.raises(SystemExit) as error:
        pretrain.main()
    assert error.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Pretrain a family: one training run gives one model per exit." in shown
    assert "The initial learning rate for the optimizer. [default: 0.003]" in shown
    assert "[default: outputs/pretrain]" in shown


# going on


def test_resuming(run: Any, tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", save_steps=4)
    # as if it had been stopped after two of four steps
    cut = run(tmp_path / "cut", save_steps=2, save_total_limit=2)
    shutil.rmtree(cut / "checkpoint-4")
    run(cut, save_steps=2, resume_from_checkpoint="last")
    assert losses_of(cut) == losses_of(whole)


def test_a_plain_decoder_as_backbone(run: Any, tmp_path: Path, finished: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(finished[0])
    torch.manual_seed(0)
    config = tiny_config("llama", vocab_size=len(tokenizer) + 4)
    host = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    host.save_pretrained(tmp_path / "host")
    tokenizer.save_pretrained(tmp_path / "host")
    output = run(tmp_path / "run", backbone=tmp_path / "host", exits=[1, 4])
    model = AutoModelForCausalLM.from_pretrained(output)
    assert model.config.exits == [1, 4]
    # small steps would be lost in half precision
    assert model.dtype == torch.float32


def test_a_family_as_backbone(run: Any, tmp_path: Path, finished: Any) -> None:
    output = run(tmp_path / "run", backbone=finished[0])
    assert AutoModelForCausalLM.from_pretrained(output).config.exits == [1, 2, 3, 4]
    before = [row for row in history_of(finished[0]) if "loss" in row][0]["loss"]
    assert losses_of(output)[0] < before


# ways to say it


@pytest.mark.parametrize(
    "choices",
    [
        {"train_files": "rows.jsonl"},
        {"train_files": "rows.jsonl", "streaming": True, "stream_eval_documents": 5},
        {"train_files": "rows.parquet", "text_column": "content"},
        {"exits": [1, 4], "num_exit_layers": 1, "exit_head": "own"},
        {"num_exits": 1},
        {"model_type": "qwen3", "num_exits": 2},
        {"bf16": True},
        {"activation_checkpointing": True},
        {"gradient_accumulation_steps": 3},
    ],
    ids=lambda choices: "-".join(choices),
)
def test_other_runs(run: Any, corpus: Path, tmp_path: Path, choices: dict[str, Any]) -> None:
    if "train_files" in choices:
        choices = choices | {"train_files": corpus / choices["train_files"]}
    output = run(tmp_path / "run", max_steps=2, **choices)
    assert (output / "losses.png").stat().st_size > 1000
    assert len(losses_of(output)) == 2


def test_tensorboard(run: Any, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    output = run(tmp_path / "run", report_to="tensorboard")
    tags = set()
    for folder in {path.parent for path in output.rglob("events.out.tfevents.*")}:
        tags |= set(EventAccumulator(str(folder)).Reload().Tags()["scalars"])
    assert {"train/exit_0_loss", "train/exit_3_loss", "eval/exit_0_loss"} <= tags


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_a_configuration_file(run: Any, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"run.{suffix}"
    if suffix == "yaml":
        # YAML takes this number for text
        path.write_text("learning_rate: 1e-3\nexits: [2, 4]\nmax_steps: 9\nadam_beta1: null\n")
    else:
        path.write_text(json.dumps({"learning_rate": 1e-3, "exits": [2, 4], "max_steps": 9}))
    output = run(tmp_path / "run", str(path))
    rows = [row for row in history_of(output) if "loss" in row]
    assert len(rows) == 4
    assert max(row["learning_rate"] for row in rows) == 1e-3
    assert AutoModelForCausalLM.from_pretrained(output).config.exits == [2, 4]


# mistakes


@pytest.mark.parametrize(
    ("choices", "match"),
    [
        ({"train_files": "absent.txt"}, "must exist, got 'absent.txt'"),
        ({"text_column": "body", "train_files": "rows.jsonl"}, "got 'body'.*'text'"),
        ({"exits": [2, 9]}, r"`num_hidden_layers` \(4\), got \[2, 9\]"),
        ({"exits": [1, 3]}, r"equal `num_hidden_layers` \(4\), got \[1, 3\]"),
        ({"num_exits": 5}, "`num_exits` must be an integer from 1 to 4"),
        ({"exit_norm": "other"}, "`exit_norm` must be one of own, shared, got 'other'"),
        ({"model_type": "nonesuch"}, "nonesuch"),
        ({"model_type": "t5"}, "decoder"),
        ({"resume_from_checkpoint": "last"}, "folder `.*` has no complete checkpoint"),
        ({"resume_from_checkpoint": "absent"}, "folder `absent` does not exist"),
        ({"seq_length": 1}, "`seq_length` must be at least 2, got 1"),
        ({"backbone": "./absent"}, "absent"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_mistake_is_named(
    run: Any, corpus: Path, tmp_path: Path, choices: dict[str, Any], match: str
) -> None:
    if choices.get("train_files", "").startswith("rows"):
        choices = choices | {"train_files": corpus / choices["train_files"]}
    with pytest.raises((ValueError, OSError), match=match):
        run(tmp_path / "run", **choices)
    assert not (tmp_path / "run").exists()


def test_a_family_keeps_its_exits(run: Any, tmp_path: Path, finished: Any) -> None:
    with pytest.raises(ValueError, match=r"family with exits \[1, 2, 3, 4\]"):
        run(tmp_path / "run", backbone=finished[0], exits=[2, 4])
    assert not (tmp_path / "run").exists()


def test_vocabularies_that_do_not_match(run: Any, tmp_path: Path, finished: Any) -> None:
    AutoModelForCausalLM.from_config(tiny_config("llama")).save_pretrained(tmp_path / "host")
    with pytest.raises(ValueError, match="tokenizer has 300 tokens.* only 128"):
        run(tmp_path / "run", backbone=tmp_path / "host", tokenizer_name=finished[0])
    assert not (tmp_path / "run").exists()


def test_a_mistake_is_the_last_line(corpus: Path, tmp_path: Path) -> None:
    done = start(line_of(corpus, tmp_path / "run", exits=[2, 9]))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith("got [2, 9].")
    assert not (tmp_path / "run").exists()


# processes


@pytest.mark.slow
def test_two_processes_on_the_cpu(corpus: Path, tmp_path: Path) -> None:
    words = ["launch", "--multi_gpu", "--num_processes", "2"]
    assert f"accelerate {' '.join(words)} examples/pretrain.py --use_cpu" in PRETRAIN.read_text()
    launcher = (sys.executable, "-m", "accelerate.commands.accelerate_cli", *words)
    # rows of whole batches, or the host would count some of them twice
    choices = {"max_eval_tokens": 16 * SIZES["seq_length"]}
    halves = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 8}
    two = start(line_of(corpus, tmp_path / "two", **(choices | halves)), *launcher)
    assert two.returncode == 0, two.stderr
    one = start(line_of(corpus, tmp_path / "one", **choices))
    assert one.returncode == 0, one.stderr
    assert "find_unused_parameters" not in two.stderr
    # each process keeps the state of its own generator, and sees half of every batch
    states = {path.name for path in (tmp_path / "two" / "checkpoint-4").glob("rng_state*")}
    assert states == {"rng_state_0.pth", "rng_state_1.pth"}
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(tmp_path / "one"), rel=1e-5)
    tables = [json.loads((tmp_path / n / "members.json").read_text()) for n in ("one", "two")]
    for row, expected in zip(*tables, strict=True):
        assert row["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)


@pytest.mark.slow
def test_an_interrupted_run_goes_on(corpus: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    choices = {"max_steps": 100_000, "save_steps": 20, "eval_strategy": "no"}
    process = subprocess.Popen(
        [sys.executable, str(PRETRAIN), *line_of(corpus, output, **choices)],
        env=os.environ | OFFLINE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not list(output.glob("checkpoint-*/trainer_state.json")) and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) != 0
    reached = max(int(path.name.split("-")[1]) for path in output.glob("checkpoint-*"))
    choices |= {"max_steps": reached + 5, "resume_from_checkpoint": "last"}
    done = start(line_of(corpus, output, **choices))
    assert done.returncode == 0, done.stderr
    assert (output / "members.json").is_file()
