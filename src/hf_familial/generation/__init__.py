"""Generation across processes: the state of a relay on its way, and the two sides that use it."""

from ..errors import RelayStateError
from .cost import Recomputed
from .deep import DeepSide, deep_side, upper_part
from .deep_text import DeepText
from .fingerprint import fingerprint
from .handover import serve, split
from .shallow import MODES, ShallowSide, ShallowText
from .state import RelayState


__all__ = [
    "MODES",
    "DeepSide",
    "DeepText",
    "Recomputed",
    "RelayState",
    "RelayStateError",
    "ShallowSide",
    "ShallowText",
    "deep_side",
    "fingerprint",
    "serve",
    "split",
    "upper_part",
]
