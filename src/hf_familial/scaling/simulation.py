"""Simulated studies: a grid of runs at equal budgets, with losses of a known law plus noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from ..errors import ScalingError
from .data import RunTable
from .laws.law import Law
from .optima import best


def isoflop_design(
    law: Law,
    values: Mapping[str, float],
    budgets: Sequence[float],
    sizes: int = 7,
    reach: float = 4.0,
    centre: float = 1.0,
    drift: float = 1.0,
    **levels: Sequence[float],
) -> dict[str, np.ndarray]:
    """Plan runs of equal compute around the optimum of each budget, at C = 6ND.

    Args:
        law ([`Law`]): A law of N and D.
        values (`Mapping`): The parameters of the law.
        budgets (`Sequence[float]`): The budgets, in FLOPs per run.
        sizes (`int`): Number of sizes per budget, evenly spaced in logs.
        reach (`float`): Largest size divided by the central size.
        centre (`float`): Central size divided by the optimal size.
        drift (`float`): A factor on `centre` at the largest budget. It is 1 at the smallest budget
            and changes by the same factor from each budget to the next.
        levels (`Sequence[float]`): Values of the law's other variables, such as `G=[1, 2, 4]`. The
            design contains every combination.

    Returns:
        `dict[str, np.ndarray]`: Columns `N`, `D`, `C` and the other variables, of shape (runs,).

    Example:
        >>> law = get_law("familial"); values = law.published["assumed"].values
        >>> design = isoflop_design(law, values, [1e19, 1e20, 1e21], G=[1, 2, 4, 8])
        >>> len(design["N"])  # 3 budgets x 7 sizes x 4 values of G
        84
    """
    others = [name for name in law.variable_names if name not in ("N", "D")]
    if set(others) != set(levels):
        raise ScalingError(f"`{law.name}` needs levels of {others}, got {sorted(levels)}.")
    rows: list[dict[str, float]] = []
    given: dict[str, Any] = {name: float(levels[name][0]) for name in others}
    for number, C in enumerate(budgets):
        share = number / max(len(budgets) - 1, 1)
        middle = float(best(law, values, C, **given)[0]) * centre * drift**share
        for N in middle * np.geomspace(1 / reach, reach, sizes):
            for combination in np.ndindex(*(len(levels[name]) for name in others)):
                row = {n: float(levels[n][i]) for n, i in zip(others, combination, strict=True)}
                rows.append({"N": float(N), "D": C / (6 * float(N)), "C": C, **row})
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def simulate(
    law: Law,
    values: Mapping[str, float],
    columns: Mapping[str, Any],
    noise: float = 0.0,
    seed: int = 0,
    kind: Literal["relative", "absolute"] = "absolute",
    tails: float | None = None,
    repeats: int = 1,
    run_noise: float = 0.0,
) -> RunTable:
    """Simulate runs whose losses follow a law, with random noise.

    Args:
        law ([`Law`]): The true law.
        values (`Mapping`): The parameters of the law.
        columns (`Mapping`): The law's variables, of shape (rows,). Other columns are copied to
            the result. A column `run_id` names the runs.
        noise (`float`): Standard deviation of the noise of each row, see `kind`.
        seed (`int`): Seed of the random generator.
        kind (`str`): `"absolute"` adds noise in nats per token. `"relative"` adds it to the log of
            the loss.
        tails (`float`, *optional*): Degrees of freedom of Student's t, more than 2. By default
            the noise is normal.
        repeats (`int`): Number of runs per row.
        run_noise (`float`): Standard deviation of a noise that all rows of a run share.

    Returns:
        [`RunTable`]: The runs with their losses.

    Example:
        >>> runs = simulate(law, values, design, noise=0.01)  # as in `isoflop_design`
    """
    if tails is not None and tails <= 2:
        raise ScalingError(f"`tails` must be more than 2 degrees of freedom, got {tails}.")
    generator = np.random.default_rng(seed)
    table = {name: np.tile(np.asarray(column), repeats) for name, column in columns.items()}
    truth = law.predict(values, **{name: table[name] for name in law.variable_names})

    def draw(count: int) -> np.ndarray:
        if tails is None:
            return generator.standard_normal(count)
        return generator.standard_t(tails, count) * np.sqrt((tails - 2) / tails)

    error = noise * draw(len(truth))
    if "run_id" in table:
        if repeats > 1:
            copies = np.repeat(np.arange(repeats), len(truth) // repeats)
            pairs = zip(table["run_id"], copies, strict=True)
            table["run_id"] = np.array([f"{run}/{copy}" for run, copy in pairs])
        runs, cluster = np.unique(table["run_id"], return_inverse=True)
        error = error + run_noise * draw(len(runs))[cluster]
    table["loss"] = truth * np.exp(error) if kind == "relative" else truth + error
    run_id = "run_id" if "run_id" in table else None
    return RunTable.read(table, run_id=run_id, duplicates="keep")
