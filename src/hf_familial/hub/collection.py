"""The collection on the Hub that holds a family and its members."""

from __future__ import annotations

from functools import partial

from huggingface_hub import HfApi

from ..errors import HubError
from .describe import FamilyDescription
from .places import Lineage
from .remote import Retry, request


# the Hub's own limits
TITLE, DESCRIPTION = 60, 150


def collect(
    api: HfApi,
    repo_id: str,
    family: FamilyDescription,
    lineage: Lineage,
    private: bool,
    retry: Retry | None,
) -> str:
    """Gather a family and its members in one collection, which may be there already.

    Args:
        api (`HfApi`): The client.
        repo_id (`str`): `user/name` of the family: of the collection, owner and title.
        family ([`FamilyDescription`]): What the members weigh, for the notes.
        lineage ([`Lineage`]): Where everything is.
        private (`bool`): Visibility, if it is made here.
        retry ([`Retry`], *optional*): How often requests are sent again.

    Returns:
        `str`: Its slug.

    Raises:
        HubError: If the Hub refuses; the members are pushed all the same.
    """
    owner, name = repo_id.split("/")
    text = f"Members of one family on a {family.backbone} backbone: train once, deploy many."
    notes = {lineage.family.repo_id: "The whole family"} if lineage.family else {}
    for k, place in lineage.members.items():
        row = family.exits[k]
        notes[place.repo_id] = f"Exit {k}: {row.depth} layers, {row.parameters:,} parameters"
    make = partial(
        api.create_collection,
        title=f"{name[: TITLE - 9]}: members",
        namespace=owner,
        description=text[:DESCRIPTION],
        private=private,
        exists_ok=True,
    )
    try:
        found = request(f"create the collection of `{repo_id}`", make, retry)
        known = {item.item_id for item in found.items}
        for item, note in notes.items():
            if item not in known:
                add = partial(
                    api.add_collection_item, found.slug, item, "model", note=note, exists_ok=True
                )
                request(f"add `{item}` to the collection `{found.slug}`", add, retry)
    except HubError as error:
        raise type(error)(
            f"every member is pushed, but {error} To do without, push with `collection=False`."
        ) from error
    return found.slug


__all__ = ["collect"]
