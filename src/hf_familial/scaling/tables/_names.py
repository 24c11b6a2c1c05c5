"""Common names of columns, and the units in these names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ...errors import TableError
from .._cells import PETAFLOP_DAY, PREFIXES, SCALES, number_of


LOGS = {"log10": np.log(10.0), "ln": 1.0, "log2": np.log(2.0)}
EXAMPLES = "`--unit N=1e6`, `--unit D=B`, `--unit C=log10`, `--unit loss=ppl`"


@dataclass(frozen=True)
class Unit:
    """The unit of a column."""

    kind: Literal["scale", "log10", "ln", "log2", "ppl"] = "scale"
    factor: float = 1.0

    def convert(self, values: np.ndarray) -> np.ndarray:
        """Convert values to the unit of the laws."""
        with np.errstate(all="ignore"):
            if self.kind in LOGS:
                return np.exp(LOGS[self.kind] * values)
            if self.kind == "ppl":
                return np.log(values)
            return values * self.factor if self.factor != 1 else values

    @property
    def words(self) -> str:
        """The unit in the form that `--unit` accepts."""
        return f"{self.factor:g}".replace("e+0", "e").replace("e+", "e") if (
            self.kind == "scale") else self.kind  # fmt: skip

    def sentence(self, name: str, column: str) -> str:
        """Return a sentence on the conversion of a column."""
        if self.kind in LOGS:
            return f"{name} was read from {column!r}, which is a logarithm ({self.kind})."
        if self.kind == "ppl":
            return f"{column!r} is a perplexity, so the {name} is its logarithm, in nats."
        if name == "loss" and self.factor == BITS.factor:
            return f"{column!r} was converted from bits to nats (times ln 2)."
        return f"{name} was read from {column!r} in units of {self.words}."


PLAIN = Unit()
PERPLEXITY = Unit("ppl")
BITS = Unit("scale", float(np.log(2.0)))


def parse_unit(word: str, name: str) -> Unit:
    """Parse a unit that the user passed, such as `1e6`, `B` or `log10`."""
    unit = _unit(word.strip(), name)
    if unit is None:
        raise TableError(f"{word!r} is not a unit of {name}. Write it like {EXAMPLES}.")
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
    """Split the name of a column into the name without a unit, and the unit."""
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
        # `loss_2` is a second loss, but `N_1e6` is in millions
        if unit is not None and not (tail[2].isdigit() and unit.factor < 1000):
            return tail[1], unit
    return column, None


def is_log_of(column: str) -> str:
    """Return the variable of a column such as `log N`, whose base is unknown, else `""`."""
    found = re.fullmatch(r"log[\s_(\[]+(.+?)[)\]]?", column.strip(), re.I) or re.fullmatch(
        r"log([A-Z])", column.strip()
    )
    return found[1] if found else ""


# names in the form that `plain` returns; the first one that the file has is used
ALIASES = {
    "N": "n params n_params num_params parameters n_parameters model_size size n_total "
    "num_parameters non_emb_params params_non_embedding "
    "total_params total_parameters param_count parameter_count model_params "
    "model_parameters trainable_params n_non_embedding non_embedding_params "
    "non_embedding_parameters params_count n_trainable",
    "D": "d tokens n_tokens num_tokens d_tokens training_tokens train_tokens tokens_seen "
    "total_tokens num_input_tokens_seen num_train_tokens tokens_trained trained_tokens "
    "dataset_tokens data_tokens dataset_size data_size",
    "C": "c flops c_flops flop compute compute_budget training_flop training_flops budget "
    "total_flops total_flos train_flops training_compute total_compute",
    "G": "g granularity num_exits n_exits",
    "loss": "loss loss_mean validation_loss val_loss eval_loss test_loss final_loss training_loss "
    "valid_loss dev_loss heldout_loss held_out_loss final_val_loss final_eval_loss "
    "best_val_loss loss_val loss_valid loss_eval lm_loss train_loss loss_train "
    "ce cross_entropy ce_loss nll perplexity ppl val_ppl eval_ppl "
    "val_perplexity validation_perplexity eval_perplexity test_ppl test_perplexity "
    "bits_per_byte bpb bits_per_token",
    "E": "e experts num_experts n_experts",
    "S": "s sparsity",
    "D_unique": "d_unique unique_tokens u unique_data tokens_unique",
    "run_id": "run_id run run_name",
    "weight": "weight weights",
}
# prefixes and suffixes that export tools add to names
EXPORTED = re.compile(r"^(?:(?:summary|config|params|metrics|args|history|data)_)+|_value$")
UNITED = ("N", "D", "C", "loss", "D_unique", "S")  # variables whose column name can contain a unit


def plain(name: str) -> str:
    """Return a name in lower case, with `_` in place of all but letters and digits."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def is_variable(name: str) -> bool:
    """Return whether a column's name is recognised as a variable."""
    return any(find([name], variable) for variable in ALIASES)


def find(columns: Iterable[str], variable: str) -> str:
    """Return the column of a variable by its name, `""` if there is none.

    The order is the variable's own name, other common names, names with a prefix
    (`summary/val_loss`), and names with a unit (`params (M)`, `log10_N`).
    """
    names = list(columns)
    if variable in names:
        return variable
    words = ALIASES.get(variable, plain(variable)).split()
    for key in (plain, _without_prefix):
        known = {key(name): name for name in reversed(names)}
        for word in words:
            if word in known:
                return known[word]
    if variable not in UNITED:
        return ""
    with_unit: dict[str, str] = {}
    for name in reversed(names):
        rest, unit = unit_in(name, variable)
        if unit is not None:
            with_unit[_without_prefix(rest)] = name
    return next((with_unit[word] for word in words if word in with_unit), "")


def log_of(columns: Iterable[str], variable: str) -> str:
    """Return the column of a variable's logarithm to an unknown base, `""` if there is none."""
    return next((name for name in columns if find([is_log_of(name)], variable)), "")


def others(columns: Sequence[str], variable: str, taken: str) -> list[str]:
    """Return the other columns that could be a variable."""
    words = set(ALIASES.get(variable, "").split())
    return [name for name in columns if name != taken and _without_prefix(name) in words]


def _without_prefix(name: str) -> str:
    return EXPORTED.sub("", plain(name))
