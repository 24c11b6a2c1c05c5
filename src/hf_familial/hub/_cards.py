"""Model cards of families and members on the Hub."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import yaml  # type: ignore[import-untyped]
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .._wording import count, metric
from .description import ExitDescription, FamilyDescription


TAGS = ("familial", "early-exit")

# every push replaces the text between these marks; all other text of a card belongs to its owner
BEGIN = "<!-- hf_familial: written by push, up to the end mark -->"
END = "<!-- hf_familial: end -->"

# metadata fields that a push does not change once the owner has set them
OWNERS = ("license", "license_name", "license_link", "language", "datasets", "pipeline_tag")


@dataclass(frozen=True)
class RepoRevision:
    """A repository on the Hub, or one branch of it.

    Attributes:
        repo_id (`str`): Id of the repository, such as `"me/family"`.
        revision (`str`, *optional*): Name of the branch. `None` is the main branch.
    """

    repo_id: str
    revision: str | None = None

    @property
    def arguments(self) -> str:
        """The arguments in a call of `from_pretrained`."""
        suffix = f', revision="{self.revision}"' if self.revision else ""
        return f'"{self.repo_id}"{suffix}'

    @property
    def name(self) -> str:
        """The name for messages: `user/name`, or `user/name@branch`."""
        return f"{self.repo_id}@{self.revision}" if self.revision else self.repo_id

    @property
    def link(self) -> str:
        """The Markdown link to the repository or branch."""
        if self.revision is None:
            return f"[{self.repo_id}](https://huggingface.co/{self.repo_id})"
        url = f"https://huggingface.co/{self.repo_id}/tree/{self.revision}"
        return f"[{self.revision}]({url})"

    @property
    def title(self) -> str:
        """The name for headings, without the user."""
        name = self.repo_id.split("/")[-1]
        return f"{name} ({self.revision})" if self.revision else name


@dataclass(frozen=True)
class Provenance:
    """The origin of a family: its base model, its repository, its members and its licence."""

    base_model: str | None = None
    family: RepoRevision | None = None
    members: Mapping[int, RepoRevision] = field(default_factory=dict)
    licence: Mapping[str, str] = field(default_factory=dict)


def member_card(
    family: FamilyDescription,
    exit_idx: int,
    provenance: Provenance,
    architecture: str,
    tokenizer: bool = True,
) -> ModelCard:
    """Return the card of a member exported as a plain model of the class `architecture`."""
    repo, row = provenance.members[exit_idx], family.exits[exit_idx]
    base = provenance.base_model or (provenance.family.repo_id if provenance.family else None)
    shallower = [provenance.members[k] for k in sorted(provenance.members) if k < exit_idx]
    return _card(
        "member",
        family,
        provenance,
        repo,
        repo,
        None if base == repo.repo_id else base,
        [row],
        row=row,
        private=family.num_exit_layers if row is not family.exits[-1] else 0,
        architecture=architecture,
        tokenizer=tokenizer,
        draft=shallower[0] if shallower else None,
    )


def family_card(
    family: FamilyDescription, provenance: Provenance, tokenizer: bool = True
) -> ModelCard:
    """Return the card of the family in the repository `provenance.family`."""
    repo = provenance.family
    if repo is None:
        raise ValueError("`provenance.family` must be the family's repository, got None.")
    base = provenance.base_model if provenance.base_model != repo.repo_id else None
    rows = family.exits
    return _card("family", family, provenance, repo, repo, base, rows, tokenizer=tokenizer)


def index_card(family: FamilyDescription, provenance: Provenance, repo_id: str) -> ModelCard:
    """Return the card of a repository with an empty main branch and members on other branches."""
    example = next(iter(provenance.members.values()))
    repo, base = RepoRevision(repo_id), provenance.base_model
    return _card("index", family, provenance, repo, example, base, [])


def _card(
    kind: str,
    family: FamilyDescription,
    provenance: Provenance,
    repo: RepoRevision,
    shown: RepoRevision,
    base: str | None,
    rows: Sequence[ExitDescription],
    **more: Any,
) -> ModelCard:
    """Fill the template `card.md.j2` and the metadata. The code on the card loads `shown`."""
    fields: dict[str, Any] = dict(provenance.licence)
    if base:
        # on the Hub, this relation means that training continued from the base model
        fields |= {"base_model": base, "base_model_relation": "finetune"}
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=list(TAGS),
        model_name=repo.title,
        eval_results=_results(rows) or None,
        **fields,
    )
    source = Path(__file__).with_name("card.md.j2").read_text(encoding="utf-8")
    template = jinja2.Template(source, trim_blocks=True, lstrip_blocks=True)
    text = template.render(
        kind=kind,
        title=repo.title,
        where=shown.arguments,
        family=family,
        depth=family.exits[-1].depth,
        provenance=provenance,
        base=RepoRevision(provenance.base_model) if provenance.base_model else None,
        table=[_cells(row, provenance, repo) for row in family.exits],
        count=count,
        **more,
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{BEGIN}\n\n{text.strip()}\n\n{END}\n")


def _cells(row: ExitDescription, provenance: Provenance, this: RepoRevision) -> list[str]:
    """Return one row of the table of members."""
    repo = provenance.members.get(row.exit_idx)
    cells = [str(row.exit_idx), str(row.depth), f"{row.parameters:,}", f"{row.non_embedding:,}"]
    cells += [metric(row.prefill_flops_per_token), metric(row.decode_flops_per_token)]
    cells += ["-" if row.kv_bytes_per_token is None else f"{row.kv_bytes_per_token:,}"]
    cells += ["-" if row.cache_bytes is None else f"{metric(row.cache_bytes)}B"]
    cells += ["-" if row.eval_loss is None else f"{row.eval_loss:.4f}"]
    where = "this" if repo == this else repo.link if repo else ""
    return [*("–" if cell == "-" else cell for cell in cells), where]


def _results(rows: Sequence[ExitDescription]) -> list[EvalResult]:
    """Return losses and perplexities for the `model-index` metadata of the Hub."""
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


def merge_card(card: ModelCard, owned: str | None) -> str:
    """Return the owner's existing card `owned`, with the marked part replaced by that of `card`."""
    fresh = card.data.to_dict()
    metadata, text = _split(owned or "")
    kept = {name: metadata[name] for name in OWNERS if name in metadata}
    tags = {"tags": _merged(fresh.get("tags"), metadata.get("tags"))}
    # match from the last begin mark before an end mark; one mark without the other does not count
    marked = re.compile(f"{re.escape(BEGIN)}(?:(?!{re.escape(BEGIN)}).)*?{re.escape(END)}", re.S)
    part = card.text.strip()
    if marked.search(text):
        text = marked.sub(lambda match: part, text, count=1)
    else:
        text = f"{text.strip()}\n\n{part}".strip() + "\n"
    data = yaml.safe_dump(metadata | fresh | kept | tags, sort_keys=False, allow_unicode=True)
    return f"---\n{data}---\n\n{text.lstrip()}"


def read_metadata(text: str | None) -> dict[str, Any]:
    """Return the metadata of a card. It is empty if the card has none that can be read."""
    return _split(text or "")[0]


def _split(text: str) -> tuple[dict[str, Any], str]:
    """Return the metadata and the body of a card."""
    match = re.match(r"---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", text, re.DOTALL)
    if match is None:
        return {}, text
    try:
        metadata = yaml.safe_load(match[1])
    except yaml.YAMLError:
        return {}, text[match.end() :]
    return metadata if isinstance(metadata, dict) else {}, text[match.end() :]


def _merged(*lists: Any) -> list[str]:
    words = [
        word for found in lists for word in ([found] if isinstance(found, str) else found or [])
    ]
    return list(dict.fromkeys(words))
