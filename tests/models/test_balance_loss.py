"""The balance loss of experts is a mean over the batches that are accumulated."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from reference import tiny_family, token_ids
from transformers import Trainer, TrainingArguments, default_data_collator

from hf_familial import FamilialForCausalLM
from hf_familial.training.trainer import FamilialTrainer


EXITS = [1, 2]
MIXTURES = ["mixtral", "qwen3_moe", "olmoe"]


def family_of(model_type: str = "mixtral", **fields: Any) -> FamilialForCausalLM:
    """A family of which the balance of experts is all that trains the routers."""
    family = tiny_family(model_type, EXITS, depth=2, **fields)
    family.config.text_config.output_router_logits = True
    family.config.text_config.router_aux_loss_coef = 1.0
    return family


def router_gradient(
    family: FamilialForCausalLM,
    batches: list[tuple[torch.Tensor, torch.Tensor]],
    weigh: bool = True,
) -> torch.Tensor:
    """Gradient of the routers by the balance alone, accumulated as the host's trainer does."""
    count = sum((labels[:, 1:] != -100).sum() for _, labels in batches)
    gradients = []
    for coefficient in (1.0, 0.0):
        family.config.text_config.router_aux_loss_coef = coefficient
        family.zero_grad()
        for ids, labels in batches:
            options = {"num_items_in_batch": count} if weigh else {}
            family(ids, labels=labels, skip_logits=True, **options).loss.backward()
        found = [p.grad.flatten() for n, p in family.named_parameters() if ".gate." in n]
        gradients.append(torch.cat([g for g in found if g is not None]).clone())
    family.config.text_config.router_aux_loss_coef = 1.0
    return gradients[0] - gradients[1]


@pytest.mark.parametrize("fields", [{}, {"num_exit_layers": 1}], ids=str)
@pytest.mark.parametrize("model_type", MIXTURES)
def test_accumulation_does_not_raise_the_balance_loss(
    model_type: str, fields: dict[str, Any]
) -> None:
    """Four rows one by one give the mean of their four gradients, near that of the batch."""
    family = family_of(model_type, **fields)
    ids = torch.cat([token_ids(seed=k) for k in range(4)])[:4]
    rows = [(row[None], row[None]) for row in ids]
    whole = router_gradient(family, [(ids, ids)])
    found = router_gradient(family, rows)
    alone = [router_gradient(family, [row], weigh=False) for row in rows]
    torch.testing.assert_close(found, torch.stack(alone).mean(0), rtol=1e-4, atol=1e-6)
    assert 0.5 < found.norm() / whole.norm() < 2


def test_a_batch_counts_by_its_share_of_the_targets() -> None:
    family = family_of()
    ids = token_ids()[:1]
    few, none = ids.clone(), torch.full_like(ids, -100)
    few[:, 4:] = -100
    found = router_gradient(family, [(ids, ids), (ids, few), (ids, none)])
    alone = router_gradient(family, [(ids, ids)], weigh=False)
    torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-6)


def test_evaluated_alone_the_loss_has_the_whole_balance_loss() -> None:
    family = family_of()
    ids = token_ids()
    with torch.no_grad():
        output = family(ids, labels=ids, num_items_in_batch=ids[:, 1:].numel())
    torch.testing.assert_close(output.loss, output.exit_losses.mean() + output.aux_loss)


@pytest.mark.parametrize("kind", [FamilialTrainer, Trainer])
def test_a_training_step_does_not_depend_on_the_accumulation(tmp_path: Path, kind: Any) -> None:
    """The last window of an epoch, which is incomplete, included."""
    family = family_of()
    ids = token_ids()[:1].repeat(6, 1)  # equal rows: the balance of a batch is that of a row
    rows = Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})
    trained = []
    for batch, accumulation in [(4, 1), (2, 2), (1, 4)]:
        args = TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            num_train_epochs=1,
            optim="sgd",
            learning_rate=0.1,
            max_grad_norm=0,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        model = copy.deepcopy(family)
        kind(model, args, default_data_collator, train_dataset=rows).train()
        trained.append(dict(model.named_parameters()))
    start = dict(family.named_parameters())
    gates = [name for name in start if ".gate." in name]
    assert min((trained[0][name] - start[name]).abs().max() for name in gates) > 1e-4
    for others in trained[1:]:
        for name, value in others.items():
            torch.testing.assert_close(value, trained[0][name], rtol=1e-4, atol=1e-6)
