"""Units of columns: what a name or `--unit` says, and the numbers in the unit of the laws."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ...errors import TableError
from .cells import PETAFLOP_DAY, PREFIXES, SCALES, number_of


LOGS = {"log10": np.log(10.0), "ln": 1.0, "log2": np.log(2.0)}
EXAMPLES = "`--unit N=1e6`, `--unit D=B`, `--unit C=log10`, `--unit loss=ppl`"


@dataclass(frozen=True)
class Unit:
    """The unit of a column.

    Attributes:
        kind (`str`): `"scale"`, a logarithm (`"log10"`, `"ln"`, `"log2"`), or `"ppl"` for
            perplexities.
        factor (`float`): What one of the column is in the unit of the laws, of a scale.
    """

    kind: Literal["scale", "log10", "ln", "log2", "ppl"] = "scale"
    factor: float = 1.0

    def convert(self, values: np.ndarray) -> np.ndarray:
        """Return values in the unit of the laws."""
        with np.errstate(all="ignore"):
            if self.kind in LOGS:
                return np.exp(LOGS[self.kind] * values)
            if self.kind == "ppl":
                return np.log(values)
            return values * self.factor if self.factor != 1 else values

    @property
    def words(self) -> str:
        """The unit as `--unit` takes it."""
        return f"{self.factor:g}".replace("e+0", "e").replace("e+", "e") if (
            self.kind == "scale") else self.kind  # fmt: skip

    def sentence(self, name: str, column: str) -> str:
        """Return what was converted, in words."""
        if self.kind in LOGS:
            return f"Read {name} from {column!r}, a logarithm ({self.kind})."
        if self.kind == "ppl":
            return f"Took the logarithm of {column!r}, a perplexity, for the {name} in nats."
        if name == "loss" and self.factor == BITS.factor:
            return f"Turned {column!r} from bits into nats (times ln 2)."
        return f"Read {name} from {column!r} in units of {self.words}."


PLAIN = Unit()
PERPLEXITY = Unit("ppl")
BITS = Unit("scale", float(np.log(2.0)))


def parse_unit(word: str, name: str) -> Unit:
    """Return a unit that the user gave.

    Args:
        word (`str`): A factor such as `1e6`; `k`, `M`, `B`, `T`; `EFLOP`, `PF-days`; `log10`, `ln`,
            `log2`; `ppl`, `bits`, `nats`.
        name (`str`): The variable.

    Raises:
        TableError: If it is no unit.
    """
    unit = _unit(word.strip(), name)
    if unit is None:
        raise TableError(f"no unit {word!r} of {name}; write it as in {EXAMPLES}.")
    return unit


def _unit(word: str, name: str) -> Unit | None:
    plain = re.sub(r"^(?:in|x|×|\*)\s*", "", word.lower().strip())
    plain = re.sub(r"\s*\b(?:of\s+)?(?:params?|parameters|tokens?|toks?)$", "", plain).strip()
    plain = re.sub(r"^(?:params?|parameters|tokens?)$", "", plain)
    logs = {"log10": "log10", "lg": "log10", "ln": "ln", "log2": "log2", "loge": "ln"}
    if plain in logs:
        return Unit(logs[plain])  # type: ignore[arg-type]
    if name == "loss":
        if plain in ("ppl", "perplexity"):
            return PERPLEXITY
        if re.fullmatch(r"bits?(?:[ /_]*(?:per[ _]*)?(?:token|byte|char\w*))?|bpb|bpc", plain):
            return BITS
        if re.fullmatch(r"nats?(?:[ /_]*(?:per[ _]*)?token)?", plain):
            return PLAIN
    elif plain in SCALES:
        return Unit("scale", SCALES[plain])
    if name == "S" and plain in ("%", "percent"):
        return Unit("scale", 0.01)
    if name == "C":
        if re.fullmatch(r"(?:pf|petaflops?)(?:/?s)?[-_ ]*days?", plain):
            return Unit("scale", PETAFLOP_DAY)
        flops = re.fullmatch(r"([kmgtpezy]|exa|peta|tera|giga|zetta|yotta)?[-_ ]?flops?", plain)
        if flops:
            return Unit("scale", PREFIXES.get((flops[1] or "")[:1], 1.0))
    if plain == "":
        return PLAIN if word.strip() else None
    factor = number_of(plain)
    return Unit("scale", factor) if np.isfinite(factor) and factor != 0 else None


def unit_in(column: str, name: str) -> tuple[str, Unit | None]:
    """Return the name of a column without the unit it tells, and that unit.

    Args:
        column (`str`): As `params (M)`, `tokens_B`, `log10_N`, `C [EFLOP]`, `val_ppl`.
        name (`str`): The variable that it may hold.
    """
    bare = re.sub(
        r"[\s_,]*[(\[{]?\s*(?:in )?(?:nats?|bits?)\b[^)\]}]*[)\]}]?$", "", column, flags=re.I
    )
    if name == "loss":
        words = re.sub(r"[^a-z]+", " ", column.lower()).split()
        if {"ppl", "perplexity"} & set(words):
            return column, PERPLEXITY
        if {"bit", "bits", "bpb", "bpc"} & set(words):
            return bare, BITS
        if {"nat", "nats"} & set(words):
            return bare, PLAIN
    log = re.fullmatch(r"(log_?10|log_?2|ln|lg)[\s_(\[]*(.+?)[)\]]?", column.strip(), re.I)
    if log:
        return log[2], _unit(log[1].lower().replace("_", ""), name)
    inner = re.fullmatch(r"(.*?)[\s_]*[(\[{]\s*([^)\]}]+?)\s*[)\]}]", column.strip())
    if inner:
        return inner[1], _unit(inner[2], name)
    tail = re.fullmatch(r"(.+?)[\s_,-]+(?:in[\s_]+)?([A-Za-z0-9^/×-]+)", column.strip())
    if tail and (tail[2].isupper() or len(tail[2]) > 1 or len(tail[1]) > 1):
        unit = _unit(tail[2], name)
        # `loss_2` is a second loss, `N_1e6` is in millions
        if unit is not None and not (tail[2].isdigit() and unit.factor < 1000):
            return tail[1], unit
    return column, None


def is_log_of(column: str) -> str:
    """Return what a column such as `log N` is the logarithm of, to a base that it does not tell."""
    found = re.fullmatch(r"log[\s_(\[]+(.+?)[)\]]?", column.strip(), re.I) or re.fullmatch(
        r"log([A-Z])", column.strip()
    )
    return found[1] if found else ""


__all__ = ["PLAIN", "Unit", "is_log_of", "parse_unit", "unit_in"]
