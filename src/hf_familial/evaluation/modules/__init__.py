"""Modules for the `evaluate` library. They load from a local path without a download."""

from pathlib import Path

from ...models.familial.configuration_familial import check_choice


def metric_path(name: str) -> str:
    """Return the path of a module of this package for `evaluate.load`.

    Args:
        name (`str`): `"exit_agreement"`, `"expected_calibration_error"` or `"exit_quality"`.

    Returns:
        `str`: The folder of the module.

    Raises:
        ValueError: If `name` is not one of these.

    Example:
        >>> import evaluate
        >>> agreement = evaluate.load(metric_path("exit_agreement"))
        >>> agreement.compute(predictions=[5, 3], references=[5, 4])
        {'exit_agreement': 0.5}
    """
    root = Path(__file__).parent
    known = sorted(path.stem for path in root.glob("*/*.py") if path.stem == path.parent.name)
    check_choice("name", name, known)
    return str(root / name)


__all__ = ["metric_path"]
