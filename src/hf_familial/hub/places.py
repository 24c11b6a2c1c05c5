"""Where a family, its members and its base are on the Hub."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Place:
    """Where a checkpoint is on the Hub.

    Attributes:
        repo_id (`str`): Repository.
        revision (`str`, *optional*): Its branch, if not the main one.
    """

    repo_id: str
    revision: str | None = None

    @property
    def arguments(self) -> str:
        """As written in a call of `from_pretrained`."""
        suffix = f', revision="{self.revision}"' if self.revision else ""
        return f'"{self.repo_id}"{suffix}'

    @property
    def name(self) -> str:
        """As messages have it."""
        return f"{self.repo_id}@{self.revision}" if self.revision else self.repo_id

    @property
    def link(self) -> str:
        """As written in Markdown."""
        if self.revision is None:
            return f"[{self.repo_id}](https://huggingface.co/{self.repo_id})"
        url = f"https://huggingface.co/{self.repo_id}/tree/{self.revision}"
        return f"[{self.revision}]({url})"


@dataclass(frozen=True)
class Lineage:
    """Where a family comes from, and where it is.

    Attributes:
        base_model (`str`, *optional*): Repository of the decoder that the family was made of.
        family ([`Place`], *optional*): The family itself, where it is on the Hub.
        members (`Mapping[int, Place]`): Its plain members, by `exit_idx`.
        licence (`Mapping[str, str]`): `license`, `license_name` and `license_link`, as far
            as they are known.
    """

    base_model: str | None = None
    family: Place | None = None
    members: Mapping[int, Place] = field(default_factory=dict)
    licence: Mapping[str, str] = field(default_factory=dict)


__all__ = ["Lineage", "Place"]
