"""Slow and plain: fits by scipy, and the made-up studies that the tests fit."""

import numpy as np
from scipy import optimize

from hf_familial.scaling import get_law


LEVELS = {
    "N": np.geomspace(2e7, 2e10, 7),
    "D": np.geomspace(5e8, 5e11, 6),
    "G": np.array([1.0, 2, 4, 8]),
    "U": np.array([0.0, 1, 3]),
    "V": np.array([0.0, 1, 3]),
    "S": np.array([0.0, 0.3, 0.6, 0.9, 0.97]),
    "E": np.array([1.0, 2, 8, 32, 128]),
    "G_expert": np.array([1.0, 2, 4, 8, 16]),
    "D_unique": np.geomspace(1e9, 3e10, 3),
    "X": np.geomspace(1e5, 1e10, 12),
}

# for laws without published values: plausible ones
TRUTHS = {
    "kaplan_additive": {"N_c": 8.8e13, "D_c": 5.4e13, "alpha_N": 0.076, "alpha_D": 0.095},
    "skaling": {"A": 2305.0, "B": 9957.0, "alpha": 0.424, "beta": 0.4305, "k": 0.774, "E": 1.757},
    "gadre": {"E": 1.8, "a": 300.0, "b": 600.0, "eta": 0.14},
    "farseer": {
        "c_3": -0.58, "s_3": -0.115, "gamma": 0.17, "c_2": 4.07, "s_2": -1.0, "beta": -0.1,
        "c_1": -1.04, "s_1": -0.17, "alpha": 0.12,
    },
    "power": {"E": 1.7, "A": 300.0, "alpha": 0.33},
}  # fmt: skip


def truths(law):
    """Values to make data with: the published ones, by label, or plausible ones."""
    return {label: given.values for label, given in law.published.items()} or {
        "plausible": TRUTHS[law.name]
    }


def study(law, values=None, noise=0.0, seed=0):
    """A full grid of runs: columns by name, `loss` among them, with noise in log losses."""
    law = get_law(law)
    values = values or next(iter(truths(law).values()))
    grid = np.meshgrid(*(LEVELS[name] for name in law.variable_names), indexing="ij")
    columns = {n: axis.reshape(-1) for n, axis in zip(law.variable_names, grid, strict=True)}
    loss = law.predict(values, **columns)
    wobble = np.random.default_rng(seed).standard_normal(loss.shape)
    return {**columns, "loss": loss * np.exp(noise * wobble)}


def huber(residual, delta):
    """Huber's function, case by case."""
    size = np.abs(residual)
    return np.where(size <= delta, 0.5 * size**2, delta * (size - 0.5 * delta))


def hoffmann_objective(point, columns, delta):
    """Equation 3 of arXiv 2203.15556, in the logs of its appendix D.3, and its slopes."""
    a, b, e, alpha, beta = point
    log_size, log_data = np.log(columns["N"]), np.log(columns["D"])
    terms = np.stack([a - alpha * log_size, b - beta * log_data, np.full_like(log_size, e)])
    top = terms.max(0)
    whole = top + np.log(np.exp(terms - top).sum(0))
    residual = whole - np.log(columns["loss"])
    share = np.exp(terms - whole)
    slopes = np.stack(
        [share[0], share[1], share[2], -share[0] * log_size, -share[1] * log_data], axis=-1
    )
    return huber(residual, delta).sum(), np.clip(residual, -delta, delta) @ slopes


def hoffmann_by_lbfgs(columns, starts, delta=1e-3):
    """The best of scipy's L-BFGS-B from many starts (a, b, e, alpha, beta): objective and point."""

    def scaled(point):
        value, slope = hoffmann_objective(point, columns, delta)
        return value * 1e3 / delta, slope * 1e3 / delta

    options = {"maxiter": 5000, "maxfun": 20000, "ftol": 1e-15, "gtol": 1e-10}
    found = [
        optimize.minimize(scaled, start, jac=True, method="L-BFGS-B", options=options)
        for start in starts
    ]
    best = min(found, key=lambda answer: answer.fun)
    return best.fun * delta / 1e3, best.x


def objective_by_hand(fit):
    """A fit's objective, summed over its rows with nothing but the law's own predictions."""
    data, settings = fit.data, fit.settings
    predicted = fit.law.predict(fit.values, **{n: data.columns[n] for n in fit.law.variable_names})
    if settings.objective == "log_huber":
        residual = np.log(predicted) - np.log(data.loss)
    else:
        residual = predicted - data.loss
    delta = np.inf if settings.objective == "mse" else settings.delta
    return float((data.weight * huber(residual, delta)).sum())
