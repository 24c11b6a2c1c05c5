"""What the commands of the fitter show on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .._wording import MISSING, count, estimate, scientific, significant


if TYPE_CHECKING:
    from ..scaling.advice import Advice
    from ..scaling.confidence import Estimate
    from ..scaling.planning import Plan
    from ..scaling.report import Analysis


FAMILIES = {
    "familial": "Familial models",
    "dense": "Dense models",
    "sparse": "Sparse models and mixtures of experts",
    "rule": "Rules for settings",
}


def console() -> Console:
    """Where everything goes; numbers are not coloured."""
    return Console(highlight=False, soft_wrap=False)


def grid(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table of numbers whose first column names them."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for i, name in enumerate(head):
        table.add_column(name, justify="right" if i else "left", no_wrap=not i, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def show_laws() -> None:
    """Every law of the catalogue: name, formula, source."""
    from ..scaling import LAWS

    out = console()
    for family, title in FAMILIES.items():
        laws = [law for law in LAWS.values() if law.family == family]
        if not laws:
            continue
        out.print(f"\n[bold]{title}[/bold]")
        for law in laws:
            out.print(Text.assemble("  ", (law.name, "bold"), f"  {law.title}"))
            out.print(Text(f"      {law.formula_text}"))
            out.print(Text(f"      reads {', '.join(law.variable_names)}; {law.source}", "dim"))


def show_analysis(analysis: Analysis) -> None:
    """A fit: coefficients, what was left out, warnings."""
    fit, out = analysis.fit, console()
    left = f", {analysis.left_out}" if analysis.left_out else ""
    out.print(Text.assemble((fit.law.title, "bold"), f"\n{fit.law.formula_text}"))
    out.print(
        f"{len(fit.data)} rows of {fit.data.runs} runs{left}; {str(fit.status).replace('_', ' ')}, "
        f"{fit.agreement:.0%} of {fit.starts} starts agree; objective {fit.objective:.6g}\n"
    )
    rows = []
    for name, value in fit.values.items():
        known = [found.get(name) for found in analysis.intervals.values()]
        pairs = [estimate(value, i.low, i.high) if i else ("", MISSING) for i in known]
        words = next((pair[0] for pair in pairs if pair[0]), significant(value))
        state = "" if name in fit.free else "tied" if name in fit.settings.tied else "fixed"
        rows.append([name, words, *(pair[1] for pair in pairs), state])
    head = ["", "value", *(f"{analysis.level:.0%} {method}" for method in analysis.intervals), ""]
    out.print(grid("", head, rows))
    columns = ", ".join(f"{name} = {column}" for name, column in analysis.source.columns.items())
    told = [f"Columns: {columns}."] if columns else []
    facts = analysis.source.facts.words
    show_notes([*told, *([f"Runs: {facts}."] if facts else []), *analysis.source.notes], "Reading")
    show_notes(analysis.warnings, "Warnings", style="yellow")


def show_notes(notes: Iterable[str], title: str, style: str = "") -> None:
    """Sentences below a title, if there are any."""
    out, sentences = console(), list(notes)
    if sentences:
        out.print(Text(f"\n{title}", "bold"))
    for sentence in sentences:
        out.print(Text(f"- {sentence}", style))


def show_advice(advice: Advice) -> None:
    """Which architecture, how sure, and what would change the answer."""
    out = console()
    out.print(Text(advice.sentence, "bold"))
    best = "best in" if advice.winner else "best in group"
    rows = []
    for option in advice.options:
        runs = "; ".join(f"{count(r.N)} on {count(r.D)}" for r in option.runs)
        loss = significant(option.loss)
        rows.append([option.name, loss, f"{advice.chances[option.name]:.0%}", runs])
    out.print(grid("\nOptions", ["", "loss (nats/token)", best, "N on D"], rows))
    turns = []
    for row in advice.sensitivity:
        turn = MISSING if row.turns_at is None else f"× {significant(row.turns_at, 3)}"
        name = row.assumption.replace("_", " ")
        turns.append([f"{name} × {row.factor:g}", row.winner, turn if row.changes else ""])
    if turns:
        out.print(grid("\nIf it were otherwise", ["", "best", "turns at"], turns))
    show_notes(advice.notes, "Notes", style="yellow")


def show_written(paths: Iterable[Path]) -> None:
    """The files that were written; many of one folder in one line."""
    folders: dict[Path, list[Path]] = {}
    for path in paths:
        folders.setdefault(path.parent, []).append(path)
    for folder, files in folders.items():
        lines = [f"{len(files)} files to {folder}"] if len(files) > 3 else map(str, files)
        for line in lines:
            console().print(Text(f"wrote {line}"), soft_wrap=True)


def show_plan(plan: Plan, counted: str = "") -> None:
    """The best run for a budget, and how its FLOPs are counted."""
    out = console()
    exits = f" with G = {plan.G:g}" if plan.G != 1 else ""
    out.print(Text(f"{scientific(plan.C)} FLOPs{exits}, by `{plan.law}`", "bold"))
    kinds = {"parameters N": (plan.N, count), "training tokens D": (plan.D, count)}
    rows = [[name, *_words(number, words)] for name, (number, words) in kinds.items()]
    rows.append(["loss (nats/token)", *_words(plan.loss, significant)])
    rows.append(["tokens per parameter", significant(plan.D.value / plan.N.value, 3), ""])
    rows.append(["training FLOPs", scientific(plan.training_flops), ""])
    out.print(grid("", ["", "best", f"{plan.level:.0%} interval"], rows))
    if counted:
        out.print(Text(f"\n{counted}"))
    simple = plan.simple
    out.print(
        f"\nWith C = 6ND and no limits: N {count(simple['N'])}, D {count(simple['D'])}, loss "
        f"{significant(simple['loss'])}; heads, limits and service move N by a factor of "
        f"{significant(plan.shift, 3)}."
    )
    for limit in plan.limits_hit:
        out.print(f"Held by the limit on {limit}.")
    if plan.exits:
        shares = zip(plan.members, plan.exits, strict=True)
        rows = [
            [f"exit {i}", count(share * plan.N.value), *_words(loss, significant)]
            for i, (share, loss) in enumerate(shares)
        ]
        out.print(grid("\nExits", ["", "parameters", "loss", f"{plan.level:.0%} interval"], rows))
    gains = _gains(plan)
    if gains:
        out.print(grid("\nAgainst dense models", ["", "", f"{plan.level:.0%} interval"], gains))
    show_notes(plan.notes, "Notes", style="yellow")


def _gains(plan: Plan) -> list[list[str]]:
    """What granularity costs and saves."""
    rows = []
    costs = {
        "factor of compute that buys back the exits' loss": plan.granularity,
        "the same, their heads paid for": plan.granularity_with_heads,
    }
    rows += [[name, *_three(cost)] for name, cost in costs.items() if cost is not None]
    names = {
        "loss": "Efficiency Leverage, ratio of losses at equal FLOPs",
        "compute": "Efficiency Leverage, ratio of FLOPs at equal loss",
    }
    rows += [[names[kind], *_three(gain)] for kind, gain in plan.leverage.items()]
    return rows


def _three(number: Estimate) -> tuple[str, str]:
    return _words(number, lambda value: significant(value, 3))


def _words(number: Estimate, words: Callable[[float], str]) -> tuple[str, str]:
    """A number and its interval."""
    interval = number.interval
    span = f"[{words(interval.low)}, {words(interval.high)}]" if interval else MISSING
    return words(number.value), span


def show_rows(title: str, rows: Sequence[Mapping[str, object]]) -> None:
    """Rows of numbers and words, all of the same names."""
    if rows:
        head = list(rows[0])
        cells = [[_cell(row[name]) for name in head] for row in rows]
        console().print(grid(title, head, cells))


def _cell(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: MISSING}[value]
    return significant(value) if isinstance(value, float) else str(value)


__all__ = [
    "show_advice",
    "show_analysis",
    "show_laws",
    "show_notes",
    "show_plan",
    "show_rows",
    "show_written",
]
