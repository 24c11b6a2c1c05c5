"""The part of a model card that a push writes, inside a card that stays its owner's."""

from __future__ import annotations

import re
from typing import Any

import yaml  # type: ignore[import-untyped]
from huggingface_hub import ModelCard


# what stands between these is written anew by every push; the rest of a card is its owner's
BEGIN = "<!-- hf_familial: written by push, up to the end mark -->"
END = "<!-- hf_familial: end -->"

# fields of a card's metadata that are its owner's once they are there
OWNERS = ("license", "license_name", "license_link", "language", "datasets", "pipeline_tag")


def merge_card(card: ModelCard, owned: str | None) -> str:
    """Put what a push writes into the card that is there, which stays its owner's.

    Args:
        card (`ModelCard`): As [`member_card`] and its like make it.
        owned (`str`, *optional*): The card that is there.

    Returns:
        `str`: `owned` with the marked part written anew (at its end, where it has no such part),
        its own licence, language and datasets kept, and tags of both.
    """
    fresh = card.data.to_dict()
    metadata, text = _split(owned or "")
    kept = {name: metadata[name] for name in OWNERS if name in metadata}
    tags = {"tags": _merged(fresh.get("tags"), metadata.get("tags"))}
    # from the last begin mark before an end mark: one without the other is no part
    marked = re.compile(f"{re.escape(BEGIN)}(?:(?!{re.escape(BEGIN)}).)*?{re.escape(END)}", re.S)
    part = card.text.strip()
    if marked.search(text):
        text = marked.sub(lambda match: part, text, count=1)
    else:
        text = f"{text.strip()}\n\n{part}".strip() + "\n"
    data = yaml.safe_dump(metadata | fresh | kept | tags, sort_keys=False, allow_unicode=True)
    return f"---\n{data}---\n\n{text.lstrip()}"


def read_metadata(text: str | None) -> dict[str, Any]:
    """The metadata of a card, empty where there is none that can be read."""
    return _split(text or "")[0]


def _split(text: str) -> tuple[dict[str, Any], str]:
    """Metadata and body of a card."""
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


__all__ = ["merge_card", "read_metadata"]
