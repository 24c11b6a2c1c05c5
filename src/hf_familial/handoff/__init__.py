"""Generation across processes: the state of a relay on its way, and the two sides that use it."""

from ..errors import RelayStateError
from ._cost import Recomputed
from ._server_text import DeepText
from .device import MODES, ShallowSide, ShallowText
from .loops import serve, split
from .server import DeepSide, deep_side, upper_part
from .state import RelayState
from .weights_digest import fingerprint


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
