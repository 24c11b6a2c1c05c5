"""Reports on a fit: the analysis, its file fit.json, its pictures and its HTML page."""

from typing import TYPE_CHECKING, Any

from .analysis import Analysis, DataSource, analyse, read_analysis, write_analysis
from .tables import OptimalRun, optimal_runs


if TYPE_CHECKING:
    from .page import pictures, report_html, write_figures, write_report

# these functions need matplotlib, which is imported when one of them is first used
DRAWING = ("pictures", "report_html", "write_figures", "write_report")


def __getattr__(name: str) -> Any:
    if name not in DRAWING:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import page

    return getattr(page, name)


__all__ = [
    "Analysis",
    "DataSource",
    "OptimalRun",
    "analyse",
    "optimal_runs",
    "pictures",
    "read_analysis",
    "report_html",
    "write_analysis",
    "write_figures",
    "write_report",
]
