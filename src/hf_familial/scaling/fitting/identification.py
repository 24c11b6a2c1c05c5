"""Whether rows determine the parameters of a law: the condition number, and the refusal."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...errors import NotIdentifiedError
from .objective import Problem


# beyond this a combination of parameters moves losses by a millionth of what others do: less
# than the noise of any run
MAX_CONDITION = 1e6
LEAST_EFFECT = 1e-9  # of a parameter on log losses, root mean square


def identify(problem: Problem, at: np.ndarray, hit: tuple[str, ...]) -> float:
    """Judge an optimum: can the rows tell the parameters apart?

    Args:
        problem ([`Problem`]): Law, rows and space.
        at (`np.ndarray`): The optimum, (free,).
        hit (`tuple[str, ...]`): Parameters on a bound: left out, for the bound determines them.

    Returns:
        `float`: Condition number of the Jacobian of the residuals, its columns of length 1.

    Raises:
        NotIdentifiedError: If no row depends on a parameter, or the number exceeds
            `MAX_CONDITION`.
    """
    names = [name for name in problem.space.free if name not in hit]
    _, slopes = problem.jacobian(at[None])
    columns = [problem.space.free.index(name) for name in names]
    matrix = np.sqrt(problem.weight)[:, None] * slopes[0][:, columns]
    length = np.sqrt(np.square(matrix).sum(0))
    # a parameter's own scale: its logarithm where the search moves that
    size = np.where(problem.space.logs, 1.0, np.maximum(np.abs(at), 1e-3))[columns]
    scale = 1.0 if problem.loss.logs else float(np.abs(problem.target).max())
    least = LEAST_EFFECT * scale * np.sqrt(problem.weight.sum())
    flat = [name for name, effect in zip(names, length * size, strict=True) if not effect > least]
    if flat:
        raise NotIdentifiedError(
            f"At the optimum no row depends on {_listed(flat)} of `{problem.law.name}`: fix it, or "
            "vary the runs.",
            tuple(flat),
        )
    if not names:
        return 1.0
    _, sizes, directions = np.linalg.svd(matrix / length, full_matrices=False)
    condition = float(sizes[0] / sizes[-1]) if sizes[-1] > 0 else np.inf
    if condition > MAX_CONDITION:
        moved = np.abs(directions[-1])
        loose = [n for n, size in zip(names, moved, strict=True) if size > 0.1 * moved.max()]
        raise NotIdentifiedError(
            f"The rows do not tell {_listed(loose)} of `{problem.law.name}` apart (condition "
            f"number {condition:.1e}, at most {MAX_CONDITION:.0e}): vary the runs more, or fix or "
            "tie one.",
            tuple(loose),
            condition,
        )
    return condition


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
