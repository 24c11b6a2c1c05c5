"""FLOPs of a run: callables `flops(N, D, G)` for planning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np


# FLOPs of a run of N parameters on D tokens with G exits; arrays broadcast, and the cost rises
# with N and with D
Flops = Callable[[Any, Any, Any], Any]


def six_nd(N: Any, D: Any, G: Any = 1) -> Any:
    """Return C = 6ND (Kaplan et al., arXiv:2001.08361): heads and attention scores are free."""
    return 6 * np.asarray(N, float) * D


def aspect_width(N: Any, aspect: float = 64.0) -> Any:
    """Return the width of a decoder of N = 12 L width^2 parameters, `aspect` times its depth L."""
    return np.cbrt(aspect * np.asarray(N, float) / 12)


@dataclass(frozen=True)
class PowerWidth:
    """Width of a decoder as a power of its size: `factor * N ** exponent`, not rounded."""

    factor: float
    exponent: float  # 1/3 where depth and width grow alike

    def __call__(self, N: Any) -> Any:
        """Return the width, of the shape of `N`."""
        return self.factor * np.asarray(N, float) ** self.exponent


@dataclass(frozen=True)
class HeadFlops:
    """FLOPs of 6ND and of the exit heads: `6 D (N + heads V d(N))`.

    Every exit multiplies its hidden state of width d with a head of V x d, forward and backward.
    At a few hundred million parameters this is no small change, and it grows with G.

    Attributes:
        vocab (`int`): Rows V of a head.
        heads_in_N (`int`): Heads that N counts already: 0 if N is without embeddings, 1 if it
            counts the deepest exit's head.
        width (`Callable`): Width d of a backbone of N parameters.
    """

    vocab: int = 50_304
    heads_in_N: int = 0
    width: Callable[[Any], Any] = aspect_width

    def __call__(self, N: Any, D: Any, G: Any) -> Any:
        """Return the FLOPs of the run, of the shape the arguments broadcast to."""
        heads = np.maximum(np.asarray(G, float) - self.heads_in_N, 0)
        return six_nd(np.asarray(N, float) + heads * self.vocab * self.width(N), D)


@dataclass(frozen=True)
class LifetimeFlops:
    """FLOPs of training and serving: `train(N, D, G) + 2 N_served tokens` (arXiv:2401.00448).

    Attributes:
        train (`Callable`): FLOPs of training.
        tokens (`float`): Tokens that will be served.
        served (`float`): Parameters of the member that serves them, as a share of N.
    """

    train: Flops
    tokens: float
    served: float = 1.0

    def __call__(self, N: Any, D: Any, G: Any) -> Any:
        """Return the FLOPs of the run and of its service."""
        return self.train(N, D, G) + 2 * self.served * np.asarray(N, float) * self.tokens
