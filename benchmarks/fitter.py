"""Speed of the fitter: point fits, bootstrap refits, many rows, and another fitter.

    python benchmarks/fitter.py            # all starts of the other fitter
    python benchmarks/fitter.py --quick    # fewer starts and rows
    python benchmarks/fitter.py --save     # also saves the result in benchmarks/results/

One thread. The rows are the 240 runs that Epoch AI read from a figure of Hoffmann et al., if the
file exists (in HF_FAMILIAL_DATA or shared/data), else invented rows of the same shape. Times are
processor seconds, medians of interleaved repeats. The other fitter is `chinchilla` from PyPI with
the grid of 3125 starts of its README. `--quick` times 32 starts and scales the result.
"""

import argparse
import csv
import itertools
import os
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from common import finish, interleaved

from hf_familial.scaling import LargestLosses, RunTable, fit, get_law, refit


REPOSITORY = Path(__file__).resolve().parents[1]
FOLDERS = [
    Path(os.environ.get("HF_FAMILIAL_DATA", "")),
    REPOSITORY / "shared" / "data",
    REPOSITORY.parent / "shared" / "data",
]
EPOCH = Path("epoch_chinchilla") / "svg_extracted_data.csv"
OPTIMUM = 1.01827401780e-3  # objective of the 240 runs: Huber loss of log losses, delta 1e-3
REPLICATES = 1000
ONE_THREAD = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")}


def dense_runs(rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Return invented dense runs in the ranges of Hoffmann et al., with 0.5% noise."""
    rng = np.random.default_rng(seed)
    low, high = np.log([[5e7], [5e8]]), np.log([[2e10], [5e11]])
    size, data = np.exp(rng.uniform(low, high, (2, rows)))
    law = get_law("hoffmann")
    loss = law.predict(law.published["besiroglu"].values, N=size, D=data)
    return {"N": size, "D": data, "loss": loss * np.exp(0.005 * rng.standard_normal(rows))}


def epoch_runs() -> RunTable | None:
    """Return the 240 runs if the file exists."""
    for folder in FOLDERS:
        if not (folder / EPOCH).is_file():
            continue
        with (folder / EPOCH).open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        size, compute, loss = (
            np.array([float(row[name]) for row in rows])
            for name in ("Model Size", "Training FLOP", "loss")
        )
        runs = {"N": size, "D": compute / (6 * size), "loss": loss}
        return fit("hoffmann", runs, outliers=LargestLosses(5)).data
    return None


def familial_runs() -> RunTable:
    """Return 84 invented runs (3 budgets, 7 sizes, 4 granularities) with 0.3% noise."""
    grid = itertools.product((1e19, 1e20, 1e21), np.geomspace(1 / 8, 8, 7), (1.0, 2.0, 4.0, 8.0))
    rows = [(c**0.5 * 0.1 * m, c / 6 / (c**0.5 * 0.1 * m), g) for c, m, g in grid]
    size, data, exits = np.array(rows).T
    law = get_law("familial")
    loss = law.predict(law.published["assumed"].values, N=size, D=data, G=exits)
    noise = np.exp(0.003 * np.random.default_rng(0).standard_normal(len(rows)))
    return RunTable.read({"N": size, "D": data, "G": exits, "loss": loss * noise})


def bootstrap_seconds(law: str, data: RunTable, repeats: int) -> float:
    """Return the processor seconds of 1000 refits."""
    answer = fit(law, data)
    rows = len(data)
    counts = np.random.default_rng(0).multinomial(rows, np.full(rows, 1 / rows), size=REPLICATES)
    times = interleaved({law: lambda: refit(answer, counts)}, repeats, time.process_time)[law]
    return statistics.median(times)


def peer(data: RunTable, levels: int) -> Any:
    """Return `chinchilla` with its README's grid or the grid's corners, `None` if not installed."""
    try:
        import chinchilla
        from chinchilla._metrics import log_huber
    except ImportError:
        return None
    ranges = {"E": (1, 2), "a": (1, 10), "b": (1, 10), "alpha": (0.1, 0.7), "beta": (0.1, 0.7)}
    grid = {name: np.linspace(low, high, levels) for name, (low, high) in ranges.items()}
    rival = chinchilla.Chinchilla(
        tempfile.mkdtemp(),
        param_grid=grid,
        loss_fn=lambda truth, predicted: log_huber(truth, predicted, delta=1e-3),
        log_level=40,
    )
    for n, d, loss in zip(data.columns["N"], data.columns["D"], data.loss, strict=True):
        rival.database.append(N=n, D=d, loss=loss)
    return rival


def against_peer(data: RunTable, levels: int) -> dict[str, float]:
    """Return the seconds for all starts of the other fitter, and its objective."""
    rival = peer(data, levels)
    if rival is None:
        print("Not compared: `pip install chinchilla==0.2.0` installs the other fitter.")
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        start = time.process_time()
        rival.fit(parallel=False)
        seconds = time.process_time() - start
    p = rival.params
    values = {name: p[name] for name in ("E", "A", "B", "alpha", "beta")}
    predicted = get_law("hoffmann").predict(values, N=data.columns["N"], D=data.columns["D"])
    size = np.abs(np.log(predicted) - np.log(data.loss))
    inner = np.minimum(size, 1e-3)
    return {
        "peer_s": seconds * 5**5 / levels**5,
        "peer_objective_e3": 1e3 * float((inner * (size - inner / 2)).sum()),
    }


def main() -> int:
    """Measure, print the numbers, and end with one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="Use fewer starts and rows.")
    parser.add_argument("--save", action="store_true", help="Save in benchmarks/results/.")
    args = parser.parse_args()
    if not ONE_THREAD.items() <= os.environ.items():
        # libraries read these variables at import
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ONE_THREAD})
    epoch = epoch_runs()
    data = epoch or RunTable.read(dense_runs(240))
    repeats = 5 if args.quick else 15
    times = interleaved({"fit": lambda: fit("hoffmann", data)}, repeats, time.process_time)["fit"]
    answer = fit("hoffmann", data)
    metrics = {
        "published_runs": float(epoch is not None),
        "fit_240_s": statistics.median(times),
        "objective_e3": 1e3 * answer.objective,
        "agreement": answer.exact_agreement,
        "refit_240_ms": bootstrap_seconds("hoffmann", data, 2 if args.quick else 5),
        "bootstrap_familial_84_s": bootstrap_seconds("familial", familial_runs(), 2),
    }
    for rows in (1_000, 10_000) if args.quick else (1_000, 10_000, 100_000):
        many = RunTable.read(dense_runs(rows))
        start = time.process_time()
        fit("hoffmann", many)
        metrics[f"fit_{rows}_s"] = time.process_time() - start
    last = max(int(key.split("_")[1]) for key in metrics if key.startswith("fit_"))
    per_row = {n: metrics[f"fit_{n}_s"] / n for n in (1_000, last)}
    metrics["growth_over_linear"] = per_row[last] / per_row[1_000]
    metrics |= against_peer(data, 2 if args.quick else 5)
    targets = {
        "fit_240_s": ("<=", 0.05),
        "refit_240_ms": ("<=", 12.0),
        "bootstrap_familial_84_s": ("<=", 15.0),
        "growth_over_linear": ("<=", 1.5),
    }
    if epoch is not None:
        targets["objective_e3"] = ("<=", 1e3 * OPTIMUM * (1 + 1e-6))
    if "peer_s" in metrics:
        metrics["peer_over_ours"] = metrics["peer_s"] / metrics["fit_240_s"]
        metrics["peer_objective_over_ours"] = metrics["peer_objective_e3"] / metrics["objective_e3"]
        targets |= {"peer_over_ours": (">=", 50.0), "peer_objective_over_ours": (">=", 1.0)}
    for key, value in metrics.items():
        print(f"{key:30s} {value:12.5f}")
    return finish("fitter", metrics, targets, args.save)


if __name__ == "__main__":
    sys.exit(main())
