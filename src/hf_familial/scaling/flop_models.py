"""FLOP models: callables `flops(N, D, G)` that return the FLOPs of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np


# A function that returns the FLOPs of a run with N parameters, D tokens and G exits. The arguments
# can be arrays, which broadcast. The result must rise with N and with D.
Flops = Callable[[Any, Any, Any], Any]


def six_nd(N: Any, D: Any, G: Any = 1) -> Any:
    """Return C = 6ND (Kaplan et al., arXiv:2001.08361). Heads and attention scores count as 0."""
    return 6 * np.asarray(N, float) * D


def aspect_width(N: Any, aspect: float = 64.0) -> Any:
    """Return the width of a decoder with N = 12 L width^2 parameters and width = `aspect` * L."""
    return np.cbrt(aspect * np.asarray(N, float) / 12)


@dataclass(frozen=True)
class PowerWidth:
    """A model of a decoder's width: `factor * N ** exponent`, not rounded."""

    factor: float
    exponent: float  # 1/3 if depth and width grow by the same factor

    def __call__(self, N: Any) -> Any:
        """Return the width for N parameters, in the shape of `N`."""
        return self.factor * np.asarray(N, float) ** self.exponent


@dataclass(frozen=True)
class HeadFlops:
    """A FLOP model that counts the backbone and the exit heads: `6 D (N + heads V d(N))`.

    Every exit multiplies its hidden state of width d by a head of shape (V, d), in the forward and
    the backward pass. In models of a few hundred million parameters this is a large share of the
    FLOPs, and the share grows with G.

    Attributes:
        vocab (`int`): Vocabulary size V: the rows of a head.
        heads_in_N (`int`): Number of heads that N already includes. 0 if N excludes embeddings
            and heads, 1 if it includes the head of the deepest exit.
        width (`Callable`): Function from N to the width d of the backbone.

    Example:
        >>> HeadFlops(vocab=50_304)(1e9, 2e10, 4)  # FLOPs of 1e9 parameters, 2e10 tokens, 4 exits
    """

    vocab: int = 50_304
    heads_in_N: int = 0
    width: Callable[[Any], Any] = aspect_width

    def __call__(self, N: Any, D: Any, G: Any) -> Any:
        """Return the FLOPs of the run, in the shape that the arguments broadcast to."""
        heads = np.maximum(np.asarray(G, float) - self.heads_in_N, 0)
        return six_nd(np.asarray(N, float) + heads * self.vocab * self.width(N), D)


@dataclass(frozen=True)
class LifetimeFlops:
    """A FLOP model of training plus serving: `train(N, D, G) + 2 served N tokens`.

    Reference: Sardana et al. 2024, arXiv:2401.00448.

    Attributes:
        train (`Callable`): The FLOP model of training.
        tokens (`float`): Number of tokens to serve after training.
        served (`float`): Parameters of the member that serves them, as a share of N.
    """

    train: Flops
    tokens: float
    served: float = 1.0

    def __call__(self, N: Any, D: Any, G: Any) -> Any:
        """Return the FLOPs of training and serving."""
        return self.train(N, D, G) + 2 * self.served * np.asarray(N, float) * self.tokens
