"""A digest of layers tells weights and configs apart, on both sides of a hand-off."""

import pytest
import torch
from parted import DEPTH, family_and_device, sent
from reference import token_ids

from hf_familial.errors import HandoffError
from hf_familial.handoff import DeviceSide, server_side, weights_digest
from hf_familial.handoff._weights_digest import BLOCK, FACTOR, WIDTH, _column_sums, _weight


def test_a_digest_is_of_the_layers_that_both_have():
    family, device = family_and_device("mistral", num_exit_layers=1)
    mine = weights_digest(family, DEPTH)
    assert weights_digest(device, DEPTH) == mine
    assert weights_digest(family, 1) != mine
    with torch.no_grad():  # what stands above may differ
        family.model.backbone.layers[2].mlp.up_proj.weight.add_(1)
        family.model.backbone.norm.weight.add_(1)
    assert weights_digest(family, DEPTH) == mine


@torch.no_grad()
def one_number(device):
    device.model.backbone.layers[1].mlp.up_proj.weight[3, 5] += 1e-3


@torch.no_grad()
def two_rows(device):
    weight = device.model.backbone.embed_tokens.weight
    weight[[8, 9]] = weight[[9, 8]]


def theta(device):
    device.model.backbone.config.rope_parameters["rope_theta"] = 5.0


def half(device):
    device.to(torch.bfloat16)


@pytest.mark.parametrize("change", [one_number, two_rows, theta, half])
def test_taps_of_other_layers_are_refused(change):
    family, device = family_and_device("llama")
    change(device)
    shallow = DeviceSide(device).start(token_ids(1, 5))
    with pytest.raises(HandoffError, match="the taps come from other layers"):
        server_side(family, 0).resume(sent(shallow.state("migrate")))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [3, 2042, 50_001])
def test_a_digest_sees_every_flip_and_every_exchange(size, dtype):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(size, generator=generator).to(dtype)
    before = _weight("w", weight)
    assert _weight("w", weight.clone()) == before
    assert _weight("w", torch.cat((weight[:1], weight))[1:]) == before  # whatever its place
    bits = weight.view(torch.int32 if dtype is torch.float32 else torch.int16)
    for _ in range(100):
        i, j = torch.randint(size, (2,), generator=generator).tolist()
        bits[i] ^= 1
        assert _weight("w", weight) != before
        bits[i] ^= 1
        bits[[i, j]] = bits[[j, i]]
        assert (_weight("w", weight) == before) == (i == j)
        bits[[i, j]] = bits[[j, i]]
    assert _weight("w", -weight) != before
    assert _weight("w", weight.flip(0)) != before


def test_sums_of_a_digest_are_the_same_on_devices_without_products_of_whole_numbers():
    rows = torch.randint(-(2**62), 2**62, (3 * BLOCK // 2, WIDTH))
    factors = torch.arange(len(rows)) * FACTOR
    factors = ((factors >> 29) ^ factors) * FACTOR | 1
    assert torch.equal(_column_sums(rows), (rows * factors[:, None]).sum(0))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("changed", ["device", "server"])
def test_weights_that_change_between_two_texts_are_noticed(changed, frozen):
    family, device = family_and_device("llama")
    side, deep = DeviceSide(device), server_side(family, 0)
    deep.resume(sent(side.start(token_ids(1, 5)).state("migrate")))
    model = device if changed == "device" else family
    if frozen:
        model.freeze_weights()
    model.model.backbone.layers[0].mlp.up_proj.weight.data.add_(0.1)
    state = sent(side.start(token_ids(1, 5)).state("migrate"))
    if frozen:  # a broken promise
        deep.resume(state)
        return
    with pytest.raises(HandoffError, match="the taps come from other layers"):
        deep.resume(state)
