"""A relay never writes the text of weights that are gone, however they were changed."""

import copy

import pytest
import torch
from reference import tiny_family
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.training_args import OptimizerNames

import hf_familial as hff
from hf_familial.decoding._fused import FusedPasses
from hf_familial.decoding.accelerator import weights_stamp


RELAY = hff.SpeculativeRelay(draft_exit=0, draft_length=2)
IDS = torch.randint(3, 128, (1, 6), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def family():
    model = tiny_family("llama", [2, 4])
    model.generation_config.eos_token_id = None
    return model


def texts(model, fused=True):
    """The text of a relay, and of `generate`."""
    asked = {"max_new_tokens": 8, "do_sample": False}
    found = model.relay_generate(IDS, relay=RELAY, fused_weights=fused, **asked)
    return found, model.generate(IDS, **asked)


def follows(model, change):
    """Whether the relay's text is `generate`'s before and after a change that alters it."""
    before, right = texts(model)
    assert torch.equal(before, right)
    change(model)
    after, right = texts(model)
    assert torch.equal(after, right)
    return not torch.equal(before, after)


def give_gradients(parameters, sparse=False):
    generator = torch.Generator().manual_seed(0)
    for parameter in parameters:
        grad = torch.randn(parameter.shape, generator=generator).to(parameter)
        parameter.grad = grad.to_sparse() if sparse else grad


OPTIMIZERS = sorted(
    name
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
    if kind is not torch.optim.Optimizer
)


@pytest.mark.parametrize("variant", ["plain", "foreach", "fused"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_of_every_optimiser_of_torch(family, name, variant):
    parameters = [p for p in family.parameters() if p.dim() == 2]
    options = {"lr": 6000.0 if name == "LBFGS" else 0.3} | (
        {} if variant == "plain" else {variant: True}
    )
    try:
        optimizer = getattr(torch.optim, name)(parameters, **options)
    except (TypeError, RuntimeError) as error:
        pytest.skip(str(error))

    def step(model):
        give_gradients(parameters, sparse=name == "SparseAdam")
        optimizer.step(*[lambda: torch.zeros(())] if name == "LBFGS" else [])

    assert follows(family, step)


@pytest.mark.parametrize("name", [name.value for name in OptimizerNames])
def test_a_step_of_every_optimiser_of_the_trainer(family, name, tmp_path):
    args = TrainingArguments(
        tmp_path, optim=name, optim_target_modules=[".*mlp.*"], learning_rate=0.3, use_cpu=True
    )
    trainer = Trainer(family, args)
    try:
        optimizer = trainer.create_optimizer()
        give_gradients(family.parameters())
        optimizer.step()
    except Exception as error:  # whatever its package or its device says
        pytest.skip(f"does not run here: {error}")
    family.zero_grad()

    def step(model):
        give_gradients(model.parameters())
        optimizer.step()

    follows(family.eval(), step)


def moving_average(model):
    for parameter in model.parameters():
        parameter.data.lerp_(torch.randn_like(parameter), 0.5)


def added_to_data(model):
    for parameter in model.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))


def copied_into_data(model):
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn_like(parameter))


def assigned(model):
    state = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def doubled(model):
    added_to_data(model)
    model.to(torch.float64)


def there_and_back(model):
    added_to_data(model)
    model.to(torch.float64).to(torch.float32)


def quantised_in_place(model):
    for parameter in model.model.backbone.layers.parameters():
        parameter.data.mul_(3).round_().div_(3)


def rows_permuted(model):
    for name, parameter in model.model.backbone.layers.named_parameters():
        if "mlp" in name:
            parameter.data.copy_(parameter.data[torch.randperm(len(parameter))])


def head_permuted(model):
    weight = model.lm_head.weight
    weight.data.copy_(weight.data[torch.randperm(len(weight))])


def angles_scaled(model):
    model.model.backbone.rotary_emb.inv_freq.data.mul_(0.1)


@pytest.mark.parametrize(
    "change",
    [
        moving_average, added_to_data, copied_into_data, assigned, doubled, there_and_back,
        quantised_in_place, rows_permuted, head_permuted, angles_scaled,
    ],
)  # fmt: skip
def test_every_other_change(family, change):
    torch.manual_seed(0)
    assert follows(family, change)


def test_a_single_flipped_bit(family):
    asked = {"max_new_tokens": 3, "output_logits": True, "return_dict_in_generate": True}

    def logits():
        return torch.stack(
            family.relay_generate(IDS, relay=RELAY, fused_weights=True, **asked).logits
        )

    before = logits()
    family.model.backbone.layers[1].mlp.down_proj.weight.data.view(torch.int32)[3, 5] ^= 1 << 24
    after, right = logits(), torch.stack(family.generate(IDS, **asked).logits)
    assert (after - before).abs().max() > 1e-3
    assert (after - right).abs().max() < 1e-4


def test_half_precision_is_followed(family):
    texts(family)
    family.to(torch.bfloat16)
    texts(family)
    added_to_data(family)
    found, right = texts(family)[0], texts(family, fused=False)[0]
    assert torch.equal(found[:, : IDS.shape[1] + 1], right[:, : IDS.shape[1] + 1])


def test_an_adapter_merged_and_unmerged(family):
    peft = pytest.importorskip("peft")
    targets = ["q_proj", "v_proj", "down_proj"]
    wrapped = peft.get_peft_model(family, peft.LoraConfig(target_modules=targets, r=4))
    wrapped.eval()
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    inner = wrapped.base_model.model
    adapted = texts(inner)
    assert torch.equal(*adapted)
    for change in (wrapped.merge_adapter, wrapped.unmerge_adapter, wrapped.merge_adapter):
        change()
        assert torch.equal(*texts(inner))
    merged = wrapped.merge_and_unload()
    assert follows(merged, added_to_data)


def test_text_written_while_training_is_of_the_weights_of_its_step(family, tmp_path):
    found = []

    class Writer(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            model.eval()
            found.append(texts(model))
            model.train()

    data = [{"input_ids": IDS[0], "labels": IDS[0]} for _ in range(20)]
    args = TrainingArguments(
        tmp_path, max_steps=10, learning_rate=0.05, per_device_train_batch_size=2, use_cpu=True,
        report_to=[], save_strategy="no", disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    assert args.optim == "adamw_torch_fused"
    Trainer(family, args, train_dataset=data, callbacks=[Writer()]).train()
    assert len(found) == 10
    assert all(torch.equal(*pair) for pair in found)
    assert len({tuple(relayed[0].tolist()) for relayed, _ in found}) > 3


@torch.no_grad()
def test_layers_that_agree_while_their_weights_are_zero_are_found_out(family):
    """A layer whose outputs are zero at first hides arithmetic of its own."""
    for layer in family.model.backbone.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()

    class Louder(type(family.model.backbone.layers[1].mlp)):
        def forward(self, x):
            return 3 * super().forward(x)

    family.model.backbone.layers[1].mlp.__class__ = Louder
    assert follows(family, added_to_data)


@torch.no_grad()
def test_norms_with_arithmetic_of_their_own_are_found_out(family):
    class Shifted(type(family.model.backbone.norm)):
        def forward(self, hidden_states):
            return super().forward(hidden_states) + 1

    norm = copy.deepcopy(family.model.backbone.norm)
    assert FusedPasses().norm(norm) is not None
    norm.__class__ = Shifted
    assert FusedPasses().norm(norm) is None


# learned lengths


def learn(model):
    model.relay_generate(IDS, max_new_tokens=16, do_sample=False)
    return model.accelerator.draft_lengths


@pytest.mark.parametrize("change", [moving_average, assigned, there_and_back, quantised_in_place])
def test_learned_lengths_are_forgotten_with_the_weights(family, change):
    known = learn(family)
    assert known
    assert learn(family) is known
    change(family)
    assert learn(family) is not known


def test_the_stamp_sees_a_fused_step(family):
    before = weights_stamp(family)
    assert weights_stamp(family) == before
    optimizer = torch.optim.AdamW(family.parameters(), lr=1e-4, fused=True)
    give_gradients(family.parameters())
    optimizer.step()
    assert weights_stamp(family) != before


def test_frozen_weights_are_not_looked_at(family):
    known = learn(family)
    family.freeze_weights()
    moving_average(family)
    assert learn(family) is known  # a broken promise
    family.freeze_weights(False)
    assert learn(family) is not known


def test_training_ends_the_promise(family):
    family.freeze_weights()
    assert family.model.frozen
    family.eval()
    assert family.model.frozen
    family.train()
    assert not family.model.frozen
    with pytest.raises(ValueError, match="eval"):
        family.freeze_weights()
