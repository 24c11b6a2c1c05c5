"""The catalogue of laws: every form on one core, as data."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from ...errors import UnknownLawError
from .dense import CATALOGUE as DENSE
from .familial import CATALOGUE as FAMILIAL
from .law import Law
from .rules import CATALOGUE as RULES
from .sparse import CATALOGUE as SPARSE


LAWS: Mapping[str, Law] = MappingProxyType(
    {law.name: law for law in (*FAMILIAL, *DENSE, *SPARSE, *RULES)}
)

# other names that people use
ALIASES: Mapping[str, str] = MappingProxyType({"chinchilla": "hoffmann", "kaplan": "kaplan_joint"})


def get_law(law: str | Law) -> Law:
    """Return a law of the catalogue by its name; a law itself comes back as it is.

    Raises:
        UnknownLawError: If neither `LAWS` nor `ALIASES` has the name.

    Example:
        >>> get_law("familial").formula_text
        'L = E + (A N^-alpha + B D^-beta) G^gamma'
    """
    if isinstance(law, Law):
        return law
    name = ALIASES.get(law, law)
    if name not in LAWS:
        raise UnknownLawError(f"`law` must be one of {sorted({*LAWS, *ALIASES})}, got {law!r}.")
    return LAWS[name]
