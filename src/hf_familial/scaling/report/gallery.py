"""Which pictures a study has, and the numbers in each: those that make no sense are left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from ...errors import NoMinimumError
from .curves import (
    COSTS,
    counting,
    flops_of,
    frontier,
    has_optimum,
    has_sizes,
    isoflop_curves,
    named,
    penalty,
    rows_of,
    settings_of,
)
from .figures import (
    Group,
    draw_agreement,
    draw_cloud,
    draw_frontier,
    draw_isoflop,
    draw_penalty,
    draw_profile,
    draw_residuals,
)
from .formula import symbol_text
from .study import Study


FRONTIER_POINTS = 25
EXTRAPOLATE = 100.0  # how far beyond the largest budget the frontier goes
KINDS = {"C": "power", "N": "count", "D": "count"}
PENALTIES = {
    "G": ("granularity", "granularity G (exits)"),
    "U": ("shallower neighbours", "shallower exits U"),
    "V": ("deeper neighbours", "deeper exits V"),
}
TALLY = {"N": "parameters N", "D": "training tokens D", "C": "compute C (FLOPs)"}


@dataclass(frozen=True, eq=False)
class Picture:
    """One picture of a study.

    Attributes:
        name (`str`): Stem of its file.
        section (`str`): What it belongs to: a key of `SECTIONS`.
        title (`str`): What it shows, in few words.
        caption (`str`): How to read it.
        figure (`matplotlib.figure.Figure`): The picture.
    """

    name: str
    section: str
    title: str
    caption: str
    figure: Figure


SECTIONS = {
    "isoflop": "Loss at equal compute",
    "frontier": "What is best for a budget",
    "granularity": "What granularity costs",
    "agreement": "How well the law fits",
    "clouds": "How sure the coefficients are",
    "profiles": "Profiles of the coefficients",
}


def pictures(study: Study) -> list[Picture]:
    """Every picture that makes sense for a study, in the order of `SECTIONS`.

    Args:
        study ([`Study`]): With its rows; draws and profiles where it has them.

    Returns:
        `list[Picture]`
    """
    makers: tuple[Callable[[Study], Iterator[Picture]], ...] = (
        _isoflop,
        _frontier,
        _penalties,
        _agreement,
        _residuals,
        _clouds,
        _profiles,
    )
    return [picture for make in makers for picture in make(study)]


def _isoflop(study: Study) -> Iterator[Picture]:
    if not has_sizes(study):
        return
    found = [(setting, isoflop_curves(study, setting)) for setting in settings_of(study)]
    found = [(setting, curves) for setting, curves in found if curves]
    if not found:
        return
    losses = np.concatenate(
        [np.concatenate([c.losses, c.curve_losses]) for _, curves in found for c in curves]
    )
    room = 0.04 * np.ptp(losses)
    limits = (float(losses.min() - room), float(losses.max() + room))
    for i, (setting, curves) in enumerate(found):
        where = f", {named(setting)}" if setting else ""
        caption = (
            "Runs (dots) and the law (lines) at constant FLOPs; diamonds mark the law’s minima and "
            "the dashed line joins them."
        )
        yield Picture(
            f"isoflop_{i}" if len(found) > 1 else "isoflop",
            "isoflop",
            f"IsoFLOP curves{where}",
            caption if i == 0 else "As before.",
            draw_isoflop(curves, limits),
        )


def _frontier(study: Study) -> Iterator[Picture]:
    if not has_optimum(study):
        return
    flops = flops_of(study)
    seen = (float(flops.min()), float(flops.max()))
    setting = settings_of(study)[0]
    where = f" at {named(setting)}" if setting else ""
    grid = np.geomspace(seen[0], seen[1] * EXTRAPOLATE, FRONTIER_POINTS)
    try:
        found = frontier(study, grid, setting)
    except NoMinimumError:
        return
    labels = {
        "N": ("optimal parameters N*", "Compute-optimal size"),
        "D": ("optimal training tokens D*", "Compute-optimal data"),
        "loss": ("loss at the optimum (nats/token)", "Loss at the optimum"),
    }
    band = f"; band: {study.level:.0%}, delta method" if np.isfinite(found["N"][1]).any() else ""
    rows = rows_of(study, setting)
    for name, (label, title) in labels.items():
        points = Group("", flops[rows], study.fit.data.loss[rows]) if name == "loss" else None
        by = f"By the law with {counting(study)}{where}"
        caption = f"{by}; dashed beyond the budgets that were run{band}."
        yield Picture(
            f"frontier_{name}",
            "frontier",
            title,
            caption if points is None else caption[:-1] + ". Dots: runs.",
            draw_frontier(grid, *found[name], label, seen, points, loss=name == "loss"),
        )


def _penalties(study: Study) -> Iterator[Picture]:
    data = study.fit.data
    for name, (of, words) in PENALTIES.items():
        if name not in study.fit.law.variable_names or len(np.unique(data.columns[name])) < 2:
            continue
        measured, curve, low, high, above = penalty(study, name)
        kind = "reducible loss (above E)" if above else "loss"
        band = f" with its {study.level:.0%} band (delta method)" if np.isfinite(low).any() else ""
        yield Picture(
            f"penalty_{name}",
            "granularity",
            f"Penalty against {of}",
            f"Every run’s {kind} over what the law says at {name} = {COSTS[name]:g} and the same N "
            f"and D; the line is the law{band}.",
            draw_penalty(
                data.columns[name],
                measured,
                curve,
                low,
                high,
                words,
                f"{kind.split(' (')[0]} over {name} = {COSTS[name]:g} (%)",
            ),
        )


def _groups(study: Study, x: np.ndarray, y: np.ndarray) -> list[Group]:
    """Points by the law's further variables."""
    groups = []
    for setting in settings_of(study):
        rows = rows_of(study, setting)
        groups.append(Group(named(setting), x[rows], y[rows]))
    return groups if sum(len(g.x) for g in groups) == len(x) else [Group("", x, y)]


def _agreement(study: Study) -> Iterator[Picture]:
    predicted, measured = study.fit.fitted(), study.fit.data.loss
    error = float(np.sqrt(np.mean((measured / predicted - 1) ** 2)))
    worst = float(np.abs(measured / predicted - 1).max())
    yield Picture(
        "agreement",
        "agreement",
        "Predicted against measured",
        f"{len(measured):,} rows; root mean square error {100 * error:.2g}%, largest "
        f"{100 * worst:.2g}%. On the diagonal both are equal.",
        draw_agreement(_groups(study, predicted, measured), _target(study)),
    )


def _target(study: Study) -> str:
    """What the law predicts, with its unit, as an axis calls it."""
    target = study.fit.law.target
    unit = target.unit.replace("nats per token", "nats/token")
    return f"{target.name.replace('_', ' ')}" + (f" ({unit})" if unit != "1" else "")


def _residuals(study: Study) -> Iterator[Picture]:
    columns = dict(study.fit.data.columns)
    ratio = study.fit.data.loss / study.fit.fitted() - 1
    symbols = {v.name: v for v in study.fit.law.variables}
    wanted = [*symbols, *(["C"] if has_sizes(study) else [])]
    if has_sizes(study):
        columns["C"] = flops_of(study)
    for name in wanted:
        x = columns[name]
        if len(np.unique(x)) < 2 or (x <= 0).all():
            continue
        words = TALLY.get(name) or PENALTIES.get(name, (name, name))[1]
        yield Picture(
            f"residuals_{name}",
            "agreement",
            f"Residuals against {name}",
            "Measured over predicted, minus 1; the line joins medians and should show no trend.",
            draw_residuals(_groups(study, x, ratio), words, KINDS.get(name, "plain")),
        )


def _clouds(study: Study) -> Iterator[Picture]:
    if study.replicates is None or len(study.replicates) < 20:
        return
    moving = [n for n in study.fit.free if np.ptp(study.replicates.values[n]) > 0]
    draws = {name: study.replicates.values[name] for name in moving}
    if len(moving) < 2:
        return
    # each coefficient with the one that it is most entangled with
    partners = {
        a: max((b for b in moving if b != a), key=lambda b: abs(_correlation(draws, a, b)))
        for a in moving
    }
    pairs = list(dict.fromkeys(tuple(sorted(pair, key=moving.index)) for pair in partners.items()))
    for a, b in pairs:
        symbols = [study.fit.law.parameter(name).symbol for name in (a, b)]
        yield Picture(
            f"cloud_{a}_{b}",
            "clouds",
            " and ".join(map(symbol_text, symbols)),
            f"Correlation {_correlation(draws, a, b):.2f}.".replace("-", "−"),
            draw_cloud(
                draws[a],
                draws[b],
                (study.fit.values[a], study.fit.values[b]),
                (f"${symbols[0]}$", f"${symbols[1]}$"),
            ),
        )


def _correlation(draws: Mapping[str, np.ndarray], a: str, b: str) -> float:
    """Of two coefficients, in logs where they are positive."""
    x, y = (np.log(draws[n]) if draws[n].min() > 0 else draws[n] for n in (a, b))
    return float(np.corrcoef(x, y)[0, 1])


def _profiles(study: Study) -> Iterator[Picture]:
    for name, profile in study.profiles.items():
        if len(profile.values) < 2:
            continue  # an exact fit has no curve
        symbol, interval = study.fit.law.parameter(name).symbol, profile.interval
        yield Picture(
            f"profile_{name}",
            "profiles",
            f"Profile of {symbol_text(symbol)}",
            "How the objective rises as this coefficient is held and all others are fitted again.",
            draw_profile(
                profile.values,
                profile.rise / profile.threshold,
                study.fit.values[name],
                f"${symbol}$",
                study.level,
                (interval.low, interval.high),
            ),
        )


__all__ = ["SECTIONS", "Picture", "pictures"]
