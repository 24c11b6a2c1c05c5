"""Functions that all benchmarks share: machine, interleaved timing, peak memory, last line."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers


RESULTS = Path(__file__).parent / "results"


def host() -> dict[str, Any]:
    """Return the versions and the processor of this machine."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def interleaved(
    variants: Mapping[str, Callable[[], None]], repeats: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Run all variants in turn after a warm-up. Return the seconds of every run by variant."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for step in range(repeats + 1):
        for name, run in variants.items():
            start = clock()
            run()
            if step:
                seconds[name].append(clock() - start)
    return seconds


def clock() -> Callable[[], float]:
    """Return processor time on a CPU, which other work does not disturb, else wall time."""
    if not torch.cuda.is_available():
        return time.process_time

    def synchronised() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return synchronised


def paired_ratio(first: list[float], second: list[float]) -> float:
    """Return the median ratio of two variants, run by run."""
    return statistics.median(a / b for a, b in zip(first, second, strict=True))


def child(*arguments: str) -> Any:
    """Run this script in a new process. Return the JSON of its last line."""
    command = [sys.executable, sys.argv[0], *arguments]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1])


def peak_mebibytes(reset: bool = False) -> float:
    """Return the peak resident memory of this process in MiB. `reset` starts anew (Linux)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    # `getrusage` would include the peak of the parent process
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


def finish(
    name: str,
    metrics: Mapping[str, float],
    targets: Mapping[str, tuple[str, float]],
    save: bool,
) -> int:
    """Print the last line of a benchmark and save it if asked. Return the exit code."""
    meets = {
        "<=": lambda value, goal: value <= goal,
        ">=": lambda value, goal: value >= goal,
    }
    missed = [k for k, (sign, goal) in targets.items() if not meets[sign](metrics[k], goal)]
    line = {
        "name": name,
        "host": host(),
        "metrics": {key: round(value, 4) for key, value in metrics.items()},
        "targets": {key: list(target) for key, target in targets.items()},
        "pass": not missed,
    }
    if save:
        RESULTS.mkdir(exist_ok=True)
        kind = "gpu" if torch.cuda.is_available() else "cpu"
        text = json.dumps(line, indent=2) + "\n"
        (RESULTS / f"{name}_{kind}.json").write_text(text, encoding="utf-8")
    for key in missed:
        sign, goal = targets[key]
        print(f"Goal missed: {key} is {metrics[key]:.3f}, should be {sign} {goal}")
    print(json.dumps(line))
    return 0
