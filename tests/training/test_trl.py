"""Trainers of trl on a family: each trains every exit, with the gradients of one backward each."""

import json
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, disable_progress_bars
from reference import gradients, gradients_by_exit, tiny_family
from test_multi_exit import assert_close
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import hf_familial as hff


trl = pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore")
disable_progress_bars()
G = 3

TEXT = Dataset.from_list([{"text": f"a text of number {i * 77}"} for i in range(8)])
PAIRS = [{"prompt": f"q{i}", "chosen": f" yes {i}", "rejected": " no way"} for i in range(8)]
RATED = [{"prompt": f"q{i}", "completion": f" yes {i}", "label": i % 2 == 0} for i in range(8)]
PROMPTS = Dataset.from_list([{"prompt": f"tell {i}"} for i in range(8)])
CHATS = Dataset.from_list(
    [
        {"messages": [{"role": r, "content": f"{r} {i}"} for r in ("user", "assistant")]}
        for i in range(8)
    ]
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved family with heads and layers of its own, and a tokenizer of characters."""
    place = tmp_path_factory.mktemp("family")
    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {chr(i): i for i in range(3, 127)}
    bpe = Tokenizer(models.BPE(vocab=words, merges=[], unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    family = tiny_family("llama", [1, 2, 4], exit_head="own", num_exit_layers=1)
    family.config.text_config.update({"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None})
    family.generation_config.update(pad_token_id=0, eos_token_id=1, bos_token_id=None)
    family.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


def different_letters(completions: list[str], **_: Any) -> list[float]:
    return [float(len(set(text))) for text in completions]


def lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"], r=4)


def _experimental(name: str) -> Callable[[], Any]:
    def load() -> Any:
        module = pytest.importorskip(f"trl.experimental.{name.lower()}")
        return getattr(module, f"{name}Trainer"), getattr(module, f"{name}Config")

    return load


def _stable(name: str) -> Callable[[], Any]:
    return lambda: (getattr(trl, f"{name}Trainer"), getattr(trl, f"{name}Config"))


SFT, DPO = (_stable("SFT"), {"max_length": 64}), (_stable("DPO"), {})
GENERATED = {"num_generations": 4, "max_completion_length": 6}
# name: (class and config, options of the config, rows, arguments of the trainer)
CASES: dict[str, tuple[Any, dict[str, Any], Any, Any]] = {
    "sft": (*SFT, TEXT, dict),
    "sft_dft": (SFT[0], {"loss_type": "dft"}, TEXT, dict),
    "sft_chunked_nll": (SFT[0], {"loss_type": "chunked_nll"}, TEXT, dict),
    "sft_packing": (SFT[0], {"max_length": 64, "packing": True}, TEXT, dict),
    "sft_padding_free": (SFT[0], {"max_length": None, "padding_free": True}, TEXT, dict),
    "sft_completion_only": (SFT[0], {}, RATED, dict),
    "sft_lora": (*SFT, TEXT, lambda: {"peft_config": lora()}),
    "sft_checkpointing": (SFT[0], {"gradient_checkpointing": True}, TEXT, dict),
    "dpo": (*DPO, PAIRS, dict),
    "dpo_lora": (*DPO, PAIRS, lambda: {"peft_config": lora()}),
    "dpo_precomputed": (DPO[0], {"precompute_ref_log_probs": True}, PAIRS, dict),
    "kto": (_stable("KTO"), {}, RATED, dict),
    "grpo": (_stable("GRPO"), {**GENERATED, "beta": 0.0}, PROMPTS, "reward"),
    "grpo_reference": (_stable("GRPO"), {**GENERATED, "beta": 0.1}, PROMPTS, "reward"),
    "rloo": (_stable("RLOO"), {**GENERATED, "beta": 0.1}, PROMPTS, "reward"),
    "distillation": (_stable("Distillation"), {"max_completion_length": 6}, PROMPTS, "teacher"),
    "orpo": (_experimental("ORPO"), {}, PAIRS, dict),
    "cpo": (_experimental("CPO"), {}, PAIRS, dict),
    "gkd": (_experimental("GKD"), {"max_new_tokens": 6}, CHATS, "teacher"),
}


def make_trainer(name: str, folder: Path, place: Path, model: Any = None, **options: Any) -> Any:
    """Build the trainer of a case on the saved family; `wrap` in `options` wraps its class."""
    load, config, rows, arguments = CASES[name]
    wrap = options.pop("wrap", lambda base: base)
    adapter = {"peft_config": options.pop("peft_config")} if "peft_config" in options else {}
    base, config_class = load()
    if arguments == "reward":
        given = {"reward_funcs": different_letters}
    elif arguments == "teacher":
        given = {"teacher_model": hff.FamilialForCausalLM.from_pretrained(folder)}
    else:
        given = arguments()
    if isinstance(rows, list):
        rows = Dataset.from_list([{k: v for k, v in row.items() if k != "label"} for row in rows]
                                 if name.startswith("sft") else rows)  # fmt: skip
    common = {"per_device_train_batch_size": 4, "report_to": "none", "use_cpu": True, "bf16": False}
    common |= {"save_strategy": "no", "logging_steps": 1, "disable_tqdm": True}
    torch.manual_seed(0)
    return wrap(base)(
        model=hff.FamilialForCausalLM.from_pretrained(folder) if model is None else model,
        args=config_class(str(place), **common | config | options),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(folder),
        **given | adapter,
    )


DRAWN = ["rloo", "grpo", "sft", "dpo"]


@pytest.mark.parametrize(
    ("name", "exits"), [(n, "all") for n in CASES if n != "rloo"] + [(n, "sample") for n in DRAWN]
)
def test_gradients_are_the_mean_over_exits(
    name: str, exits: str, folder: Path, tmp_path: Path
) -> None:
    """With `exits="sample"`, they are those of the drawn exit."""
    trainer = make_trainer(
        name, folder, tmp_path, wrap=lambda base: hff.multi_exit(base, exits=exits)
    )
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    batch = next(iter(trainer.get_train_dataloader()))
    with trainer._exit_outside_loss():  # generation is random: both get the same texts
        prepared = trainer._prepare_inputs(batch)

    def gradients_of(one: Any) -> dict[str, torch.Tensor]:
        one.current_gradient_accumulation_steps = 1
        one.model.train()
        one.model.load_state_dict(trainer.model.state_dict())
        one.model.zero_grad()
        torch.manual_seed(1)
        one.compute_loss(one.model, dict(prepared)).backward()
        return dict(gradients(one.model))

    def plain(model: Any) -> Any:
        return make_trainer(name, folder, tmp_path, model=model)

    family = hff.FamilialForCausalLM.from_pretrained(folder)
    weights = [1 / G] * G
    if exits == "sample":
        weights = [float(k == trainer._drawn_exit()) for k in range(G)]
    right = gradients_by_exit(plain, gradients_of, family, weights)
    found = gradients_of(trainer)
    if exits == "sample":  # parameters that the exit does not reach have a gradient of zero
        right |= {n: torch.zeros_like(g) for n, g in found.items() if n not in right}
        assert_close(found, right)
        return
    assert_close(found, right)
    moved = {
        part for n in found for part in ("exits.0", "exits.1", "backbone.layers.3") if part in n
    }
    assert len(moved) == 3


@pytest.mark.parametrize("name", ["sft", "dpo", "grpo"])
def test_a_trainer_without_the_line_warns(
    name: str, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import logging

    logger = logging.get_logger("hf_familial.models.familial.modeling_base")
    logger.warning_once.cache_clear()  # type: ignore[attr-defined]
    make_trainer(name, folder, tmp_path, max_steps=1).train()
    assert [r for r in caplog.records if "hf_familial.multi_exit" in r.getMessage()]
    caplog.clear()
    logger.warning_once.cache_clear()  # type: ignore[attr-defined]
    make_trainer(name, folder, tmp_path, max_steps=1, wrap=hff.multi_exit).train()
    assert not [r for r in caplog.records if "hf_familial.multi_exit" in r.getMessage()]


def test_metrics_of_trl_are_logged_by_exit(folder: Path, tmp_path: Path) -> None:
    trainer = make_trainer("sft", folder, tmp_path, max_steps=2, wrap=hff.multi_exit)
    trainer.train()
    row = trainer.state.log_history[0]
    for name in ("loss", "mean_token_accuracy", "entropy"):
        by_exit = [row[f"exit_{k}_{name}"] for k in range(G)]
        assert len(set(by_exit)) > 1 or name == "mean_token_accuracy"
        assert row[name] == pytest.approx(sum(by_exit) / G, rel=1e-4)
    metrics = trainer.evaluate(TEXT)
    assert {f"eval_exit_{k}_loss" for k in range(G)} <= metrics.keys()


@pytest.mark.parametrize("name", ["sft", "dpo_lora", "grpo_reference"])
@pytest.mark.parametrize("exits", ["all", "sample"])
def test_a_resumed_run_equals_an_unbroken_one(
    exits: str, name: str, folder: Path, tmp_path: Path
) -> None:
    given = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2}
    given["wrap"] = lambda base: hff.multi_exit(base, exits=exits)
    whole = make_trainer(name, folder, tmp_path, **given)
    whole.train()
    resumed = make_trainer(name, folder, tmp_path, **given)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for parameter, tensor in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[parameter], tensor, msg=parameter)
    assert resumed.state.total_flos == pytest.approx(whole.state.total_flos)


@pytest.mark.parametrize("iterations", [1, 2])
def test_ratios_are_of_the_drawn_exit(iterations: int, folder: Path, tmp_path: Path) -> None:
    """At the first step on a generation the policy is the one that generated: every ratio is 1."""
    trainer = make_trainer(
        "grpo", folder, tmp_path, max_steps=6, num_iterations=iterations, learning_rate=1e-3,
        wrap=lambda base: hff.multi_exit(base, exits="sample"),
    )  # fmt: skip
    drawn: list[int] = []
    draw, compute = trainer._drawn_exit, trainer.compute_loss

    def compute_loss(model: Any, inputs: Any, *args: Any, **given: Any) -> Any:
        drawn.append(draw())
        old = inputs.get("old_per_token_logps")
        if old is not None and trainer.state.global_step % iterations == 0:
            ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
            mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
            with torch.no_grad():
                logits = model(ids, attention_mask=mask, exit_idx=drawn[-1]).logits
            logps = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
            kept = inputs["completion_mask"].bool()
            new = logps[:, -old.shape[1] :]
            torch.testing.assert_close(new[kept], old[kept], rtol=1e-4, atol=1e-4)
        return compute(model, inputs, *args, **given)

    trainer.compute_loss = compute_loss
    trainer.train()
    assert len(drawn) == 6
    assert len(set(drawn)) > 1
    if iterations == 2:
        assert drawn[::2] == drawn[1::2]


def test_an_adapter_on_a_head_that_the_loss_would_ignore_is_rejected(
    folder: Path, tmp_path: Path
) -> None:
    from peft import LoraConfig

    trainer = make_trainer("sft", folder, tmp_path, max_steps=1, wrap=hff.multi_exit,
                           peft_config=LoraConfig(target_modules="all-linear", r=4))  # fmt: skip
    with pytest.raises(ValueError, match=r"exit_heads.*exclude_modules"):
        trainer.train()


def test_an_adapter_of_every_exit_reloads_merges_and_exports(folder: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    trainer = make_trainer("sft_lora", folder, tmp_path, max_steps=3, learning_rate=1e-2,
                           wrap=hff.multi_exit)  # fmt: skip
    trainer.train()
    trainer.save_model(tmp_path / "adapter")
    ids = torch.tensor([[10, 20, 30, 40]])
    trainer.model.eval()
    family = hff.FamilialForCausalLM.from_pretrained(folder)
    merged = PeftModel.from_pretrained(family, tmp_path / "adapter").eval().merge_and_unload()
    assert isinstance(merged, hff.FamilialForCausalLM)
    for k in range(G):
        right = trainer.model(ids, exit_idx=k).logits
        torch.testing.assert_close(merged(ids, exit_idx=k).logits, right, rtol=1e-4, atol=1e-4)
        hff.export_exit(merged, k, tmp_path / f"member{k}")
        member = AutoModelForCausalLM.from_pretrained(tmp_path / f"member{k}").eval()
        torch.testing.assert_close(member(ids).logits, right, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("exits", ["all", "sample"])
@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_two_processes_train_like_one(name: str, exits: str, folder: Path, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import json, os, sys
            sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parent.parent)]!r}
            from pathlib import Path
            from test_trl import make_trainer
            import hf_familial as hff
            size = 4 // int(os.environ.get("WORLD_SIZE", 1))
            trainer = make_trainer({name!r}, Path({str(folder)!r}), Path({str(tmp_path)!r}),
                max_steps=3, per_device_train_batch_size=size, learning_rate=1e-2,
                gradient_accumulation_steps=2,
                wrap=lambda base: hff.multi_exit(base, exits={exits!r}))
            trainer.train()
            if trainer.args.process_index == 0:
                rows = [row for row in trainer.state.log_history if "loss" in row]
                total = sum(p.double().square().sum().item() for p in trainer.model.parameters())
                print("RESULT", json.dumps([[row["loss"] for row in rows], total]))
            """
        )
    )
    results = []
    for start in ([], ["-m", "torch.distributed.run", "--nproc_per_node", "2"]):
        done = subprocess.run(
            [sys.executable, *start, script], capture_output=True, text=True, timeout=300
        )
        lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
        assert lines, done.stderr[-2000:]
        results.append(json.loads(lines[0].removeprefix("RESULT")))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-4)
    assert results[1][1] == pytest.approx(results[0][1], rel=1e-5)
