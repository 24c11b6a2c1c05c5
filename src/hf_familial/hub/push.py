"""A family and its members on the Hub: one commit each, none where nothing changed."""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from ..checkpoints.companions import holds_tokenizer
from ..checkpoints.cuts import check_cut
from ..checkpoints.family_files import FamilyFiles
from ..checkpoints.index import own_file
from ..checkpoints.member_models import merged_family, weights_of
from ..models import is_family
from ..models.familial import FamilialConfig, FamilialForCausalLM
from ..models.familial.configuration_familial import check_choice
from ._source import open_family
from .cards import family_card, index_card, member_card
from .client import Hub
from .collection import collect
from .describe import FamilyDescription, describe
from .export import export_exit
from .mirror import Mirrored
from .places import Lineage, Place
from .remote import Retry


logger = logging.getLogger(__name__)

LAYOUTS = ("repos", "revisions")

Model = str | os.PathLike[str] | FamilialForCausalLM


@dataclass(frozen=True)
class Pushed:
    """One repository or branch.

    Attributes:
        exit_idx (`int`, *optional*): The member in it; `None` for a whole family.
        place ([`Place`]): Repository, and branch if not the main one.
        commit (`str`): Id of its newest commit.
        changed (`bool`): Whether that commit was made by this push.
        uploaded (`tuple[str, ...]`): Paths of the files that it brought.
    """

    exit_idx: int | None
    place: Place
    commit: str
    changed: bool
    uploaded: tuple[str, ...]


@dataclass(frozen=True)
class PushReport:
    """What a push did.

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
        HubAuthError: If the Hub asks for a (better) token.
        HubPermissionError: If the token may not write there.
        HubUnavailableError: If the Hub fails each time it is tried.
        IndexError: If there is no exit of that number.
        ValueError: If it is not a family, a member cannot be plain, or `layout` is wrong.

    Example:
        >>> push_exits_to_hub("family", "me/family", exits=[0, -1], private=True)
    """
    check_choice("layout", layout, LAYOUTS)
    opened = _open(model_or_path, token)
    config = opened.config
    wanted = _resolve_exits(config, exits)
    for k in wanted:
        # refused here, before anything is on the Hub
        check_cut(config, k, verified=not isinstance(opened, FamilyFiles))
    hub = Hub(HfApi(endpoint=endpoint, token=token), retry)
    repo_id = hub.full_name(repo_id)
    family = describe(model_or_path, dtype=dtype, token=token)
    lineage = hub.lineage(base_model or _base_of(opened), _card_of(opened), repo_id)
    places = {k: _member_place(repo_id, depth, layout) for k, depth in enumerate(config.exits)}
    there = {k: place for k, place in places.items() if k in wanted or hub.holds(place)}
    lineage = replace(lineage, members=there)
    if layout == "revisions":
        hub.create(repo_id, private)
        if lineage.family is None:
            _push_index(hub, family, lineage, repo_id)
    options = {"dtype": dtype, "max_shard_size": max_shard_size, "token": token}
    pushed, bare = [], []
    for k in wanted:
        if layout == "repos":
            hub.create(places[k].repo_id, private)
        else:
            hub.create_branch(places[k])
        alone = layout == "revisions"  # a new branch holds what the main one does
        found, readable = _push_member(
            hub, model_or_path, k, family, lineage, tokenizer, alone, options
        )
        bare += [] if readable else [places[k]]
        pushed.append(Pushed(k, places[k], found.commit, found.changed, found.uploaded))
    _warn_of_bare(bare)
    slug = None
    if collection and layout == "repos":
        slug = collect(hub.api, repo_id, family, lineage, bool(private), retry)
    return PushReport(tuple(pushed), slug)


def _push_member(
    hub: Hub,
    model: Model,
    exit_idx: int,
    family: FamilyDescription,
    lineage: Lineage,
    tokenizer: Any,
    alone: bool,
    options: dict[str, Any],
) -> tuple[Mirrored, bool]:
    """Export one member, write its card, and bring both to where it belongs.

    Returns:
        `tuple[Mirrored, bool]`: What became of its place, and whether a tokenizer is there.
    """
    place, depth = lineage.members[exit_idx], family.exits[exit_idx].depth
    with _workplace() as folder:
        report = export_exit(model, exit_idx, folder, **options)
        readable = _add_tokenizer(hub, tokenizer, folder, place, alone)
        card = member_card(family, exit_idx, lineage, report.architecture, readable)
        hub.write_card(card, folder, place, None)
        message = f"Member of depth {depth} (exit {exit_idx} of {len(family.exits)})"
        return hub.mirror(folder, place, message, alone=alone), readable


def _add_tokenizer(hub: Hub, tokenizer: Any, folder: Path, place: Place, alone: bool) -> bool:
    """Put a tokenizer beside the weights; whether the place will hold one, this or its owner's."""
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if holds_tokenizer(folder) or alone:
        return holds_tokenizer(folder)
    return hub.source(place).read_text("tokenizer_config.json") is not None


def _warn_of_bare(places: Sequence[Place]) -> None:
    """Say which places hold a model and no tokenizer."""
    if places:
        names = ", ".join(f"`{place.name}`" for place in places)
        verb = "has" if len(places) == 1 else "have"
        logger.warning(
            "%s %s no tokenizer: pass `tokenizer=`, or save one in the family's folder.",
            names,
            verb,
        )


def _push_index(hub: Hub, family: FamilyDescription, lineage: Lineage, repo_id: str) -> None:
    """The card of a main branch without a model."""
    with _workplace() as folder:
        folder.mkdir()
        hub.write_card(index_card(family, lineage, repo_id), folder, Place(repo_id), None)
        hub.mirror(folder, Place(repo_id), "Card of the members")


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

    Arguments, errors and the way it takes up what was cut off are those of [`push_exits_to_hub`].

    Args:
        model_or_path (`str`, `os.PathLike` or [`FamilialForCausalLM`]): Folder of a family, or a
            family in memory.
        repo_id (`str`): `user/name`, or a name of the token's user.
        private (`bool`, *optional*): Visibility, if the repository is made here.
        base_model (`str`, *optional*): Repository of the decoder that the family was made of.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): To go along; by default what the family's
            folder, or the client's cache of its repository, holds.
        dtype (`torch.dtype` or `str`, *optional*): Of the weights; unchanged by default.
        max_shard_size (`str` or `int`, *optional*, defaults to `"5GB"`): Of each weights file.
        token (`str`, *optional*): With the role `write`.
        endpoint (`str`, *optional*): Address of the Hub, if not the usual one.
        retry ([`Retry`], *optional*): How often and how soon requests are sent again.

    Returns:
        [`PushReport`]: With one entry.

    Raises:
        FileNotFoundError: If there is no such folder, or no checkpoint in it.
        HubError: If the Hub refuses or fails.
        ValueError: If it is not a family.
    """
    opened = _open(model_or_path, token)
    config = opened.config
    hub = Hub(HfApi(endpoint=endpoint, token=token), retry)
    place = Place(hub.full_name(repo_id))
    family = describe(model_or_path, dtype=dtype, token=token)
    lineage = hub.lineage(base_model or _base_of(opened), _card_of(opened), place.repo_id)
    members = (_member_place(place.repo_id, depth, "repos") for depth in config.exits)
    there = {k: member for k, member in enumerate(members) if hub.holds(member)}
    lineage = replace(lineage, family=place, members=there)
    hub.create(place.repo_id, private)
    with _workplace() as folder:
        options = {"dtype": dtype, "max_shard_size": max_shard_size, "token": token}
        # one group of files per segment: a device downloads those of its exit alone
        export_exit(model_or_path, -1, folder, format="familial", by_segment=True, **options)
        readable = _add_tokenizer(hub, tokenizer, folder, place, alone=False)
        _write_members(family, folder)
        hub.write_card(family_card(family, lineage, readable), folder, place, _card_of(opened))
        found = hub.mirror(folder, place, f"Family of {config.num_exits} members")
    _warn_of_bare([] if readable else [place])
    return PushReport((Pushed(None, place, found.commit, found.changed, found.uploaded),))


@contextmanager
def _workplace() -> Iterator[Path]:
    """The path of a folder to be, on the disk that `TMPDIR` says; one member at a time."""
    with tempfile.TemporaryDirectory(prefix="hf_familial-") as folder:
        yield Path(folder) / "checkpoint"


def _open(model_or_path: Any, token: str | None) -> FamilialForCausalLM | FamilyFiles:
    """A family that has weights to push."""
    model_or_path = merged_family(model_or_path)
    if is_family(model_or_path):
        weights_of(model_or_path)
        return model_or_path
    return open_family(model_or_path, token=token)


def _base_of(family: FamilialForCausalLM | FamilyFiles) -> str | None:
    """The repository that a family in memory was made of, if its name is one."""
    config = family.config
    stored = isinstance(family, FamilyFiles)
    name = "" if stored else str(config.name_or_path or config.text_config.name_or_path or "")
    is_repo = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists()
    return name if is_repo else None


def _card_of(family: FamilialForCausalLM | FamilyFiles) -> str | None:
    """The card beside a family in files."""
    if not isinstance(family, FamilyFiles):
        return None
    path = own_file(family.fetch(["README.md"]), "README.md")
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _resolve_exits(config: FamilialConfig, exits: Sequence[int] | None) -> list[int]:
    """Exits from 0, each once, shallowest first."""
    if exits is None:
        return list(range(config.num_exits))
    if isinstance(exits, (int, str)) or not len(exits):
        raise ValueError(f"`exits` must be a list of one exit or more, got {exits!r}.")
    return sorted({config.resolve_exit(k) for k in exits})


def _member_place(repo_id: str, depth: int, layout: str) -> Place:
    name = f"depth{depth}"
    return Place(f"{repo_id}-{name}") if layout == "repos" else Place(repo_id, name)


def _write_members(family: FamilyDescription, folder: Path) -> None:
    """What `describe` reads losses from."""
    names = ("exit_idx", "depth", "parameters", "non_embedding", "eval_loss")
    rows = [{name: getattr(row, name) for name in names} for row in family.exits]
    (folder / "members.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


__all__ = ["PushReport", "Pushed", "push_exits_to_hub", "push_family_to_hub"]
