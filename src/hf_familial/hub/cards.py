"""Model cards: what a repository of a family or of one member says of itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .card_text import BEGIN, END
from .describe import ExitDescription, FamilyDescription
from .places import Lineage, Place


TAGS = ("familial", "early-exit")
COLUMNS = (
    "exit",
    "depth",
    "parameters",
    "without embeddings",
    "FLOPs/token, prefill",
    "FLOPs/token, decode",
    "KV bytes/token",
    "cache",
    "eval loss",
)


def member_card(
    family: FamilyDescription,
    exit_idx: int,
    lineage: Lineage,
    architecture: str,
    tokenizer: bool = True,
) -> ModelCard:
    """The card of a plain member.

    Args:
        family ([`FamilyDescription`]): What the members weigh and cost.
        exit_idx (`int`): The member, from 0.
        lineage ([`Lineage`]): Where everything is.
        architecture (`str`): Class of transformers that loads it.
        tokenizer (`bool`, *optional*, defaults to `True`): Whether one stands beside it.

    Returns:
        `ModelCard`
    """
    row, place = family.exits[exit_idx], lineage.members[exit_idx]
    total = family.exits[-1].depth
    base = lineage.base_model or (lineage.family.repo_id if lineage.family else None)
    base = None if base == place.repo_id else base
    private = family.num_exit_layers if row.depth < total else 0
    own = f", and {private} of its own," if private else ""
    which = "the deepest member" if row.depth == total else f"exit {exit_idx}"
    text = [
        f"# {_title(place)}",
        f"The first {row.depth} of {total} layers{own} of a family of {len(family.exits)} language "
        f"models on one `{family.backbone}` backbone: {which}, cut out as an ordinary "
        f"`{architecture}` of {_si(row.parameters)} parameters. It needs transformers only: no "
        "other package, no remote code.",
        "## Load",
        _code(
            *_imports(tokenizer),
            "",
            f"model = AutoModelForCausalLM.from_pretrained({place.arguments})",
            *_inputs(place.arguments, tokenizer),
            "model.generate(**inputs)",
        ),
        *_members_section(family, lineage, exit_idx),
        *_draft_section(exit_idx, lineage),
        *_relay_section(family, lineage),
        *_lineage_section(lineage),
    ]
    data = _metadata(base, lineage, _results([row]), _title(place))
    return _card(data, text)


def family_card(family: FamilyDescription, lineage: Lineage, tokenizer: bool = True) -> ModelCard:
    """The card of a whole family.

    Args:
        family ([`FamilyDescription`]): What the members weigh and cost.
        lineage ([`Lineage`]): Where everything is; `lineage.family` is this.
        tokenizer (`bool`, *optional*, defaults to `True`): Whether one stands beside it.

    Returns:
        `ModelCard`
    """
    place = lineage.family
    if place is None:
        raise ValueError("`lineage.family` must say where the family is, got None.")
    depths = ", ".join(str(row.depth) for row in family.exits)
    text = [
        f"# {_title(place)}",
        f"A familial model: {len(family.exits)} language models on one `{family.backbone}` "
        f"backbone, which end after {depths} layers. {_si(family.parameters)} parameters in all; "
        "each member runs only the layers up to its exit.",
        "## Load",
        _code(
            *_imports(tokenizer),
            "",
            "# where hf_familial is installed: `import hf_familial` instead of trust_remote_code",
            "model = AutoModelForCausalLM.from_pretrained(",
            f"    {place.arguments}, trust_remote_code=True",
            ")",
            # its config names code, which would be asked about here too
            *_inputs(f"{place.arguments}, trust_remote_code=True", tokenizer),
            "model.generate(**inputs, exit_idx=0)  # runs "
            f"{family.exits[0].depth} of {family.exits[-1].depth} layers",
        ),
        *_members_section(family, lineage, None),
        *_relay_section(family, lineage),
        *_lineage_section(lineage),
    ]
    base = lineage.base_model if lineage.base_model != place.repo_id else None
    return _card(_metadata(base, lineage, _results(family.exits), _title(place)), text)


def index_card(family: FamilyDescription, lineage: Lineage, repo_id: str) -> ModelCard:
    """The card of a repository that holds members in its branches, and nothing else.

    Args:
        family ([`FamilyDescription`]): What the members weigh and cost.
        lineage ([`Lineage`]): Where everything is.
        repo_id (`str`): The repository.

    Returns:
        `ModelCard`
    """
    example = next(iter(lineage.members.values()))
    text = [
        f"# {repo_id.split('/')[-1]}",
        f"Members of a family of language models on one `{family.backbone}` backbone, one in each "
        "branch of this repository. Each is an ordinary model of transformers: no other package, "
        "no remote code. The main branch holds no model.",
        "## Load",
        _code(
            "from transformers import AutoModelForCausalLM",
            "",
            f"model = AutoModelForCausalLM.from_pretrained({example.arguments})",
        ),
        *_members_section(family, lineage, None),
        *_lineage_section(lineage),
    ]
    return _card(_metadata(lineage.base_model, lineage, [], repo_id.split("/")[-1]), text)


def _imports(tokenizer: bool) -> tuple[str, ...]:
    if tokenizer:
        return ("from transformers import AutoModelForCausalLM, AutoTokenizer",)
    return "import torch", "from transformers import AutoModelForCausalLM"


def _inputs(where: str, tokenizer: bool) -> tuple[str, ...]:
    """What a model reads: text where the repository holds a tokenizer, else token ids."""
    if tokenizer:
        return (
            f"tokenizer = AutoTokenizer.from_pretrained({where})",
            'inputs = tokenizer("Once", return_tensors="pt")',
        )
    return (
        "# no tokenizer is here: put in the ids of your own",
        'inputs = {"input_ids": torch.tensor([[1, 2, 3]])}',
    )


def _card(data: ModelCardData, text: Sequence[str]) -> ModelCard:
    body = "\n\n".join([BEGIN, *text, END])
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n")


def _metadata(
    base: str | None, lineage: Lineage, results: list[EvalResult], name: str
) -> ModelCardData:
    fields: dict[str, Any] = dict(lineage.licence)
    if base:
        # of the relations that the Hub knows, the one for weights trained further
        fields |= {"base_model": base, "base_model_relation": "finetune"}
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=list(TAGS),
        model_name=name,
        eval_results=results or None,
        **fields,
    )


def _results(rows: Sequence[ExitDescription]) -> list[EvalResult]:
    """Losses and perplexities as the Hub's model index has them."""
    results = []
    for row in rows:
        if row.eval_loss is None:
            continue
        label = f"held-out text (exit {row.exit_idx}, depth {row.depth})"
        found = [("loss", "Cross entropy (nats per token)", row.eval_loss)]
        if row.eval_loss < 100:
            found.append(("perplexity", "Perplexity", math.exp(row.eval_loss)))
        for kind, name, value in found:
            results.append(
                EvalResult(
                    task_type="text-generation",
                    task_name="Text Generation",
                    dataset_type=f"held-out-depth-{row.depth}",
                    dataset_name=label,
                    metric_type=kind,
                    metric_name=name,
                    metric_value=round(value, 6),
                )
            )
    return results


def _members_section(
    family: FamilyDescription, lineage: Lineage, this: int | None
) -> tuple[str, str, str]:
    names = [*COLUMNS, "where"]
    lines = [f"| {' | '.join(names)} |", "|" + "---:|" * (len(names) - 1) + "---|"]
    for row in family.exits:
        place = lineage.members.get(row.exit_idx)
        where = "this" if row.exit_idx == this else place.link if place else ""
        cells = [str(row.exit_idx), str(row.depth), f"{row.parameters:,}", f"{row.non_embedding:,}"]
        cells += [_si(row.prefill_flops_per_token), _si(row.decode_flops_per_token)]
        cells += ["–" if row.kv_bytes_per_token is None else f"{row.kv_bytes_per_token:,}"]
        cells += [f"{_si(row.cache_bytes)}B" if row.cache_bytes is not None else "–"]
        cells += ["–" if row.eval_loss is None else f"{row.eval_loss:.4f}", where]
        lines.append(f"| {' | '.join(cells)} |")
    counted = "counted" if all(row.exact for row in family.exits) else "estimated"
    note = (
        f"FLOPs and cache {counted} at {family.context:,} tokens of context, batch 1, "
        f"{family.dtype}; prefill is the mean over the context, the head at every position; decode "
        "is one more token. KV bytes are the growth of the cache by that token. Losses in nats per "
        "token."
    )
    return "## Members", "\n".join(lines), note


def _draft_section(exit_idx: int, lineage: Lineage) -> tuple[str, ...]:
    shallower = [lineage.members[k] for k in sorted(lineage.members) if k < exit_idx]
    if not shallower:
        return ()
    return (
        "## A shallower member drafts",
        "Members share their vocabulary, so stock transformers speeds this one up with a shallower "
        "one; the greedy text stays the same (in float32; half precision may break near-ties "
        "otherwise):",
        _code(
            f"draft = AutoModelForCausalLM.from_pretrained({shallower[0].arguments})",
            "model.generate(**inputs, assistant_model=draft)",
        ),
    )


def _relay_section(family: FamilyDescription, lineage: Lineage) -> tuple[str, ...]:
    if lineage.family is None or len(family.exits) == 1:
        return ()
    return (
        "## Relay",
        "In the family, a deeper member goes on from the hidden states of a shallower one and "
        "computes nothing twice. The code for that comes with the family, no package is needed:",
        _code(
            "family = AutoModelForCausalLM.from_pretrained(",
            f"    {lineage.family.arguments}, trust_remote_code=True",
            ")",
            "family.relay_generate(**inputs)  # a shallow exit drafts, the deepest checks",
        ),
    )


def _lineage_section(lineage: Lineage) -> tuple[str, ...]:
    lines = []
    if lineage.base_model:
        link = Place(lineage.base_model).link
        lines.append(f"- The backbone comes from {link}.")
    if lineage.family:
        lines.append(f"- The family: {lineage.family.link}.")
    lines.append("- Made with `hf_familial`.")
    return "## Lineage", "\n".join(lines)


def _title(place: Place) -> str:
    name = place.repo_id.split("/")[-1]
    return f"{name} ({place.revision})" if place.revision else name


def _code(*lines: str) -> str:
    return "\n".join(["```python", *lines, "```"])


def _si(number: float | None) -> str:
    """A number with three digits and a metric prefix."""
    if number is None:
        return "–"
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= factor:
            return f"{number / factor:.3g} {prefix}"
    return f"{number:.3g} "


__all__ = ["family_card", "index_card", "member_card"]
