"""FLOPs of a training step, counted without weights, equal those of a real forward and backward."""

import math
from typing import Any

import pytest
import torch
from backbones import MUST_WORK, tiny_config
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from reference import approximate_training_flops, tiny_family, without_kept_counts
from torch.utils.flop_counter import FlopCounterMode

from hf_familial import FamilialConfig, FamilialForCausalLM
from hf_familial.flops import (
    FlopCount,
    _fake_model,
    count_family,
    count_parameters,
    training,
    training_flops_per_token,
)
from hf_familial.flops.counting import CPU_ATTENTION
from hf_familial.training.tuning import train_exits_only, what_learns


EXITS, LENGTH = [1, 2, 4], 16
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "own heads": {"exit_head": "own"},
    "private layers": {"num_exit_layers": 1, "exit_norm": "shared"},
    "both": {"num_exit_layers": 2, "exit_head": "own"},
}


def config_of(model_type: str, **fields: Any) -> FamilialConfig:
    return FamilialConfig(text_config=tiny_config(model_type), exits=EXITS, **fields)


def family_of(config: FamilialConfig) -> Any:
    """A family with weights, with kernels of which torch knows the FLOPs."""
    for part in (config, config.text_config):
        part._attn_implementation = part._experts_implementation = "eager"
    return FamilialForCausalLM(config)


def real_flops(family: Any, fused: bool, batch: int = 2) -> float:
    """FLOPs per token that torch sees in one step on the CPU, every position having a target."""
    ids = torch.randint(8, 120, (batch, LENGTH))
    # torch does not know the product that adds to its output in place
    formulas: dict[Any, Any] = {torch.ops.aten.addmm_: lambda c, a, b, **_: 2 * a[0] * a[1] * b[1]}
    # nor that each channel of a grouped convolution sees the channels of its group alone
    formulas[torch.ops.aten.convolution_backward] = lambda grad, x, w, *args, **_: (
        sum(args[-1][:2]) * 2 * math.prod(grad) * math.prod(w[1:])
    )
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        # logits that are wanted go through the host's loss, others through the chunked one
        outputs = family.train()(
            input_ids=ids, labels=ids, shift_labels=ids, skip_logits=fused, output_exits=not fused
        )
        outputs.loss.backward()
    return counter.get_total_flops() / (batch * LENGTH)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2", "qwen3"])
def test_the_count_is_that_of_a_real_step(model_type: str, variant: str, fused: bool) -> None:
    family = family_of(config_of(model_type, **VARIANTS[variant]))
    counted = training_flops_per_token(family, LENGTH)
    assert counted == FlopCount(real_flops(family, fused), exact=True)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "phi"])
def test_the_count_of_other_hosts(model_type: str) -> None:
    family = family_of(config_of(model_type, num_exit_layers=1))
    assert training_flops_per_token(family, LENGTH).per_token == real_flops(family, fused=True)


@pytest.mark.parametrize("model_type", MUST_WORK)
def test_the_count_is_that_of_every_host(model_type: str) -> None:
    family = family_of(config_of(model_type, exit_head="own"))
    counted = training_flops_per_token(family, LENGTH)
    assert counted == FlopCount(real_flops(family, fused=False), exact=True)


TUNED = ["llama", "gpt2", "qwen3_moe"]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("model_type", TUNED)
def test_training_exits_only_leaves_the_backbone_forward(model_type: str, variant: str) -> None:
    family = family_of(config_of(model_type, **VARIANTS[variant]))
    train_exits_only(family)
    counted = training_flops_per_token(family, LENGTH, train="exits")
    assert counted == FlopCount(real_flops(family, fused=False), exact=True)
    # forward of all, and of the early exits at least what leads back to their norms
    assert counted.per_token < training_flops_per_token(family, LENGTH).per_token


@pytest.mark.parametrize("model_type", TUNED)
def test_lora_pays_for_adapters_and_for_the_way_back(model_type: str) -> None:
    family = family_of(config_of(model_type))
    lora = LoraConfig(r=4, target_modules="all-linear" if model_type == "gpt2" else ["q_proj"])
    counted = training_flops_per_token(family, LENGTH, train=lora)
    full = training_flops_per_token(family, LENGTH).per_token
    assert counted == FlopCount(real_flops(get_peft_model(family, lora), fused=False), exact=True)
    assert full / 3 < counted.per_token < full


@pytest.mark.parametrize("variant", ["own heads", "private layers"])
def test_lora_pays_for_exits_that_learn_whole(variant: str) -> None:
    family = family_of(config_of("llama", **VARIANTS[variant]))
    saved = family.exit_module_names()
    targets = r"model\.backbone\..*\.(q_proj|v_proj)"
    lora = LoraConfig(r=4, target_modules=targets, modules_to_save=saved, init_lora_weights="pissa")
    before = lora.to_dict()
    counted = training_flops_per_token(family, LENGTH, train=lora)
    assert lora.to_dict() == before
    lora.init_lora_weights = True
    tuned = get_peft_model(family, lora)
    assert counted == FlopCount(real_flops(tuned, fused=False), exact=True)
    assert what_learns(tuned) is lora
    without = LoraConfig(r=4, target_modules=targets)
    assert counted.per_token > training_flops_per_token(family.config, LENGTH, without).per_token


def test_what_learns_is_read_off_the_model() -> None:
    family = family_of(config_of("llama", num_exit_layers=1))
    assert what_learns(family) == "all"
    train_exits_only(family)
    assert what_learns(family) == "exits"
    family.model.exits[0].requires_grad_(False)
    assert what_learns(family) == "exits"
    family.get_output_embeddings().requires_grad_(True)
    assert what_learns(family) == "all"
    family.requires_grad_(False)
    assert what_learns(family) == "all"
    lora = LoraConfig(target_modules=["q_proj"])
    tuned = get_peft_model(family, lora)
    assert what_learns(tuned) is lora
    tuned.get_base_model().model.exits[0].requires_grad_(True)
    assert what_learns(tuned) == "all"
    family = family_of(config_of("llama"))
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    assert what_learns(get_peft_model(family, prompt)) == "all"


def test_what_learns_must_be_known_and_there() -> None:
    config = config_of("llama", exit_norm="shared")
    with pytest.raises(ValueError, match="`train` must be one of all, exits, or a .*'heads'"):
        training_flops_per_token(config, 8, train="heads")
    with pytest.raises(TypeError, match="got PromptTuningConfig"):
        training_flops_per_token(config, 8, train=PromptTuningConfig(num_virtual_tokens=2))
    with pytest.raises(ValueError, match="leaves nothing to learn"):
        training_flops_per_token(config, 8, train="exits")


def test_six_nd_shows_its_error() -> None:
    config = config_of("llama")
    exact = training_flops_per_token(config, LENGTH).per_token
    sizes = count_family(config)
    found = approximate_training_flops(config, 1e6, LENGTH)
    assert found.flops == 6e6 * sizes["non_embedding"]
    assert found.exact_flops == 1e6 * exact
    assert found.relative_error == pytest.approx(6 * sizes["non_embedding"] / exact - 1)
    # three heads of 128 x 32 beside 4 small layers
    assert -0.5 < found.relative_error < -0.2
    assert f"{found.relative_error:+.1%}" in str(found)
    total = approximate_training_flops(config, 1e6, LENGTH, convention="total")
    assert total.flops == 6e6 * sizes["total"]


def test_families_on_one_backbone_are_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    without_kept_counts(monkeypatch)
    for exits in ([4], [1, 4], [1, 2, 3, 4]):
        config = FamilialConfig(text_config=tiny_config("llama"), exits=exits)
        training_flops_per_token(config, 12)
    assert training._kept_counts.cache_info().currsize == 1


def test_the_dense_model_costs_less_than_a_family() -> None:
    sizes = [
        training_flops_per_token(
            FamilialConfig(text_config=tiny_config("llama"), exits=exits), LENGTH
        ).per_token
        for exits in ([4], [2, 4], [1, 2, 3, 4])
    ]
    head = 3 * 2 * 128 * 32
    assert [b - a for a, b in zip(sizes, sizes[1:], strict=False)] == [head, 2 * head]


def test_attention_costs_the_same_whatever_runs_it() -> None:
    family = tiny_family("llama", EXITS)
    assert family.config._attn_implementation == "sdpa"
    counted = training_flops_per_token(family, LENGTH).per_token
    assert family.config._attn_implementation == "sdpa"
    # of sdpa on a CPU only the forward pass is known: twice as much is missing
    attention = 4 * LENGTH * 4 * 8 * 4
    assert real_flops(family, fused=True) == counted - 3 * attention
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        family(input_ids=torch.zeros((1, LENGTH), dtype=torch.long), output_exits=True)
    assert counter.get_total_flops() / LENGTH == counted / 3


@pytest.mark.parametrize("model_type", ["jamba", "recurrent_gemma"])
def test_recurrent_hosts_are_extrapolated(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = FamilialConfig(text_config=tiny_config(model_type, 2), exits=[1, 2])
    quick = training_flops_per_token(config, 70)
    monkeypatch.setattr(_fake_model, "RECURRENT", frozenset())
    without_kept_counts(monkeypatch)
    assert training_flops_per_token(config, 70) == quick


@pytest.mark.parametrize("model_type", ["dbrx", "jetmoe"])
def test_a_host_that_looks_at_values_is_estimated(model_type: str) -> None:
    counted = training_flops_per_token(config_of(model_type), LENGTH)
    assert not counted.exact
    assert counted.per_token > 3 * 2 * len(EXITS) * 128 * 32


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "mixtral", "qwen3_moe"])
def test_the_estimate_is_the_count(
    model_type: str, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(model_type, **VARIANTS[variant])
    counted = training_flops_per_token(config, LENGTH)

    def fails(*args: Any) -> int:
        raise RuntimeError

    monkeypatch.setattr(training, "_run", fails)
    without_kept_counts(monkeypatch)
    estimated = training_flops_per_token(config, LENGTH)
    assert estimated == FlopCount(counted.per_token, exact=False)


def test_counting_leaves_no_trace() -> None:
    config = config_of("qwen3_moe", num_exit_layers=1)
    torch.manual_seed(0)
    before, state = config.to_json_string(use_diff=False), torch.get_rng_state()
    with torch.inference_mode(), torch.device("cpu"):
        first = training_flops_per_token(config, 24)
    assert torch.equal(torch.get_rng_state(), state)
    assert config.to_json_string(use_diff=False) == before
    assert config.text_config._attn_implementation != "eager"
    config.text_config.num_experts_per_tok = 1
    assert training_flops_per_token(config, 24).per_token < first.per_token


def test_what_is_no_family_is_refused() -> None:
    with pytest.raises(TypeError, match="got LlamaConfig"):
        training_flops_per_token(tiny_config("llama"), 8)
    with pytest.raises(ValueError, match="`seq_length` must be 1 or more, got 0"):
        training_flops_per_token(config_of("llama"), 0)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral"])
def test_parameters_of_a_family(model_type: str, variant: str) -> None:
    family = tiny_family(model_type, EXITS, **VARIANTS[variant])
    sizes = count_family(family)
    assert sizes == count_family(family.config)
    assert sizes["total"] == family.num_parameters()
    early = sum(p.numel() for p in family.model.exits.parameters())
    assert sizes["non_embedding"] == count_parameters(family, -1)["non_embedding"] + early
    idle = 0
    if model_type == "mixtral":
        experts = [p for n, p in family.named_parameters() if ".experts." in n]
        assert experts
        idle = sum(p.numel() for p in experts) // 2
    assert sizes["active"] == sizes["total"] - idle
