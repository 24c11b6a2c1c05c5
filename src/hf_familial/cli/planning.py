"""Commands that plan a run by a fit: plan, advise."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from .._wording import MISSING, count, parse_size, scientific, significant
from ._options import AsJson, Level, fit_or_law, numbers, pairs
from ._tables import bold, notes, table
from .app import app


if TYPE_CHECKING:
    from ..scaling import Advice, Candidate, Estimate, HeadFlops, Plan
    from ..scaling.tables.facts import Facts

CANDIDATES = (
    "A fit.json or a law for each architecture, with what is particular to it, as "
    "moe.json:S=0.9,stored=8 or family.json:branch=branch.json."
)
# of a candidate: what is no variable of its law
TRAITS = ("stored", "active", "error")
GAINS = {
    "loss": "Efficiency Leverage, ratio of losses at equal FLOPs",
    "compute": "Efficiency Leverage, ratio of FLOPs at equal loss",
}


@app.command()
def plan(
    fit: Annotated[str, Argument(help="A fit.json, or a law for its published values.")],
    flops: Annotated[float | None, Option(help="Compute budget, as 1e21.")] = None,
    loss: Annotated[float | None, Option(help="Loss to reach, instead of a budget.")] = None,
    granularity: Annotated[int, Option(min=1, help="Number of exits, G.")] = 1,
    given: Annotated[list[str] | None, Option("--set", help="A variable, as S=0.5.")] = None,
    tokens: Annotated[float | None, Option(help="Training tokens there are.")] = None,
    memory: Annotated[str | None, Option(help="For the weights: bytes, 2GB, 512MiB.")] = None,
    bytes_per_parameter: Annotated[float, Option(help="2 for bfloat16.")] = 2.0,
    deployed: Annotated[float, Option(help="The deployed member's share of N.")] = 1.0,
    inference_tokens: Annotated[float, Option(help="Tokens to be served.")] = 0.0,
    head_flops: Annotated[bool, Option(help="Count the exits' heads; else C = 6ND.")] = True,
    vocab: Annotated[int | None, Option(min=1, help="Rows of a head; else the runs' own.")] = None,
    branch: Annotated[str | None, Option(help="Fit of a branch law: loss of every exit.")] = None,
    members: Annotated[str | None, Option(help="Members' shares of N, as 0.25,0.5,1.")] = None,
    level: Level = 0.95,
    as_json: AsJson = False,
) -> None:
    """Plan the best run for a budget, or the least budget for a loss."""
    from ..errors import DomainWarning
    from ..scaling import Limits, plan

    if (flops is None) == (loss is None):
        both = "give either `--flops` or `--loss`, not both."
        raise ValueError("give `--flops` or `--loss`." if flops is None else both)
    source, facts = fit_or_law(fit)
    cost = _head_cost(facts, vocab) if head_flops else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DomainWarning)  # the plan's notes say the same
        answer = plan(
            source,
            flops,
            granularity,
            loss=loss,
            head_flops=head_flops,
            flops=cost,
            limits=Limits(
                memory=math.inf if memory is None else parse_size(memory),
                bytes_per_parameter=bytes_per_parameter,
                deployed=deployed,
                tokens=math.inf if tokens is None else tokens,
                inference_tokens=inference_tokens,
            ),
            branch=None if branch is None else fit_or_law(branch)[0],
            members=None if members is None else numbers(members, "--members 0.25,0.5,1"),
            level=level,
            **(pairs(given, float, "--set S=0.5") or {}),
        )
    if as_json:
        typer.echo(json.dumps(answer.to_dict(), allow_nan=False))
    else:
        _show_plan(answer, _cost_words(facts, cost))


@app.command()
def advise(
    candidates: Annotated[list[str], Argument(help=CANDIDATES)],
    unique_tokens: Annotated[float, Option(help="Different training tokens there are.")],
    flops: Annotated[float, Option(help="Compute budget, as 1e22.")],
    memory: Annotated[str, Option(help="For the weights on each device, as 4GB,16GB.")],
    inference_tokens: Annotated[float, Option(help="Tokens served; the budget pays.")] = 0.0,
    epochs: Annotated[float, Option(help="How often a token may be seen.")] = 4.0,
    bytes_per_parameter: Annotated[float, Option(help="2 for bfloat16.")] = 2.0,
    losses_compare: Annotated[
        bool, Option("--losses-compare", help="Rank laws even of other data, tokenizer or loss.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Say which architecture to train, how sure that is, and what would change the answer."""
    from ..scaling import advise

    answer = advise(
        unique_tokens=unique_tokens,
        training_flops=flops,
        candidates=[_candidate(word) for word in candidates],
        memory=[parse_size(word) for word in memory.split(",")],
        inference_tokens=inference_tokens,
        epochs=epochs,
        bytes_per_parameter=bytes_per_parameter,
        losses_compare=losses_compare,
    )
    if as_json:
        typer.echo(json.dumps(answer.to_dict(), allow_nan=False))
    else:
        _show_advice(answer)


def _candidate(word: str) -> Candidate:
    """Parse a candidate, as `moe.json:S=0.9,stored=8`."""
    from ..scaling import Candidate

    name, colon, words = word.rpartition(":")
    if not colon or "=" not in words:
        name, words = word, ""
    parts = [part for part in words.split(",") if part]
    branch = [part.removeprefix("branch=") for part in parts if part.startswith("branch=")]
    others = [part for part in parts if not part.startswith("branch=")]
    given = pairs(others, float, f"{name}:S=0.9,stored=8") or {}
    source, facts = fit_or_law(name)
    return Candidate(
        name=Path(name).stem,
        source=source,
        facts=facts,
        given={name: value for name, value in given.items() if name not in TRAITS},
        branch=fit_or_law(branch[0])[0] if branch else None,
        **{name: given[name] for name in TRAITS if name in given},  # type: ignore[arg-type]
    )


def _head_cost(facts: Facts | None, vocab: int | None) -> HeadFlops:
    """Return the cost of a run, heads included, counted as the fitted runs counted it."""
    from ..scaling import HeadFlops

    known = facts.cost(vocab) if facts is not None else None
    return known or (HeadFlops() if vocab is None else HeadFlops(vocab=vocab))


def _cost_words(facts: Facts | None, cost: HeadFlops | None) -> str:
    """Say in one line how a plan counts FLOPs."""
    if cost is None:
        return "FLOPs by C = 6ND."
    own = facts is not None and facts.vocab_size == cost.vocab
    of = "as the runs fitted have" if own else "by assumption; set it with --vocab"
    inside = "with embeddings and one head" if cost.heads_in_N else "without embeddings and heads"
    return f"FLOPs by 6ND and heads of {cost.vocab:,} tokens ({of}); N {inside}."


def _show_plan(plan: Plan, counted: str) -> None:
    """Print the best run for a budget, and how its FLOPs are counted."""
    exits = f" with G = {plan.G:g}" if plan.G != 1 else ""
    bold(f"{scientific(plan.C)} FLOPs{exits}, by `{plan.law}`")
    span = f"{plan.level:.0%} interval"
    rows = [
        ["parameters N", *_words(plan.N, count)],
        ["training tokens D", *_words(plan.D, count)],
        ["loss (nats/token)", *_words(plan.loss)],
        ["tokens per parameter", significant(plan.D.value / plan.N.value, 3), ""],
        ["training FLOPs", scientific(plan.training_flops), ""],
    ]
    table("", ["", "best", span], rows)
    simple = plan.simple
    typer.echo(
        f"\n{counted}\n\nWith C = 6ND and no limits: N {count(simple['N'])}, D "
        f"{count(simple['D'])}, loss {significant(simple['loss'])}; heads, limits and service move "
        f"N by a factor of {significant(plan.shift, 3)}."
    )
    for limit in plan.limits_hit:
        typer.echo(f"Held by the limit on {limit}.")
    if plan.exits:
        rows = [
            [f"exit {i}", count(share * plan.N.value), *_words(loss)]
            for i, (share, loss) in enumerate(zip(plan.members, plan.exits, strict=True))
        ]
        table("Exits", ["", "parameters", "loss", span], rows)
    gains = {
        "factor of compute that buys back the exits' loss": plan.granularity,
        "the same, their heads paid for": plan.granularity_with_heads,
        **{GAINS[kind]: gain for kind, gain in plan.leverage.items()},
    }
    rows = [[name, *_words(gain, _three)] for name, gain in gains.items() if gain is not None]
    if rows:
        table("Against dense models", ["", "", span], rows)
    notes("Notes", plan.notes, "yellow")


def _show_advice(advice: Advice) -> None:
    """Print which architecture is best, how sure that is, and what would change the answer."""
    bold(advice.sentence)
    best = "best in" if advice.winner else "best in group"
    rows = []
    for option in advice.options:
        runs = "; ".join(f"{count(r.N)} on {count(r.D)}" for r in option.runs)
        loss = significant(option.loss)
        rows.append([option.name, loss, f"{advice.chances[option.name]:.0%}", runs])
    table("Options", ["", "loss (nats/token)", best, "N on D"], rows)
    turns = []
    for row in advice.sensitivity:
        turn = MISSING if row.turns_at is None else f"× {_three(row.turns_at)}"
        name = row.assumption.replace("_", " ")
        turns.append([f"{name} × {row.factor:g}", row.winner, turn if row.changes else ""])
    if turns:
        table("If it were otherwise", ["", "best", "turns at"], turns)
    notes("Notes", advice.notes, "yellow")


def _three(value: float) -> str:
    return significant(value, 3)


def _words(number: Estimate, words: Callable[[float], str] = significant) -> tuple[str, str]:
    """Word a number and its interval."""
    known = number.interval
    return words(number.value), f"[{words(known.low)}, {words(known.high)}]" if known else MISSING
