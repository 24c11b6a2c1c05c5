"""Names that people give their columns, and the units that they write into them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .units import Unit, is_log_of, unit_in


# names in lower case with `_` for what is no letter or digit; the first that is there counts
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
# what exporters write before the names of their own
PREFIXES = re.compile(r"^(?:(?:summary|config|params|metrics|args|history|data)_)+|_value$")
UNITED = ("N", "D", "C", "loss", "D_unique", "S")


@dataclass(frozen=True)
class Found:
    """A column that holds a variable.

    Attributes:
        column (`str`): Its name.
        unit ([`Unit`], *optional*): What the name says of its unit.
    """

    column: str
    unit: Unit | None = None


def plain(name: str) -> str:
    """Return a name in lower case with `_` for what is no letter or digit."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def is_variable(name: str) -> bool:
    """Return whether a column's name is understood."""
    return any(find([name], variable) for variable in ALIASES)


def find(columns: Iterable[str], variable: str) -> Found | None:
    """Return the column of a variable by its name, or `None`.

    The variable's own name goes first, then names in common use, then the same behind a prefix
    (`summary/val_loss`), then names that tell a unit (`params (M)`, `log10_N`).

    Args:
        columns (`Iterable[str]`): Names of the columns.
        variable (`str`): Name of the variable.
    """
    names = list(columns)
    if variable in names:
        return Found(variable, unit_in(variable, variable)[1])
    words = ALIASES.get(variable, plain(variable)).split()
    for key in (plain, _without_prefix):
        known = {key(name): name for name in reversed(names)}
        for word in words:
            if word in known:
                return Found(known[word], unit_in(known[word], variable)[1])
    if variable not in UNITED:
        return None
    with_unit: dict[str, Found] = {}
    for name in reversed(names):
        rest, unit = unit_in(name, variable)
        if unit is not None:
            with_unit[_without_prefix(rest)] = Found(name, unit)
    return next((with_unit[word] for word in words if word in with_unit), None)


def log_of(columns: Iterable[str], variable: str) -> str:
    """Return the column that holds a variable's logarithm to an unknown base, or nothing."""
    return next((name for name in columns if find([is_log_of(name)], variable)), "")


def others(columns: Sequence[str], variable: str, taken: str) -> list[str]:
    """Return further columns that might hold a variable."""
    words = set(ALIASES.get(variable, "").split())
    return [name for name in columns if name != taken and _without_prefix(name) in words]


def _without_prefix(name: str) -> str:
    return PREFIXES.sub("", plain(name))


__all__ = ["ALIASES", "Found", "find", "is_variable", "log_of", "others", "plain"]
