"""Time that FamilialTrainer adds to a step of the Trainer of Transformers.

    python benchmarks/trainer_overhead.py            # about 2 minutes on one core
    python benchmarks/trainer_overhead.py --quick    # under 50 seconds
    python benchmarks/trainer_overhead.py --save     # also saves the result in benchmarks/results/

Both train copies of a tiny family (2 layers, width 64, 2 exits) on the same rows with the same
arguments, in segments that take turns in one process. The collator requests no logits, so the model
does the same work in both. The difference is the trainer: objective, losses of the exits in the
logs, FLOPs. Times are medians of the processor time between the ends of two steps.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from typing import Any

import torch
from common import clock, finish
from datasets import Dataset
from transformers import (
    LlamaConfig,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    default_data_collator,
)

from hf_familial import (
    FamilialConfig,
    FamilialForCausalLM,
    FamilialTrainer,
    FamilialTrainingArguments,
)


STEPS, WARM_UP, LOG_EVERY = 60, 10, 5
OBJECTIVES: dict[str, dict[str, Any]] = {
    "plain": {},
    "scheduled": {"exit_weights": "linear", "exit_schedule": "decay"},
    "accumulated": {"gradient_accumulation_steps": 4},
}


class StepClock(TrainerCallback):
    """A callback that records the time at the end of every optimiser step."""

    def __init__(self) -> None:
        self.now, self.ends = clock(), list[float]()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Record the time."""
        self.ends.append(self.now())


def family() -> FamilialForCausalLM:
    """Return a model so small that the time of the trainer is visible."""
    torch.manual_seed(0)
    text_config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    return FamilialForCausalLM(FamilialConfig(text_config=text_config, exits=[1, 2]))


def rows() -> Dataset:
    """Return sequences of 32 tokens for every step of a segment."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 512, (8 * STEPS, 32), generator=generator).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def collate(features: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a batch that requests no logits from the model."""
    return default_data_collator(features) | {"skip_logits": True}


def segment(kind: type[Trainer], data: Dataset, folder: str, objective: dict[str, Any]) -> float:
    """Return the median milliseconds of a step of one run, without the warm-up."""
    args = FamilialTrainingArguments(
        folder,
        max_steps=STEPS,
        per_device_train_batch_size=2,
        logging_steps=LOG_EVERY,
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=False,
        disable_tqdm=True,
        **objective,
    )
    steps = StepClock()
    trainer = kind(family(), args, collate, train_dataset=data, callbacks=[steps])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    ends = steps.ends[WARM_UP:]
    # every window of steps includes its share of logging
    window = LOG_EVERY * 2
    spans = [b - a for a, b in zip(ends, ends[window:], strict=False)]
    return 1000 * statistics.median(spans) / window


def measure(objective: dict[str, Any], segments: int) -> dict[str, float]:
    """Return the milliseconds of a step with both trainers, and their difference."""
    data = rows()
    times: dict[type[Trainer], list[float]] = {Trainer: [], FamilialTrainer: []}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(segments + 1):
            # also alternate the order
            for kind in sorted(times, key=lambda kind: kind.__name__, reverse=bool(turn % 2)):
                milliseconds = segment(kind, data, folder, objective)
                if turn:
                    times[kind].append(milliseconds)
    ours, host = times[FamilialTrainer], times[Trainer]
    added = statistics.median(a - b for a, b in zip(ours, host, strict=True))
    return {
        "host_ms": statistics.median(host),
        "ours_ms": statistics.median(ours),
        "added_ms": added,
    }


def main() -> int:
    """Measure, print the numbers, and end with one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="Run fewer segments.")
    parser.add_argument("--save", action="store_true", help="Save in benchmarks/results/.")
    args = parser.parse_args()
    torch.set_num_threads(1)
    metrics: dict[str, float] = {}
    for name, objective in OBJECTIVES.items():
        found = measure(objective, segments=2 if args.quick else 10)
        metrics |= {f"{key}_{name}": value for key, value in found.items()}
    for key, value in metrics.items():
        print(f"{key:30s} {value:8.3f}")
    targets = {key: ("<=", 0.5) for key in metrics if key.startswith("added_ms")}
    return finish("trainer_overhead", metrics, targets, args.save)


if __name__ == "__main__":
    sys.exit(main())
