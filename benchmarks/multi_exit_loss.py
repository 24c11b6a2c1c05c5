"""Time and memory of a training step for different numbers of exits.

    python benchmarks/multi_exit_loss.py            # about 9 minutes on one core
    python benchmarks/multi_exit_loss.py --quick    # under 50 seconds
    python benchmarks/multi_exit_loss.py --save     # also saves the result in benchmarks/results/

Forward and backward pass of a Llama (8 layers, width 384, 1024 tokens). All variants run in turn in
one process:

- dense: the ordinary model with logits and cross entropy;
- ours: the chunked loss of this package, and `fused`, the dense model with this loss;
- naive: one cross entropy per exit from its own logits, which are all kept for the backward pass;
- torch: `torch.nn.functional.linear_cross_entropy` per exit, with the best of its chunk sizes.

`step` is the time relative to the dense step, divided by the ratio of exact FLOPs. It is 1 if the
exits take no more time than their arithmetic. Memory is the peak of one step in a new process,
without the model.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable

import torch
from common import child, clock, finish, interleaved, paired_ratio, peak_mebibytes
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig

from hf_familial import FamilialConfig, FamilialForCausalLM, evenly_spaced_exits
from hf_familial.flops.counting import CPU_ATTENTION


LAYERS, WIDTH, TOKENS = 8, 384, 1024
GRANULARITIES = (1, 2, 4, 8)
TORCH_CHUNKS = (256, 512, 1024)
MEMORY_RUNS = 3  # the memory of a process varies from run to run
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def family(vocab_size: int, granularity: int) -> FamilialForCausalLM:
    """Return a family of one size in training mode."""
    torch.manual_seed(0)
    text_config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=6,
        num_key_value_heads=6,
    )
    exits = evenly_spaced_exits(LAYERS, granularity)
    config = FamilialConfig(text_config=text_config, exits=exits)
    return FamilialForCausalLM(config).train().to(DEVICE)


def loss_of(model: FamilialForCausalLM, ids: torch.Tensor, variant: str) -> torch.Tensor:
    """Return the loss of a step for one of the four variants."""
    if variant in ("ours", "fused"):
        return model(ids, labels=ids, use_cache=False, skip_logits=True).loss
    if variant == "dense":
        return model(ids, labels=ids, use_cache=False).loss
    if variant == "naive":
        # the logits of every exit are needed, so each exit uses the loss of Transformers
        return model(ids, labels=ids, use_cache=False, output_exits=True).loss
    options = torch.nn.LinearCrossEntropyOptions(
        batch_chunk_size=int(variant.removeprefix("torch"))
    )
    hidden = model.model(ids, use_cache=False, output_exits=True).exit_hidden_states
    targets = F.pad(ids, (0, 1), value=-100)[:, 1:].flatten()
    losses = [
        F.linear_cross_entropy(h.flatten(0, 1), model.lm_head.weight, targets, options=options)
        for h in hidden
    ]
    return torch.stack(losses).mean()


def step(model: FamilialForCausalLM, ids: torch.Tensor, variant: str) -> Callable[[], None]:
    """Run one forward and backward pass, then free the gradients."""

    def run() -> None:
        loss_of(model, ids, variant).backward()
        model.zero_grad(set_to_none=True)

    return run


def flops(model: FamilialForCausalLM, ids: torch.Tensor) -> int:
    """Return the exact FLOPs of a step, with the logits of every exit."""
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        loss_of(model, ids, "naive").backward()
    model.zero_grad(set_to_none=True)
    return counter.get_total_flops()


def batch(vocab_size: int) -> torch.Tensor:
    """Return one batch of tokens, shape `(4, 256)`."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocab_size, (4, TOKENS // 4), generator=generator).to(DEVICE)


def time_steps(vocab_size: int, granularities: tuple[int, ...], repeats: int) -> dict[str, float]:
    """Return the ratios of times for one vocabulary."""
    ids = batch(vocab_size)
    models = {g: family(vocab_size, g) for g in {1, *granularities}}
    variants = {"dense": step(models[1], ids, "dense"), "fused": step(models[1], ids, "fused")}
    for g in granularities:
        names = ["ours", "naive", *(f"torch{chunk}" for chunk in TORCH_CHUNKS if g == 4)]
        variants |= {f"{name}_G{g}": step(models[g], ids, name) for name in names if g > 1}
    seconds = interleaved(variants, repeats, clock())
    ideal = {g: flops(models[g], ids) / flops(models[1], ids) for g in granularities}
    metrics = {f"fused_over_dense_V{vocab_size}": paired_ratio(seconds["fused"], seconds["dense"])}
    for g in granularities:
        if g == 1:
            continue
        ours, suffix = seconds[f"ours_G{g}"], f"G{g}_V{vocab_size}"
        metrics[f"flop_ratio_{suffix}"] = ideal[g]
        metrics[f"step_{suffix}"] = paired_ratio(ours, seconds["dense"]) / ideal[g]
        naive = seconds[f"naive_G{g}"]
        metrics[f"naive_step_{suffix}"] = paired_ratio(naive, seconds["dense"]) / ideal[g]
        if g == 4:
            rivals = [seconds[f"torch{chunk}_G{g}"] for chunk in TORCH_CHUNKS]
            metrics[f"over_torch_{suffix}"] = max(paired_ratio(ours, rival) for rival in rivals)
    return metrics


def measure_memory(vocab_size: int, granularity: int, variant: str) -> float:
    """Return the peak memory of one step above the model in MiB. Needs a new process."""
    model, ids = family(vocab_size, granularity), batch(vocab_size)
    if DEVICE == "cuda":
        before = torch.cuda.memory_allocated() / 2**20
        step(model, ids, variant)()
        return torch.cuda.max_memory_allocated() / 2**20 - before
    before = peak_mebibytes(reset=True)
    step(model, ids, variant)()
    return peak_mebibytes() - before


def memory(vocab_size: int, granularities: tuple[int, ...]) -> dict[str, float]:
    """Return median peaks in MiB of new processes, and their ratios, for one vocabulary."""
    runs = [("dense", 1), ("fused", 1), ("naive", 4), ("torch512", 4)]
    runs += [("ours", g) for g in granularities if g > 1]
    peaks = {
        f"{name}_G{g}": statistics.median(
            child("--memory", name, "--vocab", str(vocab_size), "--exits", str(g))
            for _ in range(MEMORY_RUNS)
        )
        for name, g in runs
    }
    metrics = {f"memory_{key}_V{vocab_size}_mib": value for key, value in peaks.items()}
    ours = peaks["ours_G4"]
    for rival in ("naive_G4", "fused_G1", "torch512_G4", "dense_G1"):
        metrics[f"memory_G4_over_{rival.split('_')[0]}_V{vocab_size}"] = ours / peaks[rival]
    if 8 in granularities:
        growth = peaks["ours_G8"] / peaks["ours_G2"]
        metrics[f"memory_G8_over_G2_V{vocab_size}"] = growth
    return metrics


def targets(metrics: dict[str, float]) -> dict[str, tuple[str, float]]:
    """Return the goals for the measured numbers."""
    goals = {
        "step_G4": ("<=", 1.0),
        "step_G8": ("<=", 1.0),
        "over_torch_G4": ("<=", 1.05),
        "memory_G4_over_naive_V32768": ("<=", 0.40),
        "memory_G4_over_fused_V32768": ("<=", 1.10),
        "memory_G4_over_torch512_V32768": ("<=", 1.0),
        "memory_G8_over_G2_V32768": ("<=", 1.10),
    }
    return {key: goal for key in metrics for start, goal in goals.items() if key.startswith(start)}


def main() -> int:
    """Measure, print the numbers, and end with one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="Use one vocabulary and fewer runs.")
    parser.add_argument("--save", action="store_true", help="Save in benchmarks/results/.")
    parser.add_argument("--repeats", type=int, default=None)
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    parser.add_argument("--vocab", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--exits", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.memory:
        print(measure_memory(args.vocab, args.exits, args.memory))
        return 0
    granularities = (1, 4) if args.quick else GRANULARITIES
    metrics: dict[str, float] = {}
    for vocab_size in (8192,) if args.quick else (8192, 32768):
        repeats = args.repeats or (2 if args.quick else 5 if vocab_size == 8192 else 3)
        metrics |= time_steps(vocab_size, granularities, repeats)
        metrics |= memory(vocab_size, granularities)
    for key, value in metrics.items():
        print(f"{key:45s} {value:10.3f}")
    return finish("multi_exit_loss", metrics, targets(metrics), args.save)


if __name__ == "__main__":
    sys.exit(main())
