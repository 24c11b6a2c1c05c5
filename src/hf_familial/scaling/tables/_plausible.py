"""Checks that reject implausible numbers, such as missing units, logarithms and perplexities."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass

import numpy as np

from ...errors import TableError
from .._cells import PETAFLOP_DAY
from ..flop_models import HeadFlops, six_nd
from ._files import some
from ._names import BITS, PERPLEXITY, PLAIN, Unit


# plausible ranges, from the smallest models studied to beyond the largest
RANGES = {"N": (1e3, 1e14), "D": (2e2, 1e16), "C": (1e6, 1e31)}
TOKENS_PER_PARAMETER = (1e-3, 1e6)
FACTOR = 30.0  # largest ratio between C and 6ND
MOST_LOSS = 12.5  # ln of the largest vocabularies: the loss of guessing
TRAINED_LOSS = 5.0  # a trained model of at least 1e7 parameters has a smaller loss
SCALED = {
    "N": (1e3, 1e6, 1e9),
    "D": (1e3, 1e6, 1e9, 1e12),
    "C": (1e6, 1e9, 1e12, 1e15, 1e18, 1e21, PETAFLOP_DAY),
}
LEAST_ROWS, RISING = 6, 0.7  # a loss grows if at least 6 rows have at least this correlation
NARROW = 4.0  # largest ratio of logarithms in one column
WORDS = {1e3: "thousands", 1e6: "millions", 1e9: "billions", 1e12: "trillions"}
UNITS = {"N": "parameters", "D": "tokens", "C": "FLOPs"}


@dataclass(frozen=True)
class Sizes:
    """The columns N, D, C and G of the runs in a file."""

    columns: Mapping[str, np.ndarray]  # those of N, D and C that the file has, (rows,)
    active: np.ndarray | None  # parameters that process each token, (rows,)
    G: np.ndarray  # number of exits, (rows,)
    vocab: int  # vocabulary size
    sure: Set[str]  # variables whose unit the user passed
    lines: Sequence[int]  # line of each row in the file


def check_sizes(sizes: Sizes, source: str) -> None:
    """Raise `TableError` if N, D or C is implausible, or if they do not fit together."""
    if set(sizes.columns) <= set(sizes.sure):
        return
    bad = dict(_problems(sizes, {}))
    if not bad:
        return
    rows = np.flatnonzero(np.any(list(bad.values()), axis=0))
    words = " ".join(f"{words}." for words in bad)
    known = np.all([np.isfinite(v) & (v > 0) for v in sizes.columns.values()], axis=0)
    if 2 * len(rows) < known.sum():
        lines = some(sizes.lines[i] for i in rows.tolist())
        where = f"{source}, line{'s' if len(rows) > 1 else ''} {lines}"
        raise TableError(
            f"{where}: {words} The other lines are plausible. Correct the named lines, or leave "
            "them out (`--where`)."
        )
    suggestions = _suggestions(sizes)
    if not suggestions:
        names = [name for name in sizes.columns if name not in sizes.sure]
        how = " ".join(f"--unit {name}=1" for name in names)
        raise TableError(
            f"{source}: {words} Correct the columns, or pass `{how}` if they are right."
        )
    raise TableError(f"{source}: {words} {_advice(suggestions)}")


def _problems(
    sizes: Sizes, units: Mapping[str, Unit], exact: bool = True
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield each problem of the numbers in some units, as a phrase and the rows affected."""
    values = {name: units.get(name, PLAIN).convert(v) for name, v in sizes.columns.items()}
    given = set(values)
    for name, other in (("D", "N"), ("N", "D")):
        if name not in values and {other, "C"} <= given:
            values[name] = values["C"] / (6 * values[other])  # as it will be computed later
    for name, column in values.items():
        wrong = _outside(column, *RANGES[name])
        told = {name} if name in given else given
        if wrong.any() and not (told <= sizes.sure and exact):
            yield (
                f"{name} = {_span(column[wrong])} is not a plausible number of {UNITS[name]}",
                wrong,
            )
    if {"N", "D"} <= set(values):
        ratio = values["D"] / values["N"]
        wrong = _outside(ratio, *TOKENS_PER_PARAMETER)
        told = {"N", "D"} if {"N", "D"} <= given else given
        if wrong.any() and not told <= sizes.sure:
            yield f"D / N = {_span(ratio[wrong])} tokens per parameter is not plausible", wrong
    if {"N", "D", "C"} <= given:
        active = values["N"]
        if sizes.active is not None:
            active = np.minimum(active, sizes.active * (values["N"] / sizes.columns["N"]))
        least = six_nd(active, values["D"])
        most = HeadFlops(sizes.vocab)(values["N"], values["D"], sizes.G)
        wrong = (values["C"] < least / FACTOR) | (values["C"] > most * FACTOR)
        if wrong.any() and not {"N", "D", "C"} <= sizes.sure:
            ratio = values["C"] / six_nd(values["N"], values["D"])
            yield f"C / 6ND is {_span(ratio[wrong])}, but should be near 1", wrong


def _outside(values: np.ndarray, low: float, high: float) -> np.ndarray:
    return np.isfinite(values) & (values > 0) & ((values < low) | (values > high))


def _span(values: np.ndarray) -> str:
    low, high = (f"{value:.3g}" for value in (np.min(values), np.max(values)))
    return low if low == high else f"{low} to {high}"


def _suggestions(sizes: Sizes) -> list[dict[str, Unit]]:
    """Return the smallest changes of units that make the numbers plausible, likeliest first."""
    names = [name for name in sizes.columns if name not in sizes.sure]
    choices = [[PLAIN, *_candidates(sizes.columns[name], name)] for name in names]
    found = []
    with np.errstate(all="ignore"):
        for units in itertools.product(*choices):
            changed = {n: u for n, u in zip(names, units, strict=True) if u != PLAIN}
            if changed and not any(w.any() for _, w in _problems(sizes, changed, exact=False)):
                found.append((len(changed), _strangeness(sizes, changed), changed))
    if not found:
        return []
    found.sort(key=lambda item: item[:2])
    fewest = found[0][0]
    return [changed for count, _, changed in found if count == fewest][:3]


def _candidates(values: np.ndarray, name: str) -> Iterator[Unit]:
    known = values[np.isfinite(values) & (values > 0)]
    if not len(known):
        return
    low, high = RANGES[name]
    narrow = known.max() / known.min() <= NARROW
    for unit in (Unit("log10"), Unit("ln")):
        turned = unit.convert(known)
        if narrow and known.max() < 80 and low <= turned.min() <= turned.max() <= high:
            yield unit
    yield from (Unit("scale", factor) for factor in SCALED[name])


def _strangeness(sizes: Sizes, units: Mapping[str, Unit]) -> float:
    """Return the distance of the numbers from those of common runs, in decades."""
    values = {name: units.get(name, PLAIN).convert(v) for name, v in sizes.columns.items()}
    strange = 0.0
    if {"N", "D"} <= set(values):
        strange += abs(np.log10(_middle(values["D"] / values["N"])) - np.log10(20))
    if {"N", "D", "C"} <= set(values):
        ratio = values["C"] / six_nd(values["N"], values["D"])
        strange += 2 * abs(np.log10(_middle(ratio)))
    logs = sum(unit.kind != "scale" for unit in units.values())
    common = (1e6, 1e9, 1e12, 1e18, 1e21)
    odd = sum(u.kind == "scale" and u.factor not in common for u in units.values())
    return strange + 0.5 * odd - 1.5 * logs


def _advice(suggestions: Sequence[Mapping[str, Unit]]) -> str:
    first = suggestions[0]
    alike: dict[str, list[str]] = {}
    for name, unit in first.items():
        alike.setdefault(_looks(unit), []).append(name)
    looks = " and ".join(
        f"{' and '.join(names)} look{'s' if len(names) == 1 else ''} like {words}"
        for words, names in alike.items()
    )
    ways = [" ".join(f"--unit {n}={u.words}" for n, u in units.items()) for units in suggestions]
    more = f", or `{'`, `'.join(ways[1:])}`" if len(ways) > 1 else ""
    plain = " ".join(f"--unit {name}=1" for name in first)
    return f"{looks}. Pass `{ways[0]}`{more}, or `{plain}` if the numbers are right."


def _looks(unit: Unit) -> str:
    if unit.kind != "scale":
        return f"logarithms ({unit.kind})"
    if unit.factor == PETAFLOP_DAY:
        return "petaFLOP/s-days"
    return WORDS.get(unit.factor, f"multiples of {unit.words}")


def check_share(values: np.ndarray, name: str, source: str) -> None:
    """Raise `TableError` if a share seems to be in percent."""
    known = values[np.isfinite(values)]
    if len(known) and np.median(known) > 1 and known.max() <= 100:
        raise TableError(
            f"{source}: {name} = {_span(known)} looks like percent. Pass `--unit {name}=0.01`."
        )


def check_loss(loss: np.ndarray, sizes: Mapping[str, np.ndarray], column: str, source: str) -> None:
    """Raise `TableError` if the losses are not plausible in nats per token."""
    known = loss[np.isfinite(loss)]
    if not len(known):
        return
    middle, span = float(np.median(known)), _span(known)
    right = "`--unit loss=1` if the numbers are right"
    if middle < 0:
        raise TableError(
            f"{source}: the loss in {column!r} is negative ({span}). If it is a log likelihood, "
            "pass `--unit loss=-1`."
        )
    trained = {"N", "D"} <= set(sizes) and _middle(sizes["N"]) >= 1e7 and _middle(sizes["D"]) >= 1e8
    if middle > MOST_LOSS or trained and middle > TRAINED_LOSS:
        ways = f"`--unit loss={PERPLEXITY.words}` if it is a perplexity"
        if middle * BITS.factor < MOST_LOSS:
            ways += ", `--unit loss=bits` if it is in bits"
        raise TableError(
            f"{source}: the loss in {column!r} is {span}, too high for nats per token. Pass "
            f"{ways}, or {right}."
        )


def _middle(values: np.ndarray) -> float:
    """Return the median of the finite values, 0 if there are none."""
    known = values[np.isfinite(values)]
    return float(np.median(known)) if len(known) else 0.0


def check_fall(loss: np.ndarray, sizes: Mapping[str, np.ndarray], column: str, source: str) -> None:
    """Raise `TableError` if the losses grow with size and data, like an accuracy."""
    if not {"N", "D"} <= set(sizes):
        return
    good = np.isfinite(loss) & np.isfinite(sizes["N"]) & np.isfinite(sizes["D"])
    good &= (sizes["N"] > 0) & (sizes["D"] > 0)
    if good.sum() < LEAST_ROWS:
        return
    work = np.log(sizes["N"][good]) + np.log(sizes["D"][good])
    if np.ptp(work) < 1 or np.ptp(loss[good]) == 0:
        return
    if np.corrcoef(work, loss[good])[0, 1] > RISING:
        raise TableError(
            f"{source}: {column!r} grows with N and D, like an accuracy and unlike a loss. Name "
            "the loss with `--loss COLUMN`, or pass `--unit loss=1` if it is a loss."
        )
