"""Commands that plan a training run from a fit: plan, advise."""

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
from ._help import ADVANCED, Command
from ._options import AsJson, Level, fit_or_law, numbers, pairs
from ._tables import bold, notes, table
from .app import LAWS, app


if TYPE_CHECKING:
    from ..scaling import Advice, Candidate, Estimate, HeadFlops, Plan
    from ..scaling.tables.facts import Facts

CANDIDATES = (
    "At least two files from `fit --out`, or names of laws. Append variables of the law and "
    "traits, for example moe.json:S=0.9,stored=8 or family.json:branch=branch.json."
)
# traits of a candidate that are not variables of its law
TRAITS = ("stored", "active", "error")
GAINS = {
    "loss": "Efficiency Leverage, ratio of losses at equal FLOPs",
    "compute": "Efficiency Leverage, ratio of FLOPs at equal loss",
}
DEPLOY = "Memory and serving"


@app.command(cls=Command, rich_help_panel=LAWS)
def plan(
    fit: Annotated[
        str,
        Argument(metavar="FIT", help="A file from `fit --out`, or a law with published values."),
    ],
    flops: Annotated[
        float | None, Option(help="Training budget in FLOPs, for example 1e21.")
    ] = None,
    loss: Annotated[
        float | None, Option(help="Find the smallest budget that reaches this loss.")
    ] = None,
    granularity: Annotated[int, Option(min=1, metavar="G", help="Number of exits.")] = 1,
    tokens: Annotated[
        float | None, Option(metavar="N", help="Use at most N training tokens.")
    ] = None,
    given: Annotated[
        list[str] | None,
        Option(
            "--set",
            metavar="NAME=X",
            help="Set another variable of the law, for example S=0.5.",
        ),
    ] = None,
    as_json: AsJson = False,
    memory: Annotated[
        str | None,
        Option(
            metavar="SIZE",
            rich_help_panel=DEPLOY,
            help="Memory for the weights: a number of bytes, 2GB or 512MiB.",
        ),
    ] = None,
    bytes_per_parameter: Annotated[
        float, Option(metavar="X", rich_help_panel=DEPLOY, help="2 is bfloat16, 4 is float32.")
    ] = 2.0,
    deployed: Annotated[
        float,
        Option(
            metavar="SHARE",
            rich_help_panel=DEPLOY,
            help="Size of the deployed member as a share of N.",
        ),
    ] = 1.0,
    inference_tokens: Annotated[
        float,
        Option(
            metavar="N",
            rich_help_panel=DEPLOY,
            help="The budget also pays for serving N tokens.",
        ),
    ] = 0.0,
    head_flops: Annotated[
        bool,
        Option(rich_help_panel=ADVANCED, help="Count the FLOPs of every head, not only 6ND."),
    ] = True,
    vocab: Annotated[
        int | None,
        Option(
            min=1,
            metavar="N",
            rich_help_panel=ADVANCED,
            help="Vocabulary size of the heads. By default that of the fitted runs.",
        ),
    ] = None,
    branch: Annotated[
        str | None,
        Option(
            metavar="FIT",
            rich_help_panel=ADVANCED,
            help="Fit of a branch law, to predict the loss of every exit.",
        ),
    ] = None,
    members: Annotated[
        str | None,
        Option(
            metavar="SHARES",
            rich_help_panel=ADVANCED,
            help="Sizes of the members as shares of N, for example 0.25,0.5,1.",
        ),
    ] = None,
    level: Level = 0.95,
) -> None:
    """Find the best model size and token count for a budget or loss."""
    from ..errors import DomainWarning
    from ..scaling import Limits, plan

    if (flops is None) == (loss is None):
        both = "Pass either `--flops` or `--loss`, not both."
        raise ValueError("Pass `--flops` or `--loss`." if flops is None else both)
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
            members=None if members is None else numbers(members, "--members", "0.25,0.5,1"),
            level=level,
            **(pairs(given, float, "--set", "S=0.5") or {}),
        )
    if as_json:
        typer.echo(json.dumps(answer.to_dict(), allow_nan=False))
    else:
        _show_plan(answer, _cost_words(facts, cost))


@app.command(cls=Command, rich_help_panel=LAWS)
def advise(
    candidates: Annotated[list[str], Argument(metavar="CANDIDATES", help=CANDIDATES)],
    flops: Annotated[float, Option(help="Training budget in FLOPs, for example 1e22.")],
    unique_tokens: Annotated[
        float, Option(metavar="N", help="Number of distinct training tokens.")
    ],
    memory: Annotated[
        str,
        Option(
            metavar="SIZES", help="Memory for the weights on each device, for example 4GB,16GB."
        ),
    ],
    epochs: Annotated[float, Option(help="Use each token at most X times.")] = 4.0,
    inference_tokens: Annotated[
        float, Option(metavar="N", help="The budget also pays for serving N tokens per device.")
    ] = 0.0,
    bytes_per_parameter: Annotated[
        float, Option(metavar="X", help="2 is bfloat16, 4 is float32.")
    ] = 2.0,
    losses_compare: Annotated[
        bool,
        Option(
            "--losses-compare",
            help="Rank the laws even if their data, tokenizers or kinds of loss differ.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Choose an architecture, and show how certain the choice is."""
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
    """Parse a candidate such as `moe.json:S=0.9,stored=8`."""
    from ..scaling import Candidate

    name, colon, words = word.rpartition(":")
    if not colon or "=" not in words:
        name, words = word, ""
    parts = [part for part in words.split(",") if part]
    branch = [part.removeprefix("branch=") for part in parts if part.startswith("branch=")]
    others = [part for part in parts if not part.startswith("branch=")]
    given = pairs(others, float, "CANDIDATES", f"{name}:S=0.9,stored=8") or {}
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
    """Return the FLOPs of a run with heads, counted in the same way as for the fitted runs."""
    from ..scaling import HeadFlops

    known = facts.cost(vocab) if facts is not None else None
    return known or (HeadFlops() if vocab is None else HeadFlops(vocab=vocab))


def _cost_words(facts: Facts | None, cost: HeadFlops | None) -> str:
    """Return a sentence about how a plan counts FLOPs."""
    if cost is None:
        return "FLOPs are 6ND."
    own = facts is not None and facts.vocab_size == cost.vocab
    source = "from the fitted runs" if own else "assumed, see --vocab"
    parts = "embeddings and one head" if cost.heads_in_N else "no embeddings and no heads"
    return (
        f"FLOPs are 6ND plus the heads, for a vocabulary of {cost.vocab:,} ({source}).\n"
        f"N counts {parts}."
    )


def _show_plan(plan: Plan, counted: str) -> None:
    """Print the best run for a budget, and how its FLOPs are counted."""
    exits = f" with G = {plan.G:g}" if plan.G != 1 else ""
    bold(f"Best run for {scientific(plan.C)} FLOPs{exits}, by the law `{plan.law}`")
    span = f"{plan.level:.0%} interval"
    rows = [
        ["parameters N", *_words(plan.N, count)],
        ["training tokens D", *_words(plan.D, count)],
        ["loss (nats/token)", *_words(plan.loss)],
        ["tokens per parameter", significant(plan.D.value / plan.N.value, 3), ""],
        ["training FLOPs", scientific(plan.training_flops), ""],
    ]
    table("", ["", "value", span], rows)
    simple = plan.simple
    typer.echo(
        f"\n{counted}\n\nWith C = 6ND and no limits, N would be {count(simple['N'])}, D "
        f"{count(simple['D'])} and the loss {significant(simple['loss'])}.\nHeads, limits and "
        f"serving change N by a factor of {significant(plan.shift, 3)}."
    )
    for limit in plan.limits_hit:
        typer.echo(f"The limit on {limit} determines this plan.")
    if plan.exits:
        rows = [
            [f"exit {i}", count(share * plan.N.value), *_words(loss)]
            for i, (share, loss) in enumerate(zip(plan.members, plan.exits, strict=True))
        ]
        table("Exits", ["", "parameters", "loss", span], rows)
    gains = {
        "Factor of FLOPs needed to match the loss of G = 1": plan.granularity,
        "The same factor, with the FLOPs of all heads": plan.granularity_with_heads,
        **{GAINS[kind]: gain for kind, gain in plan.leverage.items()},
    }
    rows = [[name, *_words(gain, _three)] for name, gain in gains.items() if gain is not None]
    if rows:
        table("Compared with dense models", ["", "", span], rows)
    notes("Notes", plan.notes, "yellow")


def _show_advice(advice: Advice) -> None:
    """Print the best architecture, the chances of all, and the assumptions that matter."""
    bold(advice.sentence)
    best = "chance to be best" if advice.winner else "chance in its group"
    rows = []
    for option in advice.options:
        runs = "; ".join(f"{count(r.N)} on {count(r.D)}" for r in option.runs)
        loss = significant(option.loss)
        rows.append([option.name, loss, f"{advice.chances[option.name]:.0%}", runs])
    table("Options", ["", "loss (nats/token)", best, "N on D"], rows)
    changed = []
    for row in advice.sensitivity:
        factor = MISSING if row.turns_at is None else f"× {_three(row.turns_at)}"
        name = row.assumption.replace("_", " ")
        changed.append([f"{name} × {row.factor:g}", row.winner, factor if row.changes else ""])
    if changed:
        table("Under other assumptions", ["assumption", "best", "changes at"], changed)
    notes("Notes", advice.notes, "yellow")


def _three(value: float) -> str:
    return significant(value, 3)


def _words(number: Estimate, words: Callable[[float], str] = significant) -> tuple[str, str]:
    """Return a number and its interval as text."""
    known = number.interval
    return words(number.value), f"[{words(known.low)}, {words(known.high)}]" if known else MISSING
