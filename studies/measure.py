"""Numbers of a study, computed from its rows."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats
from scipy.optimize import least_squares

from hf_familial.scaling import (
    BiasWarning,
    ColumnChoice,
    DerivedQuantity,
    Fit,
    RunTable,
    ScalingError,
    compute_leverage,
    fit,
    get_law,
    granularity_compute,
    intervals,
    load_runs,
    loss_leverage,
    parabolas,
    seed_noise,
    size_exponent,
)
from hf_familial.scaling.leverage import even_members


LOSSES = ("eval_mean", "eval_final")
LAWS = ("familial", "familial_e_inside", "familial_n_only")
SIZES = ("non_embedding", "total")
TOKENS = ("exact", "six_nd")


@dataclass(frozen=True)
class Counted:
    """A FLOP model from the rows of a study: FLOPs per token, interpolated between sizes.

    Attributes:
        logs (`Mapping[int, np.ndarray]`): For each G, the logarithms of N and of FLOPs per token,
            in ascending order.
    """

    logs: Mapping[int, np.ndarray]

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]], size: str) -> Counted:
        """Build the model from rows. `size` selects how N counts, as in the fit."""
        points: dict[int, set[tuple[float, float]]] = {}
        for row in rows:
            point = (math.log(row[f"N_{size}"]), math.log(row["C_flops"] / row["D_tokens"]))
            points.setdefault(row["G"], set()).add(point)
        return cls({G: np.array(sorted(found)).T for G, found in points.items()})

    def __call__(self, N: Any, D: Any, G: Any) -> Any:
        """Return the FLOPs. Outside the sizes of the runs, the last slope continues."""
        x, (known, cost) = np.log(np.asarray(N, float)), self.logs[int(np.max(G))]
        inside = np.interp(x, known, cost)
        below = (x - known[0]) * (cost[1] - cost[0]) / (known[1] - known[0])
        above = (x - known[-1]) * (cost[-1] - cost[-2]) / (known[-1] - known[-2])
        return np.exp(inside + np.minimum(below, 0) + np.maximum(above, 0)) * D


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """Return the finished runs."""
    lines = (folder / "runs.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [row for row in rows if row["status"] == "finished"]


def observed(folder: Path, law: str, loss: str, size: str, tokens: str = "exact") -> RunTable:
    """Return the rows as variables of a law. With `six_nd`, D is C / 6N instead of the tokens."""
    data = load_runs(folder / "runs.jsonl", get_law(law), ColumnChoice(size=size, loss=loss)).data
    if tokens == "exact":
        return data
    columns = dict(data.columns)
    columns["D"] = columns["C"] / (6 * columns["N"])
    return replace(data, columns=columns)


def estimate(found: Fit, quantity: str | DerivedQuantity) -> dict[str, Any]:
    """Return a value and its intervals by two methods, `None` where there is no interval."""
    name = quantity if isinstance(quantity, str) else quantity.name
    value = found.values[name] if isinstance(quantity, str) else float(quantity.of(found.values))
    row: dict[str, Any] = {"value": value}
    for method in ("delta", "profile") if isinstance(quantity, str) else ("delta",):
        try:
            interval = intervals(found, [quantity], method=method)[name]  # type: ignore[arg-type]
            row[method] = [interval.low, interval.high]
        except ScalingError:
            row[method] = None
    return row


def gammas(folder: Path) -> list[dict[str, Any]]:
    """Return gamma for each loss, law, way to count N, and way to count tokens."""
    found = []
    for loss in LOSSES:
        for law in LAWS:
            for size in SIZES:
                for tokens in TOKENS:
                    names = {"loss": loss, "law": law, "size": size, "tokens": tokens}
                    fitted = attempt(observed(folder, law, loss, size, tokens), law)
                    found.append(names | fitted)
    return found


def attempt(data: RunTable, law: str, coefficient: str = "gamma") -> dict[str, Any]:
    """Return the main numbers of one fit, or its error."""
    try:
        answer = fit(get_law(law), data)
    except ScalingError as error:
        return {"error": str(error)}
    off = np.log(answer.predict(**columns_for(answer, data)) / data.loss)
    rms = float(np.sqrt(np.mean(np.square(off))))
    return estimate(answer, coefficient) | {"rms": rms, "E": answer.values["E"], "rows": len(data)}


def columns_for(answer: Fit, data: RunTable) -> dict[str, np.ndarray]:
    """Return the variables of a law for all rows."""
    return {name: data.columns[name] for name in answer.law.variable_names}


def branches(folder: Path) -> list[dict[str, Any]]:
    """Return the exponents of shallower and deeper exits."""
    found = []
    for law in ("branch", "branch_e_inside"):
        data = observed(folder, law, "eval_exits", "non_embedding")
        for name in ("gamma_U", "gamma_V"):
            found.append({"law": law, "coefficient": name} | attempt(data, law, name))
    return found


def leverage(folder: Path, answer: Fit) -> list[dict[str, Any]]:
    """Return Efficiency Leverage and the compute cost of G at each budget of the runs."""
    rows = rows_of(folder)
    cost, found = Counted.of(rows, "non_embedding"), []
    budgets = sorted({float(f"{row['C_flops']:.1e}") for row in rows})
    for C in budgets:
        for G in sorted({row["G"] for row in rows} - {1}):
            members = even_members(G)
            asked = {
                "loss_leverage": loss_leverage(answer.law, C, members, "flops", cost),
                "compute_leverage": compute_leverage(answer.law, C, members, "flops", cost),
                "compute_of_G": granularity_compute(answer.law, G, C, cost),
            }
            found.append({"C": C, "G": G} | {k: estimate(answer, q) for k, q in asked.items()})
    return found


def pairs(folder: Path) -> list[dict[str, Any]]:
    """Return losses of G exits over those of the dense run of the same budget, size and seed."""
    rows, found = rows_of(folder), []

    def cell(row: Mapping[str, Any]) -> tuple[Any, ...]:
        return float(f"{row['C_flops']:.1e}"), row["backbone"]["hidden"], row["seed"]

    dense = {cell(row): row["eval_loss_final"] for row in rows if row["G"] == 1}
    several = [row for row in rows if row["G"] > 1 and cell(row) in dense]
    for C in (None, *sorted({cell(row)[0] for row in several})):
        for G in sorted({row["G"] for row in several}):
            chosen = [r for r in several if r["G"] == G and C in (None, cell(r)[0])]
            entry: dict[str, Any] = {"C": C, "G": G, "pairs": len(chosen)}
            for name in ("eval_loss_mean", "eval_loss_final"):
                ratios = [row[name] / dense[cell(row)] for row in chosen]
                entry[name] = [float(q) for q in np.quantile(ratios, (0.5, 0, 1))]
            found.append(entry)
    return found


def curves(folder: Path) -> list[dict[str, Any]]:
    """Return the minimum of a parabola through the sizes of each budget, for each G."""
    rows, found = rows_of(folder), []
    for loss in LOSSES:
        for G in sorted({row["G"] for row in rows}):
            entry: dict[str, Any] = {"loss": loss, "G": G}
            found.append(entry | drawn([row for row in rows if row["G"] == G], loss))
    dense = {row["loss"]: row.get("curves", ()) for row in found if row["G"] == 1}
    for entry in found:
        for curve, least in zip(entry.get("curves", ()), dense[entry["loss"]], strict=False):
            curve["ratio"] = curve["loss"] / least["loss"]
            curve["gamma"] = (
                math.log(curve["ratio"]) / math.log(entry["G"]) if entry["G"] > 1 else None
            )
    return found


def drawn(rows: Sequence[Mapping[str, Any]], loss: str) -> dict[str, Any]:
    """Return the parabolas of one G, and the line through their minima."""
    kind = loss.replace("eval", "eval_loss")
    names = ("C_flops", "N_non_embedding", kind, "D_tokens")
    columns = [[float(row[name]) for row in rows] for name in names]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", BiasWarning)  # `notes` contains its sentences
            answer = parabolas(*columns, scale="log", outside="keep")
    except ScalingError as error:
        return {"error": str(error)}
    line = answer.N.interval()
    return {
        "size_exponent": [answer.N.exponent, line.low, line.high],
        "notes": list(answer.notes),
        "curves": [
            {"C": c.budget, "N": c.N, "D": c.D, "loss": c.loss, "offset": c.offset}
            for c in answer.curves
        ],
    }


def rates(folder: Path) -> dict[str, Any]:
    """Fit the best learning rate of the short runs as a power law in N and G.

    The model is `log loss = c + q (log rate - log best)^2`. All runs share q. Runs of equal budget,
    size, G and batch share c. Only groups with three learning rates or more count.
    """
    cells: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows_of(folder / "proxy"):
        cell = (f"{row['C_flops']:.1e}", row["N_non_embedding"], row["G"], row["batch_tokens"])
        cells.setdefault(cell, []).append(row)
    groups = [group for group in cells.values() if len({row["lr"] for row in group}) >= 3]
    rows = [row for group in groups for row in group]
    cell_of = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    rate, N, G, loss = (
        np.log([row[name] for row in rows])
        for name in ("lr", "N_non_embedding", "G", "eval_loss_mean")
    )
    middle = N.mean()

    def residuals(guess: np.ndarray) -> np.ndarray:
        level, by_N, by_G, bend = guess[:4]
        off = rate - level - by_N * (N - middle) - by_G * G
        return loss - guess[4:][cell_of] - np.exp(bend) * off**2

    start = [rate.mean(), -0.5, 0.0, -5.0, *(loss[cell_of == i].min() for i in range(len(groups)))]
    found = least_squares(residuals, start)
    free = len(rows) - len(found.x)
    spread = np.linalg.inv(found.jac.T @ found.jac) * 2 * found.cost / free
    error = stats.t.ppf(0.975, free) * np.sqrt(np.diag(spread))
    best: dict[str, Any] = {"runs": len(rows), "cells": len(groups)}
    best["rms"] = math.sqrt(2 * found.cost / len(rows))
    best["at"] = {"N": math.exp(middle), "rate": math.exp(found.x[0])}
    for place, name in ((1, "N"), (2, "G")):
        value = float(found.x[place])
        best[name] = {"value": value, "delta": [value - error[place], value + error[place]]}
    return best


def analyse(folder: Path) -> tuple[dict[str, Any], Fit]:
    """Return every number of the study, and the fit for its report."""
    rows = rows_of(folder)
    data = observed(folder, "familial", "eval_mean", "non_embedding")
    answer = fit(get_law("familial"), data)
    noise = seed_noise(data, answer.law) if len({row["seed"] for row in rows}) > 1 else None
    results = {
        "runs": len(rows),
        "flops": sum(row["C_flops"] for row in rows),
        "tokens": sum(row["D_tokens"] for row in rows),
        "coefficients": {name: estimate(answer, name) for name in answer.free},
        "size_exponent": estimate(answer, size_exponent(answer.law, G=1.0)),
        "gammas": gammas(folder),
        "branches": branches(folder),
        "leverage": leverage(folder, answer),
        "pairs": pairs(folder),
        "curves": curves(folder),
        "rates": rates(folder),
        "seed_noise": None
        if noise is None
        else {
            "relative": noise.relative,
            "interval": [noise.interval.low, noise.interval.high],
            "settings": noise.settings,
        },
    }
    return results, answer
