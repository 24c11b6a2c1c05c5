"""Pushes of families and members to the Hub, with one commit per changed repository."""

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
    """The result of pushing one repository or branch.

    Attributes:
        exit_idx (`int`, *optional*): Exit of the member. `None` for a whole family.
        place ([`RepoRevision`]): Repository or branch on the Hub.
        commit (`str`): Id of its newest commit.
        changed (`bool`): Whether this push created that commit.
        uploaded (`tuple[str, ...]`): Paths of the files that this push uploaded.
    """

    exit_idx: int | None
    place: RepoRevision
    commit: str
    changed: bool
    uploaded: tuple[str, ...]


@dataclass(frozen=True)
class PushReport:
    """The result of a push.

    Attributes:
        pushed (`tuple[Pushed, ...]`): One entry per repository or branch, in the order of the
            exits.
        collection (`str`, *optional*): Slug of the collection with the members.
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
    """Push members of a family to the Hub, each as an ordinary model that needs no extra package.

    Each member gets one commit, or none if the Hub already has the same files. If a push is
    interrupted, run it again. Members that are complete on the Hub are not uploaded again.

    Args:
        model_or_path (`str`, `os.PathLike` or [`FamilialForCausalLM`]): Folder of a family, or a
            family in memory.
        repo_id (`str`): Id such as `user/name`. Without `user/`, the owner of the token is used.
            The member at depth 8 gets the repository `<repo_id>-depth8` or the branch `depth8`.
        exits (`Sequence[int]`, *optional*): Exits of the members to push. Defaults to all.
        layout (`str`, *optional*, defaults to `"repos"`): `"repos"` pushes each member to its own
            repository. `"revisions"` pushes each member to a branch of `repo_id`. Its main branch
            then keeps its family, or gets a model card if it has none.
        private (`bool`, *optional*): Whether new repositories are private.
        collection (`bool`, *optional*, defaults to `True`): Whether to put the member repositories,
            and a family at `repo_id`, into a collection.
        base_model (`str`, *optional*): Repository of the pretrained model that the family was
            created from. Defaults to the one in the checkpoint's card or in the model's config.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): Tokenizer to push too. Defaults to the
            one in the family's folder, or in the local cache of its repository.
        dtype (`torch.dtype` or `str`, *optional*): Dtype to convert the weights to. Defaults to no
            conversion.
        max_shard_size (`str` or `int`, *optional*, defaults to `"5GB"`): Maximum size of a file of
            weights.
        token (`str`, *optional*): Token with the role `write`. Defaults to that of `hf auth login`.
        endpoint (`str`, *optional*): Address of the Hub. Defaults to https://huggingface.co.
        retry ([`Retry`], *optional*): Rule for repeating failed requests.

    Returns:
        [`PushReport`]

    Raises:
        FileNotFoundError: If the folder does not exist or has no checkpoint.
        HubError: If a request to the Hub fails. The subclass shows the kind of failure.
        IndexError: If an exit does not exist.
        ValueError: If `model_or_path` is not a family, if a member cannot be a plain checkpoint, or
            if `layout` is wrong.

    Example:
        >>> push_exits_to_hub("family", "me/family", exits=[0, -1], private=True)
    """
    check_choice("layout", layout, LAYOUTS)
    push = _Push(model_or_path, token, tokenizer, dtype, max_shard_size)
    wanted = _resolve_exits(push.config, exits)
    for k in wanted:
        # raise here, before anything is on the Hub
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
    """Push a whole family to one repository, with the code for `trust_remote_code=True`.

    Each segment has its own files, so a device downloads only the files up to its exit. Errors, and
    the behaviour after an interruption, are those of [`push_exits_to_hub`].

    Args:
        model_or_path (`str`, `os.PathLike` or [`FamilialForCausalLM`]): Folder of a family, or a
            family in memory.
        repo_id (`str`): Id such as `user/name`. Without `user/`, the owner of the token is used.
        private (`bool`, *optional*): Whether a new repository is private.
        base_model (`str`, *optional*): Repository of the pretrained model that the family was
            created from. Defaults to the one in the checkpoint's card or in the model's config.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): Tokenizer to push too. Defaults to the
            one in the family's folder.
        dtype (`torch.dtype` or `str`, *optional*): Dtype to convert the weights to.
        max_shard_size (`str` or `int`, *optional*, defaults to `"5GB"`): Maximum size of a file of
            weights.
        token (`str`, *optional*): Token with the role `write`. Defaults to that of `hf auth login`.
        endpoint (`str`, *optional*): Address of the Hub. Defaults to https://huggingface.co.
        retry ([`Retry`], *optional*): Rule for repeating failed requests.

    Returns:
        [`PushReport`]: A report with one entry.

    Example:
        >>> push_family_to_hub("family", "me/family", private=True)
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
    """A push in progress, with the opened family, its description and its target."""

    def __init__(
        self, model_or_path: Model, token: str | None, tokenizer: Any, dtype: Any, shard: str | int
    ) -> None:
        given: Any = merged_family(model_or_path)
        self.card: str | None = None  # README.md in the family's folder
        self.family: FamilialForCausalLM | FamilyFiles
        if is_family(given):
            weights_of(given)  # raises if the model has no weights in memory
            self.family = given
        else:
            given = find_source(given, token=token)
            self.family = open_family(given)
            self.card = given.read_text("README.md")
        self.config: FamilialConfig = self.family.config
        self.description = describe(given, dtype=dtype)
        self.token, self.tokenizer = token, tokenizer
        self.options = {"dtype": dtype, "max_shard_size": shard}
        self.bare: list[RepoRevision] = []  # repositories with a model but without a tokenizer

    def connect(
        self, repo_id: str, base_model: str | None, endpoint: str | None, retry: Retry | None
    ) -> Hub:
        """Connect to the Hub, and find the target repository and the origin of the family."""
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
            # a new branch starts as a copy of the main branch, so delete its other files
            return Pushed(exit_idx, repo, *self.hub.mirror(folder, repo, message, alone))

    def whole_family(self) -> Pushed:
        """Push the whole family with its code."""
        with tempfile.TemporaryDirectory(prefix="hf_familial-") as top:
            folder = Path(top) / "checkpoint"
            how: dict[str, Any] = self.options | {"format": "familial", "by_segment": True}
            export_exit(self.family, -1, folder, **how)
            readable = self._add_tokenizer(folder, self.repo)
            # `describe` reads the losses from this file
            names = ("exit_idx", "depth", "parameters", "non_embedding", "eval_loss")
            rows = [{n: getattr(row, n) for n in names} for row in self.description.exits]
            text = json.dumps(rows, indent=2) + "\n"
            (folder / "members.json").write_text(text, encoding="utf-8")
            card = family_card(self.description, self.provenance, readable)
            self.hub.write_card(card, folder, self.repo, self.card)
            message = f"Family of {self.config.num_exits} members"
            return Pushed(None, self.repo, *self.hub.mirror(folder, self.repo, message))

    def index(self) -> None:
        """Push a model card to a main branch that has no model."""
        with tempfile.TemporaryDirectory(prefix="hf_familial-") as top:
            card = index_card(self.description, self.provenance, self.repo.repo_id)
            self.hub.write_card(card, Path(top), self.repo, None)
            self.hub.mirror(Path(top), self.repo, "Card of the members")

    def _add_tokenizer(self, folder: Path, repo: RepoRevision) -> bool:
        """Save the tokenizer with the weights. Return whether the repository will have one."""
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)
        readable = holds_tokenizer(folder)
        if not readable and repo.revision is None:  # the owner may have added one on the Hub
            readable = self.hub.source(repo).read_text("tokenizer_config.json") is not None
        self.bare += [] if readable else [repo]
        return readable

    def warn_of_bare(self) -> None:
        """Warn about repositories without a tokenizer."""
        if self.bare:
            names = ", ".join(f"`{repo.name}`" for repo in self.bare)
            logger.warning(
                "%s %s no tokenizer. Pass `tokenizer=`, or save one in the family's folder.",
                names,
                "has" if len(self.bare) == 1 else "have",
            )


def _base_of(family: FamilialForCausalLM | FamilyFiles) -> str | None:
    """Return the repository that a family in memory was loaded from, or `None`."""
    config = family.config
    stored = isinstance(family, FamilyFiles)
    name = "" if stored else str(config.name_or_path or config.text_config.name_or_path or "")
    is_repo = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists()
    return name if is_repo else None


def _resolve_exits(config: FamilialConfig, exits: Sequence[int] | None) -> list[int]:
    """Return the exits without repetitions, shallowest first, with -1 converted to an index."""
    if exits is None:
        return list(range(config.num_exits))
    if isinstance(exits, (int, str)) or not len(exits):
        raise ValueError(f"`exits` must be a list of at least one exit, got {exits!r}.")
    return sorted({config.resolve_exit(k) for k in exits})
