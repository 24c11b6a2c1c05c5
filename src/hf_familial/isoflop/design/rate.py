"""How many FLOPs of training this machine does in a second: measured by training steps."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ...flops import training_flops_per_token
from ...models.familial import FamilialConfig, FamilialForCausalLM
from .plans import RunPlan


# tokens of a timed step: enough to be what a long one is, few enough to have many
STEP_TOKENS = 4096
SMALL = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 2048}
SMALL_LENGTH = 256


@dataclass(frozen=True)
class MachineRate:
    """Speed of training on one machine, by the cost of a token.

    Small models are slower: the rate between the measured points is a straight line in logarithms,
    beyond them it stays.

    Attributes:
        points (`tuple[tuple[float, float], ...]`): FLOPs per token and FLOP/s, rising.
        seconds (`float`): Seconds that were measured.
        machine (`str`): Device and number of threads.
    """

    points: tuple[tuple[float, float], ...]
    seconds: float
    machine: str

    def at(self, flops_per_token: float) -> float:
        """FLOP/s of training a model of this cost."""
        costs, rates = np.log(np.array(self.points)).T
        return float(np.exp(np.interp(np.log(flops_per_token), costs, rates)))

    def seconds_for(self, run: RunPlan) -> float:
        """Seconds of a run, its evaluations not counted."""
        return run.flops / self.at(run.flops_per_token)

    def total(self, runs: Iterable[RunPlan]) -> float:
        """Seconds of runs one after another."""
        return sum(map(self.seconds_for, runs))


def calibrate_rate(runs: Sequence[RunPlan] = (), seconds: float = 20.0) -> MachineRate:
    """Measure this machine by training steps: forward, backward, AdamW.

    The smallest, the middle and the largest model of a design share the time; without runs, a small
    Llama has it all. Every model makes at least one step, after one that is not timed, on random
    tokens, on the accelerator if there is one. The random state stays as it was.

    Args:
        runs (`Sequence[RunPlan]`, *optional*): Of the design that is to run here.
        seconds (`float`, *optional*, defaults to 20): Seconds of timed steps, about.

    Returns:
        [`MachineRate`]

    Raises:
        ValueError: If `seconds` is not positive.

    Example:
        >>> design.table(calibrate_rate(design.runs()))
    """
    if not seconds > 0:
        raise ValueError(f"`seconds` must be positive, got {seconds}.")
    models = _models(runs)
    accelerator = torch.accelerator.current_accelerator() if _has_accelerator() else None
    device = accelerator or torch.device("cpu")
    share = seconds / len(models)
    points = {}
    measured = 0.0
    for config, length in models:
        cost = training_flops_per_token(config, length).per_token
        tokens, took = _train(config, length, device, share)
        points[cost] = cost * tokens / took
        measured += took
    machine = f"{device.type}, {torch.get_num_threads()} threads"
    return MachineRate(tuple(sorted(points.items())), measured, machine)


def _has_accelerator() -> bool:
    return bool(torch.accelerator.is_available())


def _models(runs: Sequence[RunPlan]) -> list[tuple[FamilialConfig, int]]:
    """Configs and lengths to be measured."""
    if not runs:
        small = {"model_type": "llama", "intermediate_size": 384} | SMALL
        return [(FamilialConfig(text_config=small, exits=[4]), SMALL_LENGTH)]
    by_cost = {run.flops_per_token: run for run in runs}
    rising = [by_cost[cost] for cost in sorted(by_cost)]
    chosen = {0, len(rising) // 2, len(rising) - 1}
    return [(rising[i].config(), rising[i].seq_length) for i in sorted(chosen)]


def _train(
    config: FamilialConfig, length: int, device: torch.device, seconds: float
) -> tuple[int, float]:
    """Tokens trained on, and seconds that they took."""
    batch = max(1, STEP_TOKENS // length)
    with torch.random.fork_rng(), torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(0)
        model = FamilialForCausalLM(config).to(device).train()
        ids = torch.randint(0, config.vocab_size, (batch, length), device=device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

        def step() -> None:
            model(input_ids=ids, labels=ids, use_cache=False, skip_logits=True).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if device.type != "cpu":
                torch.accelerator.synchronize()

        step()  # the first one allocates
        steps, start = 0, time.perf_counter()
        while not steps or time.perf_counter() - start < seconds:
            step()
            steps += 1
        return steps * ids.numel(), time.perf_counter() - start
