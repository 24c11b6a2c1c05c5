"""The catalogue of scaling laws. Each law is a `Law` object, found by its name."""

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

# other names of the same laws
ALIASES: Mapping[str, str] = MappingProxyType({"chinchilla": "hoffmann", "kaplan": "kaplan_joint"})


def get_law(law: str | Law) -> Law:
    """Return the law of a name. If `law` is a [`Law`] already, return it unchanged.

    Args:
        law (`str` or [`Law`]): A name in `LAWS`, an alias such as `"chinchilla"`, or a law.

    Raises:
        UnknownLawError: If no law has the name.

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
