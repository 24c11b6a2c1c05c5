"""Hand-off: one process starts a text, and another with the same lower layers continues it."""

from ..errors import HandoffError
from ._weights_digest import weights_digest
from .device import MODES, DeviceSide, DeviceText
from .loops import run_device, run_server
from .server import Recomputed, ServerSide, ServerText, server_side
from .state import HandoffState


__all__ = [
    "MODES",
    "DeviceSide",
    "DeviceText",
    "HandoffError",
    "HandoffState",
    "Recomputed",
    "ServerSide",
    "ServerText",
    "run_device",
    "run_server",
    "server_side",
    "weights_digest",
]
