"""The loss refuses targets that do not lie on its positions, and counts that cannot be."""

from typing import Any

import pytest
import torch
from reference import cross_entropy, logits, tiny_family, token_ids, truncated_host

from hf_familial import FamilialForCausalLM


EXITS = [1, 2, 4]
# logits that nobody wants are read in chunks, of the default exit by the host, of all by the host
WAYS: dict[str, dict[str, Any]] = {
    "in chunks": {"skip_logits": True},
    "mixed": {},
    "by the host": {"output_exits": True},
    "one exit": {"exit_idx": 0, "skip_logits": True},
}
BATCH, LENGTH = token_ids().shape


@pytest.fixture(scope="module")
def family() -> FamilialForCausalLM:
    return tiny_family("llama", EXITS)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["labels", "shift_labels"])
@pytest.mark.parametrize(
    "shape",
    [
        (BATCH, LENGTH - 4),  # the answers alone
        (BATCH, LENGTH + 3),
        (BATCH - 1, LENGTH),
        (BATCH + 1, LENGTH),
        (1, LENGTH),
        (LENGTH, BATCH),  # as many
        (1, BATCH * LENGTH),
        (BATCH * LENGTH,),
        (BATCH, LENGTH, 1),
        (BATCH, 0),
    ],
    ids=str,
)
def test_targets_of_another_shape_are_refused(
    family: FamilialForCausalLM, way: str, name: str, shape: tuple[int, ...]
) -> None:
    """Read flat, they would train every position on the token of another one."""
    ids = token_ids()
    targets = {"labels": ids} | {name: torch.full(shape, 9)}
    with pytest.raises(ValueError, match=f"`{name}` must have shape") as raised:
        family(ids, **targets, **WAYS[way])
    assert str((BATCH, LENGTH)) in str(raised.value)
    assert str(shape) in str(raised.value)


@pytest.mark.parametrize("way", WAYS)
def test_kept_logits_take_the_labels_of_their_positions(
    family: FamilialForCausalLM, way: str
) -> None:
    """As in the host: labels of all positions do not fit the kept ones, those of these do."""
    ids, keep = token_ids(), 5
    for wrong in (keep, torch.arange(keep)):
        with pytest.raises(ValueError, match=r"With `logits_to_keep`"):
            family(ids, labels=ids, logits_to_keep=wrong, **WAYS[way])
    output = family(ids, labels=ids[:, -keep:], logits_to_keep=keep, **WAYS[way])
    for k, loss in enumerate(output.exit_losses):
        kept = logits(truncated_host(family, k), ids)[:, -keep:]
        torch.testing.assert_close(loss, cross_entropy(kept, ids[:, -keep:]))


@pytest.mark.parametrize("way", WAYS)
def test_embeddings_take_labels_of_their_length(family: FamilialForCausalLM, way: str) -> None:
    ids = token_ids()
    embeds = family.get_input_embeddings()(ids)
    assert family(inputs_embeds=embeds, labels=ids, **WAYS[way]).loss.isfinite()
    with pytest.raises(ValueError, match="`labels` must have shape"):
        family(inputs_embeds=embeds, labels=ids[:, 1:], **WAYS[way])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "count",
    [0, -1, 0.0, float("nan"), torch.tensor(0), torch.tensor(-3), torch.tensor([3, 4])],
    ids=str,
)
def test_a_number_of_targets_that_cannot_be_is_refused(
    family: FamilialForCausalLM, way: str, count: Any
) -> None:
    ids = token_ids()
    with pytest.raises(ValueError, match="`num_items_in_batch` must be one positive number"):
        family(ids, labels=ids, num_items_in_batch=count, **WAYS[way])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "count", [7, 7.0, torch.tensor(7), torch.tensor(7.0), torch.tensor([[7]])], ids=str
)
def test_every_kind_of_number_divides_alike(
    family: FamilialForCausalLM, way: str, count: Any
) -> None:
    """The host's trainer gives a scalar, or a row for each replica."""
    ids = token_ids()
    whole = family(ids, labels=ids, num_items_in_batch=1, **WAYS[way])
    part = family(ids, labels=ids, num_items_in_batch=count, **WAYS[way])
    torch.testing.assert_close(7 * part.exit_losses.flatten(), whole.exit_losses)


@pytest.mark.parametrize("way", ["in chunks", "mixed", "by the host"])
@pytest.mark.parametrize("weights", [[1.0], [0.5, 0.5], [0.25] * 4, []], ids=str)
def test_weights_for_other_exits_are_refused(
    family: FamilialForCausalLM, way: str, weights: list[float]
) -> None:
    ids = token_ids()
    with pytest.raises(ValueError, match="one entry per exit .3."):
        family(ids, labels=ids, exit_weights=weights, **WAYS[way])
