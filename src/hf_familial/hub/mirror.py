"""One commit that makes a branch on the Hub hold what a folder holds; none if it does."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.hf_api import RepoFile

from .places import Place
from .remote import Retry, request


# of a model that was there before: loaders would find them beside the new one
WEIGHTS = re.compile(r"[^/]+\.(safetensors|safetensors\.index\.json)")
# what the Hub puts into every repository
KEPT = frozenset({".gitattributes"})


@dataclass(frozen=True)
class Mirrored:
    """What became of a branch.

    Attributes:
        commit (`str`): Id of its newest commit.
        changed (`bool`): Whether that commit was made here.
        uploaded (`tuple[str, ...]`): Paths of the files that it brought.
        deleted (`tuple[str, ...]`): Paths of the files that it took away.
    """

    commit: str
    changed: bool
    uploaded: tuple[str, ...] = ()
    deleted: tuple[str, ...] = ()


def mirror_folder(
    api: HfApi,
    folder: Path,
    place: Place,
    message: str,
    *,
    alone: bool = False,
    retry: Retry | None = None,
) -> Mirrored:
    """Make a branch hold a folder's files, in one commit.

    Before every try the branch is compared with the folder, so a commit whose answer was lost is
    found instead of made twice; and the commit names its parent, so one that the Hub was still
    working on is not made twice either. Large files that were uploaded before a failure are not
    uploaded again.

    Args:
        api (`HfApi`): The client.
        folder (`Path`): What the branch shall hold.
        place ([`Place`]): Repository and branch, which exist.
        message (`str`): Title of the commit.
        alone (`bool`, *optional*, defaults to `False`): Take away every other file; otherwise only
            weights of a model that was there before.
        retry ([`Retry`], *optional*): How often requests are sent again.

    Returns:
        [`Mirrored`]

    Raises:
        HubError: If the Hub refuses, or fails each time.
    """
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*"))}
    files = {name: path for name, path in files.items() if path.is_file()}
    # kept over the tries: they know what has been uploaded
    additions = {name: CommitOperationAdd(name, str(path)) for name, path in files.items()}
    sent: list[tuple[tuple[str, ...], tuple[str, ...]]] = []

    def compare_and_commit() -> Mirrored:
        head = api.model_info(place.repo_id, revision=place.revision).sha
        remote = _tree(api, place.repo_id, head)
        changed = tuple(name for name in files if not _is_same(files[name], remote.get(name)))
        others = remote.keys() - files.keys() - KEPT
        stale = tuple(sorted(name for name in others if alone or WEIGHTS.fullmatch(name)))
        if not changed and not stale:
            uploaded, deleted = sent[-1] if sent else ((), ())
            return Mirrored(head or "", bool(sent), uploaded, deleted)
        sent.append((changed, stale))
        commit = api.create_commit(
            place.repo_id,
            [
                *(additions[name] for name in changed),
                *(CommitOperationDelete(name, is_folder=False) for name in stale),
            ],
            commit_message=message,
            revision=place.revision,
            parent_commit=head,
        )
        return Mirrored(commit.oid, True, changed, stale)

    return request(f"write to `{place.repo_id}`", compare_and_commit, retry, uploads=True)


def _tree(api: HfApi, repo_id: str, revision: str | None) -> Mapping[str, RepoFile]:
    """Every file of a commit."""
    found = api.list_repo_tree(repo_id, revision=revision, recursive=True)
    return {entry.path: entry for entry in found if isinstance(entry, RepoFile)}


def _is_same(path: Path, remote: RepoFile | None) -> bool:
    """Whether a file has the content that the Hub has, by size and hash."""
    size = path.stat().st_size
    if remote is None or (remote.lfs.size if remote.lfs else remote.size) != size:
        return False
    if remote.lfs:
        return _digest(path, hashlib.sha256()) == remote.lfs.sha256
    # as git names a blob
    return _digest(path, hashlib.sha1(b"blob %d\0" % size)) == remote.blob_id


def _digest(path: Path, hasher: hashlib._Hash) -> str:
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            hasher.update(block)
    return hasher.hexdigest()


__all__ = ["Mirrored", "mirror_folder"]
