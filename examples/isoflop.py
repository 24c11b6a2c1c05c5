"""An IsoFLOP study in one file: train a grid of small families, then fit the law of families.

    python examples/isoflop.py

A budget of C FLOPs can train a small model on many tokens, or a larger model on fewer. The script
trains five sizes for each budget and each number of exits G. The size with the lowest loss is the
best one for the budget. A law L(N, D, G) is fitted to all runs. It shows how exits change the loss.

The 30 runs take about seven minutes on two cores. You can stop the script and start it again. It
skips runs with a row in `outputs/isoflop/runs.jsonl`. For long runs and many machines use
`hf-familial sweep`, which also continues a run from its checkpoint.

Output: the best size of each budget, the coefficients of the law, and a sentence such as "gamma is
between 0.0319 and 0.0360 (95 %): loss grows as G^gamma". `outputs/isoflop/isoflop.png` shows the
losses.
"""

from itertools import product
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from transformers import LlamaConfig, TrainerCallback, default_data_collator, set_seed

from hf_familial import (
    FamilialConfig,
    FamilialForCausalLM,
    FamilialTrainer,
    FamilialTrainingArguments,
    evenly_spaced_exits,
)
from hf_familial.errors import ScalingError
from hf_familial.flops import training_flops_per_token
from hf_familial.runs import RunRecord, read_runs
from hf_familial.scaling import fit, intervals
from hf_familial.training import DataArguments, PackedData, RunRecordCallback, prepare_data


BUDGETS = (1e11, 4e11, 1.6e12)  # FLOPs of a run: forward and backward pass, all exits and heads
SHAPES = ((16, 4), (32, 4), (48, 4), (64, 4), (96, 4))  # width and depth
GRANULARITIES = (1, 4)  # numbers of exits; 1 is the dense model
BATCH, LEARNING_RATE, SEED = 4, 8e-3, 0
TEXT = DataArguments(vocab_size=512, seq_length=128, eval_fraction=0.05, max_eval_tokens=65_536)


def family(width: int, depth: int, G: int) -> FamilialConfig:
    """Return the config of a Llama with G evenly spaced exits."""
    text_config = LlamaConfig(
        hidden_size=width,
        intermediate_size=round(8 / 3 * width / 16) * 16,
        num_hidden_layers=depth,
        num_attention_heads=width // 16,
        head_dim=16,
        vocab_size=TEXT.vocab_size,
        max_position_embeddings=TEXT.seq_length,
        tie_word_embeddings=True,
    )
    return FamilialConfig(text_config=text_config, exits=evenly_spaced_exits(depth, G))


def train(
    config: FamilialConfig, steps: int, data: PackedData, folder: Path, row: TrainerCallback
) -> None:
    """Train a new family for `steps` steps and evaluate it at the end."""
    args = FamilialTrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        weight_decay=0.1,
        adam_beta2=0.95,
        eval_strategy="steps",
        eval_steps=steps,
        logging_steps=0.1,
        save_strategy="no",
        per_device_eval_batch_size=64,
        seed=SEED,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.accelerator.is_available(),
    )
    set_seed(SEED)  # the same backbone weights for every G of a shape
    FamilialTrainer(
        FamilialForCausalLM(config),
        args,
        train_dataset=data.train,
        eval_dataset=data.eval,
        data_collator=default_data_collator,
        callbacks=[row],
    ).train()


def main(folder: Path = Path("outputs/isoflop")) -> None:
    """Train the missing runs, then show the best sizes and the law."""
    data, _ = prepare_data(TEXT)
    path = folder / "runs.jsonl"
    done = {run.run_id for run in read_runs(path)} if path.exists() else set()
    for budget, (width, depth), G in product(BUDGETS, SHAPES, GRANULARITIES):
        name = f"C{budget:.3g}-{width}x{depth}-G{G}"
        if name in done:
            continue
        config = family(width, depth, G)
        per_token = training_flops_per_token(config, TEXT.seq_length).per_token
        steps = max(1, round(budget / per_token / (BATCH * TEXT.seq_length)))
        print(f"{name}: {steps} steps")
        row = RunRecordCallback(str(path), name, data.name, TEXT.seq_length)
        train(config, steps, data, folder, row)
    show(read_runs(path), folder)


def show(runs: list[RunRecord], folder: Path) -> None:
    """Print the minimum of every curve and the fitted law, and draw the curves."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot(xscale="log", xlabel="parameters N", ylabel="mean loss, nats/token")
    print("      C   G   best N     loss there")
    for budget, G in product(BUDGETS, GRANULARITIES):
        curve = [r for r in runs if r.G == G and r.run_id.startswith(f"C{budget:.3g}-")]
        N = np.array([r.N_non_embedding for r in curve])
        loss = np.array([r.eval_loss_mean for r in curve])
        a, b, c = np.polyfit(np.log(N), loss, 2)  # a parabola in log N
        best = np.exp(-b / (2 * a)) if a > 0 else np.nan
        print(f"{budget:8.2g}  {G:2}  {best:8.3g}  {c - b * b / (4 * a):8.4f}")
        axes.plot(N, loss, "o-" if G == 1 else "s--", label=f"C = {budget:.2g}, G = {G}")
    axes.legend(frameon=False)
    figure.savefig(folder / "isoflop.png", dpi=150)

    columns = {"N": "N_non_embedding", "D": "D_tokens", "G": "G", "loss": "eval_loss_mean"}
    table = {name: [getattr(r, field) for r in runs] for name, field in columns.items()}
    try:
        law = fit("familial", table)
        gamma = intervals(law, ["gamma"])["gamma"]
    except ScalingError as error:
        print(f"No law was fitted: {error}")
        return
    print(law.law.formula_text, {name: float(f"{x:.4g}") for name, x in law.values.items()})
    print(f"gamma is between {gamma.low:.4f} and {gamma.high:.4f} (95 %): loss grows as G^gamma")


if __name__ == "__main__":
    main()
