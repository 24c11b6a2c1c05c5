"""The chunked loss against sums of cross entropies from whole logits."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hf_familial import Distillation
from hf_familial.models.familial import losses
from hf_familial.models.familial.backbones import LogitTransform
from hf_familial.models.familial.losses import linear_cross_entropy


ROWS, WIDTH, VOCAB, EXITS = 90, 16, 50, 3
WEIGHTS = (0.2, 0.3, 0.5)
PLAIN = LogitTransform()
TRANSFORMS = {
    "plain": PLAIN,
    "divisor": LogitTransform(divisor=3.0),
    "softcap": LogitTransform(softcap=5.0),
    "multiplier+softcap": LogitTransform(multiplier=0.5, float_softcap=4.0),
    "hidden_divisor+vocab_size": LogitTransform(hidden_divisor=2.0, vocab_size=45),
}


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small chunks, so that every test crosses their borders."""
    monkeypatch.setattr(losses, "chunk_rows", lambda vocab_size, device: 32)


def make_case(own_heads: bool = False, bias: bool = False, dtype: torch.dtype = torch.float32):
    """Hidden states, heads and targets, a third of them ignored."""
    torch.manual_seed(0)
    heads = [nn.Linear(WIDTH, VOCAB, bias=bias, dtype=dtype) for _ in range(EXITS)]
    heads = heads if own_heads else heads[:1] * EXITS
    for head in heads:
        nn.init.normal_(head.weight, std=0.5)
    hidden = [torch.randn(ROWS, WIDTH, dtype=dtype, requires_grad=True) for _ in range(EXITS)]
    targets = torch.randint(0, 45, (ROWS,))
    targets[torch.rand(ROWS) < 0.3] = -100
    return hidden, heads, targets, (targets != -100).sum().float()


def naive(hidden, heads, targets, denominator, transform=PLAIN, distillation=None):
    """The same from whole logits."""
    weights, losses, total = (targets != -100).float(), [], 0.0
    logits = [transform.read(h, head).float() for h, head in zip(hidden, heads, strict=True)]
    for k, z in enumerate(logits):
        loss = F.cross_entropy(z, targets, ignore_index=-100, reduction="none")
        objective = loss
        if distillation is not None and k < EXITS - 1:
            t = distillation.temperature
            teacher = F.log_softmax(logits[-1].detach() / t, -1)
            kl = F.kl_div(F.log_softmax(z / t, -1), teacher, log_target=True, reduction="none")
            objective = loss + distillation.weight * t**2 * kl.sum(-1)
        losses.append((loss * weights).sum() / denominator)
        total = total + WEIGHTS[k] * (objective * weights).sum() / denominator
    return total, torch.stack(losses)


def assert_same(hidden, heads, expected, found, tolerance: float) -> None:
    """Equal loss, per-exit losses and gradients."""
    parameters = [*hidden, *(p for head in dict.fromkeys(heads) for p in head.parameters())]
    torch.testing.assert_close(found[0], expected[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found[1], expected[1], rtol=tolerance, atol=tolerance)
    right = torch.autograd.grad(expected[0], parameters)
    ours = torch.autograd.grad(found[0], parameters)
    for a, b in zip(right, ours, strict=True):
        assert (a - b).float().norm() <= tolerance * a.float().norm()


@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("own_heads", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_equals_whole_logits(transform, own_heads: bool, bias: bool) -> None:
    hidden, heads, targets, denominator = make_case(own_heads, bias)
    expected = naive(hidden, heads, targets, denominator, transform)
    found = linear_cross_entropy(hidden, heads, targets, denominator, WEIGHTS, transform)
    assert_same(hidden, heads, expected, found, 1e-6)


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_distillation(transform) -> None:
    hidden, heads, targets, denominator = make_case()
    how = Distillation(weight=0.7, temperature=2.0)
    expected = naive(hidden, heads, targets, denominator, transform, distillation=how)
    found = linear_cross_entropy(
        hidden, heads, targets, denominator, WEIGHTS, transform, distillation=how
    )
    assert_same(hidden, heads, expected, found, 1e-6)


def test_extreme_logits_stay_finite() -> None:
    hidden, heads, targets, denominator = make_case()
    hidden = [(h.detach() * 1e3).requires_grad_() for h in hidden]
    expected = naive(hidden, heads, targets, denominator)
    found = linear_cross_entropy(hidden, heads, targets, denominator, WEIGHTS, PLAIN)
    assert_same(hidden, heads, expected, found, 1e-5)


def test_rows_without_target_are_never_read() -> None:
    hidden, heads, targets, denominator = make_case()
    poisoned = [h.detach().clone() for h in hidden]
    for h in poisoned:
        h[targets == -100] = float("nan")
        h.requires_grad_()
    total, _ = linear_cross_entropy(poisoned, heads, targets, denominator, WEIGHTS, PLAIN)
    total.backward()
    assert torch.isfinite(total)
    assert torch.isfinite(heads[0].weight.grad).all()
    assert all((h.grad[targets == -100] == 0).all() for h in poisoned)


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(rows: int) -> None:
    hidden, heads, targets, _ = make_case()
    kept = torch.full_like(targets, -100)
    kept[:rows] = 3
    denominator = torch.tensor(8.0)
    expected = naive(hidden, heads, kept, denominator)
    found = linear_cross_entropy(hidden, heads, kept, denominator, WEIGHTS, PLAIN)
    assert_same(hidden, heads, expected, found, 1e-6)


@pytest.mark.parametrize("how", [None, Distillation(1.0, 2.0)], ids=["plain", "distillation"])
def test_empty_batch(how) -> None:
    _, heads, targets, _ = make_case()
    hidden = [torch.zeros(0, WIDTH, requires_grad=True) for _ in range(EXITS)]
    total, losses = linear_cross_entropy(
        hidden, heads, targets[:0], torch.tensor(8.0), WEIGHTS, PLAIN, distillation=how
    )
    total.backward()
    assert total == 0
    assert torch.equal(losses, torch.zeros(EXITS))
    assert not heads[0].weight.grad.any()
    assert all(h.grad.shape == h.shape for h in hidden)


@pytest.mark.parametrize("how", [None, Distillation(1.0, 2.0)], ids=["plain", "distillation"])
def test_no_row_to_learn_from_and_a_denominator_of_zero(how) -> None:
    """The loss is NaN and the gradients are 0, as of torch's mean over nothing."""
    hidden, heads, targets, _ = make_case(own_heads=True, bias=True)
    targets = torch.full_like(targets, -100)
    none = torch.tensor(0.0)
    total, losses = linear_cross_entropy(
        hidden,
        heads,
        targets,
        none,
        WEIGHTS,
        PLAIN,
        distillation=how,
    )
    total.backward()
    assert total.isnan()
    assert losses.isnan().all()
    for tensor in (*hidden, *(p for head in heads for p in head.parameters())):
        assert torch.equal(tensor.grad, torch.zeros_like(tensor))
    mean = F.cross_entropy(heads[0](hidden[0]), torch.full_like(targets, -100))
    assert mean.isnan()
    assert not torch.autograd.grad(mean, heads[0].weight)[0].any()


def test_a_denominator_of_zero_with_targets_is_no_number() -> None:
    hidden, heads, targets, _ = make_case()
    total, _ = linear_cross_entropy(hidden, heads, targets, torch.tensor(0.0), WEIGHTS, PLAIN)
    total.backward()
    assert total.isinf()
    assert not heads[0].weight.grad.isfinite().any()


def test_a_broken_exit_breaks_its_own_states_only() -> None:
    hidden, heads, targets, denominator = make_case(own_heads=True)
    with torch.no_grad():
        hidden[1][targets != -100] = float("nan")
    total, losses = linear_cross_entropy(hidden, heads, targets, denominator, WEIGHTS, PLAIN)
    total.backward()
    assert losses.isnan().tolist() == [False, True, False]
    # the memory that exits share carries nothing over
    for broken, head in zip((False, True, False), heads, strict=True):
        assert head.weight.grad.isnan().any().item() == broken


def test_exit_of_weight_zero_costs_no_gradient_but_has_one() -> None:
    hidden, heads, targets, denominator = make_case(own_heads=True)
    total, losses = linear_cross_entropy(
        hidden, heads, targets, denominator, (0.0, 0.5, 0.5), PLAIN
    )
    total.backward()
    assert losses[0] > 0
    assert (heads[0].weight.grad == 0).all()
    assert (hidden[0].grad == 0).all()


def test_frozen_head_and_states_get_none() -> None:
    hidden, heads, targets, denominator = make_case()
    heads[0].weight.requires_grad_(False)
    total, _ = linear_cross_entropy(
        [hidden[0].detach(), *hidden[1:]], heads, targets, denominator, WEIGHTS, PLAIN
    )
    total.backward()
    assert heads[0].weight.grad is None
    assert hidden[0].grad is None
    assert hidden[1].grad is not None


def test_without_gradients() -> None:
    hidden, heads, targets, denominator = make_case()
    with torch.no_grad():
        found = linear_cross_entropy(hidden, heads, targets, denominator, WEIGHTS, PLAIN)
    expected = naive(hidden, heads, targets, denominator)
    torch.testing.assert_close(found[1], expected[1])


def test_autocast_and_half_parameters() -> None:
    hidden, heads, targets, denominator = make_case()
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_cross_entropy(hidden, heads, targets, denominator, WEIGHTS, PLAIN)
    assert_same(hidden, heads, naive(hidden, heads, targets, denominator), found, 3e-2)
    hidden, heads, targets, denominator = make_case(dtype=torch.bfloat16)
    found = linear_cross_entropy(hidden, heads, targets, denominator, WEIGHTS, PLAIN)
    assert_same(hidden, heads, naive(hidden, heads, targets, denominator), found, 3e-2)
    assert found[0].dtype == torch.float32


def test_upstream_gradient_scales_and_second_backward_is_refused() -> None:
    hidden, heads, targets, denominator = make_case()
    once, _ = linear_cross_entropy(hidden, heads, targets, denominator, WEIGHTS, PLAIN)
    (gradient,) = torch.autograd.grad(once, hidden[:1])
    total, _ = linear_cross_entropy(hidden, heads, targets, denominator, WEIGHTS, PLAIN)
    (tripled,) = torch.autograd.grad(3 * total, hidden[:1], retain_graph=True)
    torch.testing.assert_close(tripled, 3 * gradient)
    with pytest.raises(RuntimeError, match="`backward` can run only once"):
        total.backward()
