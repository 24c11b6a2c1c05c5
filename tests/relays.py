"""Families and relay policies that several tests share."""

import torch
from reference import agreeing, endless, tiny_family

from hf_familial import ConfidenceRelay, FixedExit, HandoffRelay, SpeculativeRelay


EXITS = [1, 3, 4]
NEW = 14
ASKED = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True}
DRAFTS = {
    "one": SpeculativeRelay(0, draft_length=1),
    "three": SpeculativeRelay(0, draft_length=3),
    "auto": SpeculativeRelay(0),
    "any-exit": SpeculativeRelay("auto"),
    "middle": SpeculativeRelay(1, draft_length=4),
    "chain": SpeculativeRelay((0, 1), draft_length=2),
    "shallow": SpeculativeRelay(0, draft_length=2, exit_idx=1),
}
DEEPEST = {
    **{name: relay for name, relay in DRAFTS.items() if name != "shallow"},
    "never-sure": ConfidenceRelay(1.1),
    "fixed": FixedExit(),
    "at-once": HandoffRelay(after=0),
}


def family_of(model_type="llama", **fields):
    """Build a family whose exits sometimes agree with the deepest, and whose texts do not end."""
    return endless(agreeing(tiny_family(model_type, EXITS, **fields)))


def padding(ids):
    """Return an attention mask with left padding, whose length differs by row."""
    mask = torch.ones_like(ids)
    for row in range(ids.shape[0]):
        mask[row, : (3 * row) % 5] = 0
    return mask


def untrained(model_type):
    """Build a family whose first exit never agrees with the deepest exit."""
    family = endless(tiny_family(model_type, EXITS))
    with torch.no_grad():
        family.model.members.norm(0).weight.neg_()
    return family
