"""Push a family and its members to the Hub: one commit each, none where nothing changed."""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from ..checkpoints.companions import holds_tokenizer
from ..checkpoints.cuts import check_cut
from ..checkpoints.family_files import FamilyFiles
from ..checkpoints.member_models import merged_family, weights_of
from ..models import is_family
from ..models.familial import FamilialConfig, FamilialForCausalLM
from ..models.familial.configuration_familial import check_choice
from ._cards import RepoRevision, family_card, index_card, member_card
from ._client import Retry
from ._repositories import Hub
from ._source import find_source, open_family
from .description import describe
from .export import export_exit


logger = logging.getLogger(__name__)

LAYOUTS = ("repos", "revisions")

Model = str | os.PathLike[str] | FamilialForCausalLM


@dataclass(frozen=True)
class Pushed:
    """A repository or branch that was pushed.

    Attributes:
        exit_idx (`int`, *optional*): The member in it; `None` for a whole family.
        place ([`RepoRevision`]): Repository, and branch if not the main one.
        commit (`str`): Id of its newest commit.
        changed (`bool`): Whether that commit was made by this push.
        uploaded (`tuple[str, ...]`): Paths of the files that it brought.
    """

    exit_idx: int | None
    place: RepoRevision
    commit: str
    changed: bool
    uploaded: tuple[str, ...]


@dataclass(frozen=True)
class PushReport:
    """A report of a push.

    Attributes:
        pushed (`tuple[Pushed, ...]`): In the order of the exits.
        collection (`str`, *optional*): Slug of the collection that holds the members.
    """

    pushed: tuple[Pushed, ...]
    collection: str | None = None


def push_exits_to_hub(
    model_or_path: Model,
    repo_id: str,
    *,
    exits: Sequence[int] | None = None,
    layout: str = "repos",
    private: bool | None = None,
    collection: bool = True,
    base_model: str | None = None,
    tokenizer: Any = None,
    dtype: Any = None,
    max_shard_size: str | int = "5GB",
    token: str | None = None,
    endpoint: str | None = None,
    retry: Retry | None = None,
) -> PushReport:
    """Push members as plain checkpoints, each an ordinary model of its host's class.

    One commit per member; one that the Hub holds already makes none. A push that was cut off is
    taken up by doing the same again: members that are there are compared, not uploaded.

    Args:
        model_or_path (`str`, `os.PathLike` or [`FamilialForCausalLM`]): Folder of a family, or a
            family in memory.
        repo_id (`str`): `user/name`, or a name of the token's user. Member repositories are called
            `<repo_id>-depth<depth>`, branches `depth<depth>`.
        exits (`Sequence[int]`, *optional*): Which members; all by default.
        layout (`str`, *optional*, defaults to `"repos"`): `"repos"`, one repository per member, or
            `"revisions"`, one branch of `repo_id` per member. The main branch then gets a card, or
            keeps the model that it holds.
        private (`bool`, *optional*): Visibility of repositories made here.
        collection (`bool`, *optional*, defaults to `True`): Gather member repositories, and the
            family if it is `repo_id`, in a collection.
        base_model (`str`, *optional*): Repository of the decoder that the family was made of;
            defaults to what the checkpoint's card or the model says.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): To go along; by default what the family's
            folder, or the client's cache of its repository, holds.
        dtype (`torch.dtype` or `str`, *optional*): Of the weights; unchanged by default.
        max_shard_size (`str` or `int`, *optional*, defaults to `"5GB"`): Of each weights file.
        token (`str`, *optional*): With the role `write`; defaults to the one logged in with.
        endpoint (`str`, *optional*): Address of the Hub, if not the usual one.
        retry ([`Retry`], *optional*): How often and how soon requests are sent again.

    Returns:
        [`PushReport`]

    Raises:
        FileNotFoundError: If there is no such folder, or no checkpoint in it.
        HubError: If the Hub refuses or fails, by type.
        IndexError: If there is no exit of that number.
        ValueError: If it is not a family, a member cannot be plain, or `layout` is wrong.

    Example:
        >>> push_exits_to_hub("family", "me/family", exits=[0, -1], private=True)
    """
    check_choice("layout", layout, LAYOUTS)
    push = _Push(model_or_path, token, tokenizer, dtype, max_shard_size)
    wanted = _resolve_exits(push.config, exits)
    for k in wanted:
        # an error here comes before anything is on the Hub
        check_cut(push.config, k, verified=not isinstance(push.family, FamilyFiles))
    hub = push.connect(repo_id, base_model, endpoint, retry)
    members = push.members(layout)
    there = {k: repo for k, repo in members.items() if k in wanted or hub.holds(repo)}
    push.provenance = replace(push.provenance, members=there)
    if layout == "revisions":
        hub.create(push.repo, private)
        if push.provenance.family is None:
            push.index()
    pushed = []
    for k in wanted:
        hub.create(members[k], private)
        pushed.append(push.member(k, members[k]))
    push.warn_of_bare()
    slug = None
    if collection and layout == "repos":
        slug = hub.collect(push.repo.repo_id, push.description, push.provenance, bool(private))
    return PushReport(tuple(pushed), slug)


def push_family_to_hub(
    model_or_path: Model,
    repo_id: str,
    *,
    private: bool | None = None,
    base_model: str | None = None,
    tokenizer: Any = None,
    dtype: Any = None,
    max_shard_size: str | int = "5GB",
    token: str | None = None,
    endpoint: str | None = None,
    retry: Retry | None = None,
) -> PushReport:
    """Push a whole family, with the code that loads it by `trust_remote_code=True`.

    Every segment gets files of its own, so that a device downloads those of its exit alone.
    Arguments, errors and the way it takes up what was cut off are those of [`push_exits_to_hub`].

    Args:
        model_or_path (`str`, `os.PathLike` or [`FamilialForCausalLM`]): The family.
        repo_id (`str`): `user/name`, or a name of the token's user.
        private (`bool`, *optional*): Visibility, if the repository is made here.
        base_model (`str`, *optional*): Repository of the decoder that the family was made of.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): To go along.
        dtype (`torch.dtype` or `str`, *optional*): Of the weights.
        max_shard_size (`str` or `int`, *optional*, defaults to `"5GB"`): Of each weights file.
        token (`str`, *optional*): With the role `write`.
        endpoint (`str`, *optional*): Address of the Hub.
        retry ([`Retry`], *optional*): How often and how soon requests are sent again.

    Returns:
        [`PushReport`]: With one entry.
    """
    push = _Push(model_or_path, token, tokenizer, dtype, max_shard_size)
    hub = push.connect(repo_id, base_model, endpoint, retry)
    there = {k: repo for k, repo in push.members("repos").items() if hub.holds(repo)}
    push.provenance = replace(push.provenance, family=push.repo, members=there)
    hub.create(push.repo, private)
    pushed = push.whole_family()
    push.warn_of_bare()
    return PushReport((pushed,))


class _Push:
    """A push in progress: the family, opened and described once, and its target."""

    def __init__(
        self, model_or_path: Model, token: str | None, tokenizer: Any, dtype: Any, shard: str | int
    ) -> None:
        given: Any = merged_family(model_or_path)
        self.card: str | None = None  # what the family's owner wrote beside it
        self.family: FamilialForCausalLM | FamilyFiles
        if is_family(given):
            weights_of(given)  # there are some
            self.family = given
        else:
            given = find_source(given, token=token)
            self.family = open_family(given)
            self.card = given.read_text("README.md")
        self.config: FamilialConfig = self.family.config
        self.description = describe(given, dtype=dtype)
        self.token, self.tokenizer = token, tokenizer
        self.options = {"dtype": dtype, "max_shard_size": shard}
        self.bare: list[RepoRevision] = []  # repositories that hold a model and no tokenizer

    def connect(
        self, repo_id: str, base_model: str | None, endpoint: str | None, retry: Retry | None
    ) -> Hub:
        """Find out where the family goes and comes from."""
        self.hub = Hub(HfApi(endpoint=endpoint, token=self.token), retry)
        self.repo = RepoRevision(self.hub.full_name(repo_id))
        base = base_model or _base_of(self.family)
        self.provenance = self.hub.provenance(base, self.card, self.repo.repo_id)
        return self.hub

    def members(self, layout: str) -> dict[int, RepoRevision]:
        """Return the repository or branch of each member."""
        name, depths = self.repo.repo_id, enumerate(self.config.exits)
        if layout == "repos":
            return {k: RepoRevision(f"{name}-depth{depth}") for k, depth in depths}
        return {k: RepoRevision(name, f"depth{depth}") for k, depth in depths}

    def member(self, exit_idx: int, repo: RepoRevision) -> Pushed:
        """Push one member as a plain checkpoint."""
        depth, alone = self.config.exits[exit_idx], repo.revision is not None
        message = f"Member of depth {depth} (exit {exit_idx} of {self.config.num_exits})"
        with tempfile.TemporaryDirectory(prefix="hf_familial-") as top:
            folder = Path(top) / "checkpoint"
            report = export_exit(self.family, exit_idx, folder, **self.options)
            readable = self._add_tokenizer(folder, repo)
            named = (self.description, exit_idx, self.provenance, report.architecture, readable)
            self.hub.write_card(member_card(*named), folder, repo, None)
            # a new branch holds what the main one does: other files go
            return Pushed(exit_idx, repo, *self.hub.mirror(folder, repo, message, alone))

    def whole_family(self) -> Pushed:
        """Push the family with its code."""
        with tempfile.TemporaryDirectory(prefix="hf_familial-") as top:
            folder = Path(top) / "checkpoint"
            how: dict[str, Any] = self.options | {"format": "familial", "by_segment": True}
            export_exit(self.family, -1, folder, **how)
            readable = self._add_tokenizer(folder, self.repo)
            # what `describe` reads losses from
            names = ("exit_idx", "depth", "parameters", "non_embedding", "eval_loss")
            rows = [{n: getattr(row, n) for n in names} for row in self.description.exits]
            text = json.dumps(rows, indent=2) + "\n"
            (folder / "members.json").write_text(text, encoding="utf-8")
            card = family_card(self.description, self.provenance, readable)
            self.hub.write_card(card, folder, self.repo, self.card)
            message = f"Family of {self.config.num_exits} members"
            return Pushed(None, self.repo, *self.hub.mirror(folder, self.repo, message))

    def index(self) -> None:
        """Push the card of a main branch without a model."""
        with tempfile.TemporaryDirectory(prefix="hf_familial-") as top:
            card = index_card(self.description, self.provenance, self.repo.repo_id)
            self.hub.write_card(card, Path(top), self.repo, None)
            self.hub.mirror(Path(top), self.repo, "Card of the members")

    def _add_tokenizer(self, folder: Path, repo: RepoRevision) -> bool:
        """Put a tokenizer beside the weights; return whether the repository will hold one."""
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)
        readable = holds_tokenizer(folder)
        if not readable and repo.revision is None:  # its owner may have put one there
            readable = self.hub.source(repo).read_text("tokenizer_config.json") is not None
        self.bare += [] if readable else [repo]
        return readable

    def warn_of_bare(self) -> None:
        """Warn of repositories without a tokenizer."""
        if self.bare:
            names = ", ".join(f"`{repo.name}`" for repo in self.bare)
            logger.warning(
                "%s %s no tokenizer: pass `tokenizer=`, or save one in the family's folder.",
                names,
                "has" if len(self.bare) == 1 else "have",
            )


def _base_of(family: FamilialForCausalLM | FamilyFiles) -> str | None:
    """Return the repository that a family in memory was made of, if its name is one."""
    config = family.config
    stored = isinstance(family, FamilyFiles)
    name = "" if stored else str(config.name_or_path or config.text_config.name_or_path or "")
    is_repo = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists()
    return name if is_repo else None


def _resolve_exits(config: FamilialConfig, exits: Sequence[int] | None) -> list[int]:
    """Return exits from 0, each once, shallowest first."""
    if exits is None:
        return list(range(config.num_exits))
    if isinstance(exits, (int, str)) or not len(exits):
        raise ValueError(f"`exits` must be a list of one exit or more, got {exits!r}.")
    return sorted({config.resolve_exit(k) for k in exits})
