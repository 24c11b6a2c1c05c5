"""Each supported backbone hands off exactly or raises the reason. The example runs too."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from parted import DEPTH, NEW, cut, hand_off, other_side, padded_text, sent, whole
from reference import tiny_family

from hf_familial.handoff import MODES, DeviceSide, server_side
from hf_familial.models.backbone_verification import VERIFIED


ROOT = Path(__file__).resolve().parents[2]

# model_type -> a word of the reason why it is refused
REFUSED = {
    "gemma4_text": "its own embedding",
    "gemma4_unified_text": "its own embedding",
    "gpt_neox_japanese": "cannot become a separate model",  # cannot be cut, for a device
    "minicpm3": "cannot become a separate model",
    "minimax": "not use a cache",
    "minimax_m3_vl_text": "keeps `idx_keys`",
    "openai-gpt": "not use a cache",
    "recurrent_gemma": "in themselves",
    "xlstm": "not use a cache",
    "zamba": "embedding again",
    "zamba2": "embedding again",
    "zaya": "router",
}


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(VERIFIED - REFUSED.keys()))
def test_a_supported_host_hands_over_exactly(model_type):
    family = tiny_family(model_type, [DEPTH, 4], num_exit_layers=1)
    family.generation_config.eos_token_id = None
    ids, mask = padded_text()
    expected, side = whole(family, ids, mask), DeviceSide(cut(family), DEPTH)
    for mode in MODES:
        text = hand_off(side, other_side(family, mode), mode, ids, mask)
        assert torch.equal(text.tokens, expected), mode
    shallow = side.start(ids, mask, max_new_tokens=NEW)
    begun = shallow.answer(4)
    assert torch.equal(begun, whole(family, ids, mask, exit_idx=0, max_new_tokens=4))
    longer = torch.cat((mask, mask.new_ones(2, 4)), 1)
    text = server_side(family, 0).resume(sent(shallow.state("migrate")))
    assert torch.equal(text.generate(), whole(family, begun, longer, max_new_tokens=4))


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(REFUSED))
def test_other_hosts_are_refused_with_the_reason(model_type):
    family = tiny_family(model_type, [DEPTH, 4])
    with pytest.raises(ValueError, match=REFUSED[model_type]):
        both_sides(family)


def both_sides(family):
    deep = server_side(family, 0)
    hand_off(DeviceSide(cut(family), DEPTH), deep, "migrate", padded_text()[0])


@pytest.mark.slow
def test_the_example_hands_over_between_real_processes():
    line = [sys.executable, ROOT / "examples" / "handoff.py", "--smoke", "--max_new_tokens", "4"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line for line in done.stdout.splitlines() if "yes" in line or " no " in line]
    assert len(rows) == 3
    assert all("yes" in row for row in rows)
