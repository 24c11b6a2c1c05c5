"""The Hub as a push uses it: every request is sent again where that may help."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard

from ..errors import HubError, HubNotFoundError
from ._source import Source
from .card_text import merge_card, read_metadata
from .mirror import Mirrored, mirror_folder
from .places import Lineage, Place
from .remote import Retry, request


logger = logging.getLogger(__name__)

LICENCE = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class Hub:
    """The Hub, for one token.

    Attributes:
        api (`HfApi`): The client.
        retry ([`Retry`], *optional*): How often requests are sent again.
    """

    api: HfApi
    retry: Retry | None

    def full_name(self, repo_id: str) -> str:
        """`user/name`, the user being the token's where none is given."""
        if not isinstance(repo_id, str) or not re.fullmatch(r"([\w.-]+/)?[\w.-]+", repo_id):
            raise ValueError(f"`repo_id` must look like `user/name`, got {repo_id!r}.")
        if "/" in repo_id:
            return repo_id
        return f"{request('ask whose token it is', self.api.whoami, self.retry)['name']}/{repo_id}"

    def source(self, place: Place) -> Source:
        """The files of a place, to read."""
        token, endpoint = self.api.token, self.api.endpoint
        return Source(place.repo_id, None, place.revision, token, endpoint, self.retry)

    def lineage(self, base_model: str | None, card: str | None, repo_id: str) -> Lineage:
        """Base, licence and family, as far as they are known: given, in a card, in the base's."""
        metadata: Mapping[str, Any] = read_metadata(card)
        said = metadata.get("base_model")
        said = said[0] if isinstance(said, list) and said else said
        known = (name for name in (base_model, said) if isinstance(name, str))
        base = next((name for name in known if name != repo_id), None)
        if base and "license" not in metadata:
            metadata = self.metadata_of(base)
        licence = {name: str(metadata[name]) for name in LICENCE if metadata.get(name)}
        return Lineage(base, self.family_at(repo_id), licence=licence)

    def metadata_of(self, repo_id: str) -> Mapping[str, Any]:
        """Of a card that may not be there, or not for us."""
        try:
            return read_metadata(self.source(Place(repo_id)).read_text("README.md"))
        except (HubError, ValueError) as error:
            logger.warning("The licence of `%s` is not known: %s", repo_id, error)
            return {}

    def family_at(self, repo_id: str) -> Place | None:
        """The place of a family, if the repository holds one."""
        try:
            self.source(Place(repo_id)).config()
        except (HubNotFoundError, FileNotFoundError, ValueError):
            return None
        return Place(repo_id)

    def holds(self, place: Place) -> bool:
        """Whether there is such a repository and branch."""
        ask = partial(self.api.model_info, place.repo_id, revision=place.revision)
        try:
            request(f"look for `{place.repo_id}`", ask, self.retry)
        except HubNotFoundError:
            return False
        return True

    def create(self, repo_id: str, private: bool | None) -> None:
        """A repository, unless there is one."""
        make = partial(self.api.create_repo, repo_id, private=private, exist_ok=True)
        request(f"create the repository `{repo_id}`", make, self.retry)

    def create_branch(self, place: Place) -> None:
        """The branch of a place, unless there is one."""
        make = partial(
            self.api.create_branch, place.repo_id, branch=place.revision or "main", exist_ok=True
        )
        request(f"create the branch `{place.revision}` of `{place.repo_id}`", make, self.retry)

    def write_card(self, card: ModelCard, folder: Path, place: Place, draft: str | None) -> None:
        """The card of a place, with what its owner wrote there or, before that, in a draft."""
        owned = self.source(place).read_text("README.md")
        text = merge_card(card, draft if owned is None else owned)
        (folder / "README.md").write_text(text, encoding="utf-8")

    def mirror(self, folder: Path, place: Place, message: str, alone: bool = False) -> Mirrored:
        """One commit that makes the place hold what the folder holds, see [`mirror_folder`]."""
        return mirror_folder(self.api, folder, place, message, alone=alone, retry=self.retry)


__all__ = ["Hub"]
