"""Repositories, commits and collections on the Hub, for pushes."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.hf_api import RepoFile

from .._files import file_digest
from ..checkpoints.companions import code_files
from ..errors import HubError, HubNotFoundError
from ._cards import Provenance, RepoRevision, merge_card, read_metadata
from ._client import Retry, request
from ._source import Source
from .description import FamilyDescription


logger = logging.getLogger(__name__)

LICENCE = ("license", "license_name", "license_link")
# files of an older model, which a push deletes, because `from_pretrained` could load them
WEIGHTS = re.compile(r"[^/]+\.(safetensors|safetensors\.index\.json)")
# files that the Hub puts into every repository
KEPT = frozenset({".gitattributes"})
# maximum number of characters that the Hub allows for a collection
TITLE, DESCRIPTION = 60, 150


@dataclass(frozen=True)
class Hub:
    """The Hub, accessed with one token. Failed requests are repeated if they may succeed later."""

    api: HfApi
    retry: Retry | None

    def full_name(self, repo_id: str) -> str:
        """Return `user/name`. If `repo_id` has no user, use the owner of the token."""
        if not isinstance(repo_id, str) or not re.fullmatch(r"([\w.-]+/)?[\w.-]+", repo_id):
            raise ValueError(f"`repo_id` must look like `user/name`, got {repo_id!r}.")
        if "/" in repo_id:
            return repo_id
        return f"{request('look up the user', self.api.whoami, self.retry)['name']}/{repo_id}"

    def source(self, repo: RepoRevision) -> Source:
        """Return the [`Source`] that reads a repository or branch."""
        token, endpoint = self.api.token, self.api.endpoint
        return Source(repo.repo_id, None, repo.revision, token, endpoint, self.retry)

    def provenance(self, base_model: str | None, card: str | None, repo_id: str) -> Provenance:
        """Return base model, licence and family, as far as the arguments and cards contain them."""
        metadata: Mapping[str, Any] = read_metadata(card)
        said = metadata.get("base_model")
        said = said[0] if isinstance(said, list) and said else said
        known = (name for name in (base_model, said) if isinstance(name, str))
        base = next((name for name in known if name != repo_id), None)
        if base and "license" not in metadata:
            metadata = self._metadata_of(base)
        licence = {name: str(metadata[name]) for name in LICENCE if metadata.get(name)}
        return Provenance(base, self._family_at(repo_id), licence=licence)

    def _metadata_of(self, repo_id: str) -> Mapping[str, Any]:
        """Return the metadata of a card, or nothing if the card cannot be read."""
        try:
            return read_metadata(self.source(RepoRevision(repo_id)).read_text("README.md"))
        except (HubError, ValueError) as error:
            logger.warning("The licence of `%s` is unknown: %s", repo_id, error)
            return {}

    def _family_at(self, repo_id: str) -> RepoRevision | None:
        try:
            self.source(RepoRevision(repo_id)).config()
        except (HubNotFoundError, FileNotFoundError, ValueError):
            return None
        return RepoRevision(repo_id)

    def holds(self, repo: RepoRevision) -> bool:
        """Return whether a repository or branch exists."""
        ask = partial(self.api.model_info, repo.repo_id, revision=repo.revision)
        try:
            request(f"look for `{repo.repo_id}`", ask, self.retry)
        except HubNotFoundError:
            return False
        return True

    def create(self, repo: RepoRevision, private: bool | None) -> None:
        """Create a repository, or a branch of an existing repository, unless it exists."""
        name = repo.repo_id
        if repo.revision is None:
            make = partial(self.api.create_repo, name, private=private, exist_ok=True)
            request(f"create the repository `{name}`", make, self.retry)
        else:
            branch = partial(self.api.create_branch, name, branch=repo.revision, exist_ok=True)
            request(f"create the branch `{repo.revision}` of `{name}`", branch, self.retry)

    def write_card(
        self, card: ModelCard, folder: Path, repo: RepoRevision, draft: str | None
    ) -> None:
        """Write a card to `folder`, merged with the owner's card.

        The owner's card comes from the repository. If the repository has none, `draft` is used.
        """
        owned = self.source(repo).read_text("README.md")
        text = merge_card(card, draft if owned is None else owned)
        (folder / "README.md").write_text(text, encoding="utf-8")

    def mirror(
        self, folder: Path, repo: RepoRevision, message: str, alone: bool = False
    ) -> tuple[str, bool, tuple[str, ...]]:
        """Upload a folder to a branch in one commit, or in none if nothing has changed.

        The commit deletes the weights and the remote code of an older checkpoint. If `alone` is
        true, it deletes all other files too. Return the id of the newest commit, whether this call
        created it, and the uploaded files.
        """
        files = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*"))}
        files = {name: path for name, path in files.items() if path.is_file()}
        # reused in every try, because these objects record finished uploads
        additions = {name: CommitOperationAdd(name, str(path)) for name, path in files.items()}
        sent: list[tuple[str, ...]] = []

        # Compare before every try, so that a commit whose answer was lost is not repeated. The
        # commit names its parent, so that one still in progress on the Hub is not repeated either.
        def compare_and_commit() -> tuple[str, bool, tuple[str, ...]]:
            head = self.api.model_info(repo.repo_id, revision=repo.revision).sha
            remote = self._tree(repo.repo_id, head)
            changed = tuple(name for name in files if not _is_same(files[name], remote.get(name)))
            others = remote.keys() - files.keys() - KEPT
            stale = {name for name in others if alone or WEIGHTS.fullmatch(name)}
            if any(name.endswith(".py") for name in others - stale):
                stale |= self._model_code(repo.repo_id, head) & others
            if not changed and not stale:
                return head or "", bool(sent), sent[-1] if sent else ()
            sent.append(changed)
            deletions = [CommitOperationDelete(name, is_folder=False) for name in sorted(stale)]
            commit = self.api.create_commit(
                repo.repo_id,
                [*(additions[name] for name in changed), *deletions],
                commit_message=message,
                revision=repo.revision,
                parent_commit=head,
            )
            return commit.oid, True, changed

        what = f"write to `{repo.repo_id}`"
        return request(what, compare_and_commit, self.retry, uploads=True)

    def _tree(self, repo_id: str, revision: str | None) -> Mapping[str, RepoFile]:
        """Return all files of a commit, with their paths as keys."""
        found = self.api.list_repo_tree(repo_id, revision=revision, recursive=True)
        return {entry.path: entry for entry in found if isinstance(entry, RepoFile)}

    def _model_code(self, repo_id: str, revision: str | None) -> set[str]:
        """Return the code files that the config of a commit names, and the files they import."""
        wanted = ["config.json", "*.py"]
        folder = self.api.snapshot_download(repo_id, revision=revision, allow_patterns=wanted)
        try:
            fields = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
            classes = [name for name in fields["auto_map"].values() if "--" not in name]
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            return set()
        found, _ = code_files(Path(folder), {name.split(".")[0] for name in classes})
        return {path.name for path in found}

    def collect(
        self, repo_id: str, family: FamilyDescription, provenance: Provenance, private: bool
    ) -> str:
        """Add a family and its members to one collection. Create it if it does not exist."""
        owner, name = repo_id.split("/")
        text = f"Language models of different depth that share one {family.backbone} backbone."
        notes = {provenance.family.repo_id: "The whole family"} if provenance.family else {}
        for k, repo in provenance.members.items():
            row = family.exits[k]
            notes[repo.repo_id] = f"Exit {k}: {row.depth} layers, {row.parameters:,} parameters"
        make = partial(
            self.api.create_collection,
            title=f"{name[: TITLE - 9]}: members",
            namespace=owner,
            description=text[:DESCRIPTION],
            private=private,
            exists_ok=True,
        )
        try:
            found = request(f"create the collection of `{repo_id}`", make, self.retry)
            known = {item.item_id for item in found.items}
            for item in [name for name in notes if name not in known]:
                add = partial(
                    self.api.add_collection_item,
                    found.slug,
                    item,
                    "model",
                    note=notes[item],
                    exists_ok=True,
                )
                request(f"add `{item}` to the collection `{found.slug}`", add, self.retry)
        except HubError as error:
            raise type(error)(
                f"every member is pushed, but {error} To push without a collection, pass "
                "`collection=False`."
            ) from error
        return found.slug


def _is_same(path: Path, remote: RepoFile | None) -> bool:
    """Return whether a local file and the file on the Hub have the same size and hash."""
    size = path.stat().st_size
    if remote is None or (remote.lfs.size if remote.lfs else remote.size) != size:
        return False
    if remote.lfs:
        return file_digest(path) == remote.lfs.sha256
    # the hash that git computes for a file
    return file_digest(path, b"blob %d\0" % size, "sha1") == remote.blob_id
