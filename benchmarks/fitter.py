"""The fitter against the clock: point fits, bootstrap refits, many rows, a peer.

One thread. Rows are the 240 runs that Epoch AI read off Hoffmann et al.'s figure where the file is
present (HF_FAMILIAL_DATA or shared/data), else made-up ones of the same shape. Seconds are those
of the processor, medians of interleaved repeats. The peer is `chinchilla` from PyPI, its README's
grid of 3125 starts; quick runs time 32 of them and scale up.
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
OPTIMUM = 1.01827401780e-3  # of the 240 runs, Huber's function of log losses at 1e-3
REPLICATES = 1000
ONE_THREAD = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")}


def dense_runs(rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Made-up dense runs over the ranges of Hoffmann et al., noise 0.5%."""
    rng = np.random.default_rng(seed)
    low, high = np.log([[5e7], [5e8]]), np.log([[2e10], [5e11]])
    size, data = np.exp(rng.uniform(low, high, (2, rows)))
    law = get_law("hoffmann")
    loss = law.predict(law.published["besiroglu"].values, N=size, D=data)
    return {"N": size, "D": data, "loss": loss * np.exp(0.005 * rng.standard_normal(rows))}


def epoch_runs() -> RunTable | None:
    """The 240 runs, where they are."""
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
    """84 made-up runs: 3 budgets, 7 sizes, 4 granularities; noise 0.3%."""
    grid = itertools.product((1e19, 1e20, 1e21), np.geomspace(1 / 8, 8, 7), (1.0, 2.0, 4.0, 8.0))
    rows = [(c**0.5 * 0.1 * m, c / 6 / (c**0.5 * 0.1 * m), g) for c, m, g in grid]
    size, data, exits = np.array(rows).T
    law = get_law("familial")
    loss = law.predict(law.published["assumed"].values, N=size, D=data, G=exits)
    noise = np.exp(0.003 * np.random.default_rng(0).standard_normal(len(rows)))
    return RunTable.read({"N": size, "D": data, "G": exits, "loss": loss * noise})


def bootstrap_seconds(law: str, data: RunTable, repeats: int) -> float:
    """Processor seconds of 1000 refits."""
    answer = fit(law, data)
    rows = len(data)
    counts = np.random.default_rng(0).multinomial(rows, np.full(rows, 1 / rows), size=REPLICATES)
    times = interleaved({law: lambda: refit(answer, counts)}, repeats, time.process_time)[law]
    return statistics.median(times)


def peer(data: RunTable, levels: int) -> Any:
    """`chinchilla` with its README's grid, or its corners; None where it is not installed."""
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
    """Seconds and objective of the peer, on one thread; seconds scaled to all its starts."""
    rival = peer(data, levels)
    if rival is None:
        print("no peer: pip install chinchilla==0.2.0")
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
    """Measure, print, end with one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer starts of the peer, fewer rows")
    parser.add_argument("--save", action="store_true", help="keep the result")
    args = parser.parse_args()
    if not ONE_THREAD.items() <= os.environ.items():
        # libraries read these when they are loaded
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
