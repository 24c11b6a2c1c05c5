"""The multi-exit loss: token-correct, the mean over exits, the same however a batch is cut."""

import pytest
import torch
from backbones import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import (
    copy_of,
    cross_entropy,
    gradients,
    logits,
    tiny_family,
    token_ids,
    truncated_host,
)
from transformers import AutoModelForCausalLM

from hf_familial import FamilialForCausalLM


EXITS = [1, 3, 4]
MODES = {
    "plain": {},
    "private": {"num_exit_layers": 1},
    "own-heads": {"exit_head": "own", "exit_norm": "shared"},
}
# mixtures of experts whose hosts add a load-balancing loss
MIXTURES = ("mixtral", "qwen3_moe", "gpt_oss", "olmoe", "granitemoe", "phimoe", "minimax", "jamba")


def labels_of(ids, seed=5, share=0.3):
    """The ids, some of them no targets."""
    generator = torch.Generator().manual_seed(seed)
    return ids.masked_fill(torch.rand(ids.shape, generator=generator) < share, -100)


def right_losses(family, ids, labels, denominator=None):
    """Cross entropy of every member, by the oracle."""
    members = [truncated_host(family, k) for k in range(family.config.num_exits)]
    return torch.stack([cross_entropy(logits(m, ids), labels, denominator) for m in members])


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2", "falcon_h1"])
@pytest.mark.parametrize("fields", MODES.values(), ids=MODES)
def test_the_loss_is_the_mean_of_the_members(model_type, fields):
    family = tiny_family(model_type, EXITS, **fields)
    ids = token_ids()
    labels = labels_of(ids)
    output = family(ids, labels=labels)
    torch.testing.assert_close(output.exit_losses, right_losses(family, ids, labels))
    torch.testing.assert_close(output.loss.detach(), output.exit_losses.mean())
    assert output.exit_losses.shape == (3,)
    assert not output.exit_losses.requires_grad
    torch.testing.assert_close(output.logits.detach(), logits(family, ids))


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "mixtral"])
@pytest.mark.parametrize("how", [{"skip_logits": True}, {}, {"output_exits": True}], ids=str)
@pytest.mark.parametrize("count", [{}, {"num_items_in_batch": 0}], ids=str)
def test_no_target_anywhere_gives_gradients_of_zero(model_type, how, count):
    """In chunks, by the host's loss, or some exits each way; the loss is NaN, as the host's."""
    family = tiny_family(model_type, EXITS, exit_head="own").train()
    ids = token_ids()
    output = family(ids, labels=torch.full_like(ids, -100), use_cache=False, **how, **count)
    assert output.exit_losses.isnan().all()
    assert output.loss.isnan()
    output.loss.backward()
    for name, parameter in family.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


@pytest.mark.parametrize("exit_idx", [0, 1, 2, -1, -3])
@pytest.mark.parametrize("output_exits", [False, True])
def test_one_exit_has_its_loss_alone(exit_idx, output_exits):
    family = tiny_family("llama", EXITS, num_exit_layers=1, exit_head="own")
    ids = token_ids()
    labels = labels_of(ids)
    output = family(ids, labels=labels, exit_idx=exit_idx, output_exits=output_exits)
    assert output.exit_losses.shape == (1,)
    right = right_losses(family, ids, labels)[exit_idx]
    torch.testing.assert_close(output.loss.detach(), right)
    torch.testing.assert_close(output.exit_losses[0], right)
    torch.testing.assert_close(output.logits.detach(), logits(family, ids, exit_idx=exit_idx))
    assert (output.exit_logits is not None) is output_exits


def test_the_default_exit_gives_the_logits_and_all_exits_the_loss():
    family = tiny_family("llama", EXITS, default_exit=0)
    ids = token_ids()
    output = family(ids, labels=ids)
    torch.testing.assert_close(output.logits.detach(), logits(family, ids, exit_idx=0))
    torch.testing.assert_close(output.exit_losses, right_losses(family, ids, ids))


@given(st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=2, max_size=2))
@settings(max_examples=12)
def test_tokens_without_a_target_do_not_count(masked):
    family = tiny_family("llama", [1, 2], depth=2)
    ids = token_ids(2, 6)
    labels = ids.masked_fill(torch.tensor(masked), -100)
    output = family(ids, labels=labels)
    if (labels[:, 1:] != -100).any():
        torch.testing.assert_close(output.exit_losses, right_losses(family, ids, labels))
    else:
        assert output.loss.isnan()  # as in the host: a mean over nothing


@pytest.mark.parametrize("fields", MODES.values(), ids=MODES)
def test_micro_batches_add_up_to_the_batch(fields):
    family = tiny_family("llama", EXITS, **fields)
    ids = token_ids(4, 12)
    labels = labels_of(ids)
    labels[0, 3:] = -100  # micro batches differ in their number of targets
    count = (labels[:, 1:] != -100).sum()
    whole = family(ids, labels=labels)
    whole.loss.backward()
    right = gradients(family)
    family.zero_grad()
    parts = [
        family(ids[a:b], labels=labels[a:b], num_items_in_batch=count) for a, b in [(0, 1), (1, 4)]
    ]
    for part in parts:
        part.loss.backward()
    torch.testing.assert_close(sum(p.exit_losses for p in parts), whole.exit_losses)
    torch.testing.assert_close(sum(p.loss for p in parts), whole.loss)
    found = gradients(family)
    assert found.keys() == right.keys()
    for name, gradient in right.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("count", [7, torch.tensor(7)], ids=["int", "tensor"])
def test_the_number_of_items_divides_every_exit(count):
    family = tiny_family("llama", EXITS)
    ids = token_ids()
    output = family(ids, labels=ids, num_items_in_batch=count)
    torch.testing.assert_close(output.exit_losses, right_losses(family, ids, ids, denominator=7))


@pytest.mark.parametrize("private", [0, 1])
def test_labels_shifted_before_are_not_shifted_again(private):
    family = tiny_family("llama", EXITS, num_exit_layers=private)
    ids = token_ids()
    labels = labels_of(ids)
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
    output = family(ids, labels=labels, shift_labels=shifted)
    torch.testing.assert_close(output.exit_losses, right_losses(family, ids, labels))


def test_padding_is_masked():
    family = tiny_family("llama", EXITS, num_exit_layers=1)
    ids = token_ids(1, 12)
    labels = labels_of(ids)
    right = family(ids, labels=labels)
    pad = torch.nn.functional.pad
    padded = family(
        pad(ids, (0, 4)),
        attention_mask=pad(torch.ones_like(ids), (0, 4)),
        labels=pad(labels, (0, 4), value=-100),
    )
    torch.testing.assert_close(padded.exit_losses, right.exit_losses)


def test_a_row_without_a_target_changes_nothing():
    family = tiny_family("llama", EXITS)
    ids = token_ids(3, 12)
    labels = labels_of(ids)
    labels[1] = -100
    family(ids[[0, 2]], labels=labels[[0, 2]]).loss.backward()
    right = gradients(family)
    family.zero_grad()
    output = family(ids, labels=labels)
    output.loss.backward()
    torch.testing.assert_close(output.exit_losses, right_losses(family, ids, labels))
    for name, gradient in gradients(family).items():
        torch.testing.assert_close(gradient, right[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("fields", MODES.values(), ids=MODES)
@pytest.mark.parametrize("ids", [token_ids(2, 6), token_ids(1, 1)], ids=["batch", "token"])
def test_a_share_without_a_target_adds_nothing(ids, fields):
    """Of a batch whose other shares have targets: another process, another micro batch."""
    family = tiny_family("llama", EXITS, **fields)
    labels = torch.full_like(ids, -100)
    output = family(ids, labels=labels, num_items_in_batch=5, use_cache=False, skip_logits=True)
    assert output.loss == 0
    assert torch.equal(output.exit_losses, torch.zeros(3))
    output.loss.backward()
    # a gradient of 0 and not none, so that processes agree on who has one
    found = gradients(family)
    assert all(not gradient.any() for gradient in found.values())
    assert len(found) == len(list(family.parameters()))


def test_one_target():
    family = tiny_family("llama", EXITS)
    ids = token_ids(1, 2)
    output = family(ids, labels=ids)
    torch.testing.assert_close(output.exit_losses, right_losses(family, ids, ids))


def test_a_broken_exit_is_seen_and_leaves_the_others():
    family = tiny_family("llama", EXITS)
    with torch.no_grad():
        family.model.exits[1].norm.weight.fill_(float("nan"))
    ids = token_ids()
    output = family(ids, labels=ids)
    assert output.loss.isnan()
    assert output.exit_losses.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "mixtral"])
@pytest.mark.parametrize("fields", MODES.values(), ids=MODES)
def test_packed_sequences_are_the_separate_ones(model_type, fields):
    family = tiny_family(model_type, EXITS, **fields)
    lengths = [5, 9, 6]
    parts = token_ids(1, sum(lengths)).split(lengths, dim=1)
    ids = torch.cat(parts, dim=1)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    labels = ids.masked_fill(positions == 0, -100)
    with torch.no_grad():
        packed = family(
            ids, position_ids=positions, labels=labels, output_exits=True, use_cache=False
        )
    for k in range(3):
        separate = torch.cat([logits(family, part, exit_idx=k) for part in parts], dim=1)
        found = logits(family, ids, position_ids=positions, exit_idx=k)
        torch.testing.assert_close(found, separate, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(packed.exit_logits[k], separate, atol=1e-5, rtol=1e-4)
    counts = torch.tensor([n - 1 for n in lengths])
    losses = torch.stack([family(part, labels=part).exit_losses.detach() for part in parts])
    mean = (losses * counts[:, None]).sum(0) / counts.sum()
    torch.testing.assert_close(packed.exit_losses, mean)


@pytest.mark.parametrize("model_type", MIXTURES)
@pytest.mark.parametrize("masked", [False, True])
def test_one_exit_balances_experts_as_the_host(model_type, masked):
    host = tiny_model(model_type)
    host.config.router_aux_loss_coef = 0.5
    ids = token_ids()
    inputs = {"labels": labels_of(ids), "output_router_logits": True, "use_cache": False}
    if masked:
        inputs["attention_mask"] = (torch.arange(20) < torch.tensor([[20], [13]])).long()
    family = FamilialForCausalLM.from_backbone(copy_of(host), exits=[4])
    if hasattr(host, "router_aux_loss_coef"):
        host.router_aux_loss_coef = 0.5
    right = host(ids, **inputs)
    found = family(ids, **inputs)
    assert right.aux_loss is not None
    torch.testing.assert_close(found.aux_loss, right.aux_loss)
    torch.testing.assert_close(found.loss, right.loss)
    assert len(found.router_logits) == len(right.router_logits)
    right.loss.backward()
    found.loss.backward()
    total = [sum(g.abs().sum() for g in gradients(m).values()) for m in (host, family)]
    torch.testing.assert_close(*total)


@pytest.mark.parametrize(
    ("private", "exit_idx"),
    [(0, 0), (0, 1), (0, 2), (1, 2)] + [(1, k) for k in (0, 1)],
)
def test_a_member_balances_the_experts_it_has(exit_idx, private):
    family = tiny_family("mixtral", EXITS, num_exit_layers=private)
    ids = token_ids()
    right = truncated_host(family, exit_idx)(ids, labels=ids, output_router_logits=True)
    found = family(ids, labels=ids, output_router_logits=True, exit_idx=exit_idx)
    torch.testing.assert_close(found.aux_loss, right.aux_loss)
    torch.testing.assert_close(found.loss, right.loss)


@pytest.mark.parametrize("where", ["text_config", "call"])
def test_router_logits_can_be_asked_for_by_the_config(where):
    family = tiny_family("mixtral", EXITS)
    ids = token_ids()
    kwargs = {"output_router_logits": True} if where == "call" else {}
    if where == "text_config":
        family.config.text_config.output_router_logits = True
    output = family(ids, labels=ids, **kwargs)
    coefficient = family.config.text_config.router_aux_loss_coef
    assert output.aux_loss > 0
    total = output.exit_losses.mean() + coefficient * output.aux_loss
    torch.testing.assert_close(output.loss, total)


def test_private_experts_are_balanced_too():
    family = tiny_family("mixtral", EXITS, num_exit_layers=1)
    family.config.text_config.router_aux_loss_coef = 1.0
    family(token_ids(), labels=token_ids(), output_router_logits=True).aux_loss.backward()
    gates = {n: g for n, g in gradients(family).items() if n.endswith("gate.weight")}
    assert sum(n.startswith("model.backbone.") for n in gates) == 4
    assert sum(n.startswith("model.exits.") for n in gates) == 2


def test_the_loss_does_not_depend_on_what_was_asked_before():
    family, ids = tiny_family("mixtral", EXITS, num_exit_layers=1), token_ids()
    inputs = {"labels": ids, "exit_idx": 0, "output_router_logits": True}
    before = family(ids, **inputs).loss
    family(ids, exit_idx=0, output_hidden_states=True)
    torch.testing.assert_close(family(ids, **inputs).loss, before)


def test_no_loss_without_labels():
    output = tiny_family("mixtral", EXITS)(token_ids(), output_router_logits=True)
    assert output.loss is None
    assert output.exit_losses is None
    assert output.aux_loss is not None


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2"])
def test_every_exit_trains_what_it_reads(model_type):
    family = tiny_family(model_type, EXITS, num_exit_layers=1, exit_head="own")
    family(token_ids(), labels=token_ids()).loss.backward()
    found = gradients(family)
    silent = [n for n, _ in family.named_parameters() if n not in found or not found[n].any()]
    assert silent == []


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "gpt2"])
def test_the_loss_goes_down(model_type):
    family = tiny_family(model_type, [1, 2], depth=2, num_exit_layers=1).train()
    optimizer = torch.optim.AdamW(family.parameters(), lr=1e-2)
    ids = token_ids(2, 12)
    torch.manual_seed(0)
    losses = []
    for _ in range(25):
        output = family(ids, labels=ids)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.exit_losses)
    assert (losses[-1] < 0.6 * losses[0]).all()


def test_half_precision_losses_are_summed_in_full():
    family = tiny_family("llama", EXITS).to(torch.bfloat16)
    ids = token_ids()
    output = family(ids, labels=ids)
    assert output.loss.dtype == output.exit_losses.dtype == torch.float32
    right = [cross_entropy(logits(family, ids, exit_idx=k), ids) for k in range(3)]
    torch.testing.assert_close(output.exit_losses, torch.stack(right), atol=2e-3, rtol=1e-3)


def test_a_host_loaded_as_a_causal_lm_trains_alike():
    """The oracle itself: the naive sum is the host's own loss."""
    host = AutoModelForCausalLM.from_config(tiny_model("llama").config)
    ids = token_ids()
    labels = labels_of(ids)
    torch.testing.assert_close(
        host(ids, labels=labels).loss.detach(), cross_entropy(logits(host, ids), labels)
    )
