"""Analyses of made-up runs, for the tests of reports and commands."""

import numpy as np

from hf_familial.scaling import RunTable, fit, get_law
from hf_familial.scaling.optima import best
from hf_familial.scaling.report import DataSource, analyse


BUDGETS = (1e19, 1e20, 1e21)


def rows_of(law, noise=0.002, settings=({},), seed=0):
    """Runs on IsoFLOP curves around the law's optimum, as columns."""
    law = get_law(law)
    values = next(iter(law.published.values())).values
    columns = {name: [] for name in ("run_id", "C", *law.variable_names)}
    for flops in BUDGETS:
        for setting in settings:
            middle = float(best(law, values, flops, **setting)[0])
            for size in middle * np.geomspace(0.25, 4, 7):
                run = {"N": size, "D": flops / (6 * size), "C": flops, **setting}
                for name, value in run.items():
                    columns[name].append(value)
                columns["run_id"].append(f"run-{len(columns['run_id'])}")
    arrays = {name: np.array(column) for name, column in columns.items()}
    exact = law.predict(values, **{name: arrays[name] for name in law.variable_names})
    scatter = np.random.default_rng(seed).normal(0, noise, len(exact))
    return arrays | {"loss": exact * np.exp(scatter)}


def analysis_of(law, settings=({},), draws=0, profiles=False, noise=0.002, **options):
    """An analysis of such runs."""
    data = RunTable.read(rows_of(law, noise, settings), run_id="run_id")
    source = DataSource("runs.jsonl", {"N": "N_total"}, len(data) + 2, len(data), len(data))
    answer = fit(law, data, **options)
    return analyse(answer, source, draws=draws, profiles=profiles, version="0.1")


FAMILY = tuple({"G": float(g)} for g in (1, 2, 4, 8))
NEIGHBOURS = tuple({"U": float(u), "V": float(3 - u)} for u in range(4))
SPARSE = tuple({"S": s} for s in (0.0, 0.5, 0.9))
