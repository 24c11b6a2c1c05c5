"""A family generates as its host does: the host's traits, hooks and limits, at every exit."""

import copy
from functools import partial

import pytest
import torch
from backbones import tiny_config, tiny_model
from reference import copy_of, endless, greedy, tiny_family, token_ids, truncated_host
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_familial import (
    FamilialConfig,
    FamilialForCausalLM,
    FixedExit,
    RelayCache,
    SpeculativeRelay,
)
from hf_familial.handoff.device import DeviceSide
from hf_familial.models import backbone_verification
from hf_familial.models.backbone_verification import KNOWN_HOOKS, VERIFIED, check_hooks
from hf_familial.models.familial.backbones import TRAITS
from hf_familial.models.familial.relay import check_healing


EXITS = [1, 3, 4]
GREEDY = {"max_new_tokens": 8, "do_sample": False}
BASES = {b for cls in (PreTrainedModel, GenerationMixin) for b in cls.__mro__} - {object}

# Attributes of transformers that hosts set and a family does not copy -> why it need not.
OWN = {
    **dict.fromkeys(
        (
            "_keep_in_fp32_modules",
            "_keep_in_fp32_modules_strict",
            "_keys_to_ignore_on_load_missing",
            "_keys_to_ignore_on_load_unexpected",
            "_no_split_modules",
            "_skip_keys_device_placement",
        ),
        "`post_init` collects them from the backbone, a module of the family",
    ),
    **dict.fromkeys(
        ("_tp_plan", "_pp_plan", "_fsdp_plan"),
        "those of the backbone are collected likewise; the family has a head of its own name",
    ),
    "_tied_weights_keys": "made anew for the family's names",
    "_can_record_outputs": "the backbone captures its own outputs",
    "_input_embed_layer": "`get_input_embeddings` asks the backbone",
    "_version": "of no use: nothing reads it",
    "base_model_prefix": "the family's own attribute",
    "config_class": "the family's own config",
    "input_modalities": "a family reads text",
    "main_input_name": "`input_ids` in every decoder",
    **dict.fromkeys(
        (
            "forward",
            "get_input_embeddings",
            "set_input_embeddings",
            "get_output_embeddings",
            "set_output_embeddings",
        ),
        "the family has its own, around the backbone's",
    ),
    "_init_weights": "the family calls the backbone's",
    "resize_token_embeddings": "the family has its own; per-layer embeddings are the backbone's",
}


def host_classes(model_type):
    config = CONFIG_MAPPING[model_type]
    return MODEL_FOR_CAUSAL_LM_MAPPING[config], MODEL_MAPPING[config]


def family_of(model_type, **fields):
    return endless(tiny_family(model_type, EXITS, **fields))


# what the host's class says of itself


def test_every_attribute_that_a_host_sets_is_taken_over_or_explained():
    known = {name for base in BASES for name in vars(base) if not name.startswith("__")}
    found = {}
    for model_type in sorted(VERIFIED):
        for cls in {base for host in host_classes(model_type) for base in host.__mro__} - BASES:
            found |= dict.fromkeys(known & vars(cls).keys(), cls.__name__)
    explained = {*TRAITS, *KNOWN_HOOKS, *OWN}
    assert {name: where for name, where in found.items() if name not in explained} == {}


@pytest.mark.parametrize("name", sorted(TRAITS))
def test_traits_are_asked_of_the_family_by_transformers_names(name):
    where = (PreTrainedModel, GenerationMixin, FamilialForCausalLM)
    assert any(hasattr(cls, name) for cls in where) or name == "_supported_generation_modes"


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(VERIFIED))
def test_a_family_has_its_hosts_traits(model_type):
    config = FamilialConfig(text_config=tiny_config(model_type))
    with torch.device("meta"):
        family = FamilialForCausalLM(config)
        host = MODEL_FOR_CAUSAL_LM_MAPPING[type(config.text_config)](tiny_config(model_type))
    check_traits(family, host)


@pytest.mark.parametrize("model_type", ["llama", "gpt_oss", "jamba", "jetmoe", "bloom", "zaya"])
def test_a_family_has_its_hosts_traits_where_hosts_differ(model_type):
    host = tiny_model(model_type)
    check_traits(tiny_family(model_type, [4]), host)
    check_traits(copy_of(FamilialForCausalLM.from_backbone(host, exits=[4])), host)


def check_traits(family, host):
    for part in (family, family.model):
        assert {n: _value(part, n) for n in TRAITS} == {n: _value(host, n) for n in TRAITS}
    for name in ("_attn_implementation", "_experts_implementation"):
        of = (host.config, family.config, family.config.text_config)
        assert len({getattr(config, name) for config in of}) == 1, name


def _value(model, name):
    value = getattr(model, name, None)
    return value() if callable(value) else value


def test_an_attention_that_the_host_lacks_is_refused_and_nothing_is_changed():
    family = tiny_family("gpt_oss", EXITS)
    with pytest.raises(ValueError, match="does not support"):
        family.set_attn_implementation("sdpa")
    assert family.config._attn_implementation == "eager"


def test_experts_kernels_are_chosen_as_for_the_host(tmp_path):
    tiny_family("qwen3_moe", EXITS).save_pretrained(tmp_path)
    family = FamilialForCausalLM.from_pretrained(tmp_path, experts_implementation="grouped_mm")
    assert family.config.text_config._experts_implementation == "grouped_mm"


@pytest.mark.parametrize(
    "model_type", ["qwen3_next", "jamba", "kimi_linear", "zaya", "falcon_h1", "mamba2"]
)
def test_hosts_that_cannot_take_tokens_back_refuse_assisted_generation(model_type):
    family = family_of(model_type)
    with pytest.raises(ValueError, match="not supported with stateful models"):
        family.generate(token_ids(1), exit_idx=0, prompt_lookup_num_tokens=3, **GREEDY)


# assisted generation at an exit


@pytest.mark.parametrize("private", [0, 1])
@pytest.mark.parametrize(
    "model_type",
    ["llama", "gpt2", "mistral", "gemma2", "gemma3_text", "gpt_oss", "olmo3", "qwen2", "lfm2"],
)
def test_prompt_lookup_gives_the_text_of_every_exit(model_type, private):
    family = family_of(model_type, num_exit_layers=private)
    ids = token_ids(1, 6).repeat(1, 3)  # past the windows
    for k in range(3):
        right = family.generate(ids, exit_idx=k, **GREEDY)
        assert torch.equal(right, greedy(truncated_host(family, k), ids, 8))
        asked = {"exit_idx": k, "prompt_lookup_num_tokens": 3, **GREEDY}
        assert torch.equal(family.generate(ids, **asked), right)
        cache = DynamicCache(config=family.config)
        assert torch.equal(family.generate(ids, past_key_values=cache, **asked), right)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(VERIFIED))
def test_prompt_lookup_gives_the_text_of_an_exit_or_is_refused(model_type):
    family = endless(tiny_family(model_type, [2, 4]))
    ids = token_ids(1, 6).repeat(1, 3)
    for k in range(2):
        try:
            found = family.generate(ids, exit_idx=k, prompt_lookup_num_tokens=3, **GREEDY)
        except ValueError as error:
            assert "assisted" in str(error)  # noqa: PT017
        else:
            assert torch.equal(found, family.generate(ids, exit_idx=k, **GREEDY))


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma3_text"])
def test_members_and_families_assist_each_other(model_type):
    family, ids = family_of(model_type), token_ids(1, 18)
    member = endless(truncated_host(family, 0))
    shallow = copy_of(family)
    shallow.config.default_exit = 0
    right = family.generate(ids, exit_idx=1, **GREEDY)
    config = GenerationConfig(exit_idx=1, **GREEDY)
    for assistant in (member, shallow, family):
        asked = {"exit_idx": 1, **GREEDY}
        assert torch.equal(family.generate(ids, assistant_model=assistant, **asked), right)
        found = family.generate(ids, generation_config=config, assistant_model=assistant)
        assert torch.equal(found, right)
    right = member.generate(ids, **GREEDY)
    assert torch.equal(member.generate(ids, assistant_model=shallow, **GREEDY), right)


def test_a_cache_of_an_early_exit_is_still_refused_deeper():
    family, ids = family_of("gemma2"), token_ids(1, 18)
    asked = {"prompt_lookup_num_tokens": 3, "return_dict_in_generate": True, **GREEDY}
    output = family.generate(ids, exit_idx=0, **asked)
    going_on = {"past_key_values": output.past_key_values, "max_new_tokens": 3}
    found = family.generate(output.sequences, exit_idx=0, do_sample=False, **going_on)
    right = family.generate(output.sequences, exit_idx=0, max_new_tokens=3, do_sample=False)
    assert torch.equal(found, right)
    with pytest.raises(ValueError, match="same number of tokens"):
        family.generate(found, exit_idx=-1, **going_on)


# hooks that hosts override


@pytest.mark.parametrize("model_type", sorted(VERIFIED))
def test_no_host_has_a_hook_that_a_family_does_not_run(model_type):
    check_hooks(CONFIG_MAPPING[model_type].__new__(CONFIG_MAPPING[model_type]))


def test_a_host_that_generates_in_its_own_way_is_refused(monkeypatch):
    class Odd(LlamaForCausalLM):
        def _update_model_kwargs_for_generation(self, *args, **kwargs):
            return {}

    monkeypatch.setattr(backbone_verification, "host_class", lambda config: Odd)
    with pytest.raises(ValueError, match="overrides `_update_model_kwargs_for_generation`"):
        tiny_family("llama", EXITS)


def longrope(model_type, limit):
    """Fields of a config whose position angles change after so many tokens."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [1.5, 2.0, 3.0, 4.0], "factor": 4.0}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, **factors}
    rope["original_max_position_embeddings"] = limit
    if model_type == "phimoe":
        rope |= {"short_mscale": 1.1, "long_mscale": 1.3}
    of_config = {"original_max_position_embeddings": limit} if "phi" in model_type else {}
    return {"rope_parameters": rope, **of_config}


def dynamic(limit):
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    return {"rope_parameters": rope, "max_position_embeddings": limit}


def family_with(host):
    family = endless(FamilialForCausalLM.from_backbone(copy.deepcopy(host), exits=EXITS).eval())
    endless(host)
    return family


@pytest.mark.parametrize("model_type", ["phi3", "phimoe", "phi4_multimodal", "llama", "mistral"])
@pytest.mark.parametrize(
    "way",
    [{}, {"num_beams": 3}, {"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 3}],
    ids=["greedy", "beams", "static", "assisted"],
)
def test_text_past_the_length_at_which_angles_change_is_the_hosts(model_type, way):
    fields = longrope(model_type, 20)
    if "prompt_lookup_num_tokens" in way and "phi" in model_type:
        fields["sliding_window"] = None  # the host's new cache cannot be cropped past its window
    host = tiny_model(model_type, **fields)
    family, ids = family_with(host), token_ids(1 if "prompt_lookup_num_tokens" in way else 3, 16)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    asked = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, **way}
    for k, member in enumerate((truncated_host(family, 0), truncated_host(family, 1), host)):
        right = endless(member).generate(ids, **asked)
        assert torch.equal(family.generate(ids, exit_idx=k, **asked), right)


@pytest.mark.parametrize(
    "model_type",
    ["bamba", "falcon_h1", "nemotron_h", "zamba", "zamba2", "mamba", "mamba2", "falcon_mamba"]
    + ["ctrl", "openai-gpt", "bloom", "doge", "zaya"],
)
def test_hosts_with_hooks_of_their_own_write_the_same_text_in_a_family(model_type):
    host = tiny_model(model_type)
    family, ids = family_with(host), token_ids(3, 14)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    ways = [{}, {"num_beams": 2}, {"use_cache": False}]
    if DynamicCache(config=host.config).layers and model_type in ("bloom", "doge", "falcon_h1"):
        ways.append({"cache_implementation": "static"})
    for way in ways:
        asked = {"attention_mask": mask, **GREEDY, **way}
        assert torch.equal(family.generate(ids, **asked), host.generate(ids, **asked)), way


# relays and angles that change with the length of the text


ANGLES = {
    "longrope": ("llama", longrope("llama", 20)),
    "dropped": ("phi3", longrope("phi3", 20)),
    "dynamic": ("llama", dynamic(20)),
    "by-type": (
        "gemma3_text",
        {
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": longrope("llama", 20)["rope_parameters"],
            }
        },
    ),
}


@pytest.mark.parametrize("angles", ANGLES)
def test_a_relay_is_exact_up_to_the_length_at_which_angles_change_and_refused_past_it(angles):
    model_type, fields = ANGLES[angles]
    family, ids = family_with(tiny_model(model_type, **fields)), token_ids(2, 14)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    for relay in (SpeculativeRelay(0, draft_length=5), FixedExit(-1)):
        asked = {"attention_mask": mask, "max_new_tokens": 7, "do_sample": False}
        found = family.relay_generate(ids, relay=relay, **asked)
        assert torch.equal(found, family.generate(ids, **asked))
        asked["max_new_tokens"] = 8
        with pytest.raises(ValueError, match="cannot cross 20"):
            family.relay_generate(ids, relay=relay, **asked)


def test_a_relay_of_a_prompt_past_that_length_is_exact():
    family, ids = family_with(tiny_model("phi3", **longrope("phi3", 12))), token_ids(2, 14)
    right = family.generate(ids, **GREEDY)
    assert torch.equal(family.relay_generate(ids, relay=SpeculativeRelay(0), **GREEDY), right)


def test_a_relay_cache_is_not_fed_past_that_length():
    family, ids = family_with(tiny_model("llama", **longrope("llama", 20))), token_ids(1, 30)
    cache = RelayCache(family, (0, -1))
    cache.feed(ids[:, :16])
    cache.feed(ids[:, 16:20])
    with pytest.raises(ValueError, match="cannot cross 20"):
        cache.feed(ids[:, 20:21])


def test_the_device_of_a_handover_stops_at_that_length():
    family, ids = family_with(tiny_model("llama", **longrope("llama", 20))), token_ids(1, 16)
    text = DeviceSide(family, depth=1).start(ids)
    right = family.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(text.answer(4), right)
    with pytest.raises(ValueError, match="cannot cross 20"):
        text.answer(2)


# every entry that takes the name of an exit


def test_a_generation_config_names_an_exit():
    family, ids = family_of("llama"), token_ids(1)
    config = GenerationConfig(exit_idx=0, **GREEDY)
    right = [family.generate(ids, exit_idx=k, **GREEDY) for k in range(3)]
    assert torch.equal(family.generate(ids, generation_config=config), right[0])
    assert torch.equal(family.generate(ids, generation_config=config, exit_idx=1), right[1])
    family.generation_config.exit_idx = 0
    assert torch.equal(family.generate(ids, **GREEDY), right[0])
    assert torch.equal(family.generate(ids, exit_idx=2, **GREEDY), right[2])
    with pytest.raises(IndexError, match="must be between"):
        family.generate(ids, exit_idx=3, **GREEDY)


def test_batches_of_the_host_run_the_default_exit_and_refuse_another():
    family, prompt = family_of("llama"), token_ids(1)[0].tolist()
    config = GenerationConfig(eos_token_id=-1, **GREEDY)
    named = GenerationConfig(exit_idx=0, eos_token_id=-1, **GREEDY)
    ids = torch.tensor([prompt])
    for refused in (
        lambda: family.generate_batch([prompt], generation_config=config, exit_idx=0),
        lambda: family.generate_batch([prompt], generation_config=named),
        lambda: family.init_continuous_batching(named),
        lambda: family.continuous_batching_context_manager(named).__enter__(),
        lambda: family.generate(ids, cache_implementation="paged", exit_idx=0),
        lambda: family.generate(ids, cache_implementation="paged", generation_config=named),
    ):
        with pytest.raises(ValueError, match=r"Set `model.config.default_exit = 0`"):
            refused()
    with pytest.raises(ValueError, match="Call `relay_generate`"):
        family.generate_batch([prompt], relay=SpeculativeRelay())


@pytest.mark.slow
def test_batches_of_the_host_write_the_text_of_the_default_exit():
    family = family_with(tiny_model("llama", max_position_embeddings=2048))
    ids = token_ids(1, 600)  # blocks are shared from 256 tokens on
    config = GenerationConfig(eos_token_id=-1, **GREEDY)

    # by default the cache takes most of the machine's memory
    small = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=1024)

    def text(**kwargs):
        kwargs = {"generation_config": config, "continuous_batching_config": small, **kwargs}
        found = family.generate_batch(ids.tolist(), **kwargs)
        return [output.generated_tokens for output in found.values()]

    for k in (0, -1):
        family.config.default_exit = k
        right = family.generate(ids, **GREEDY)[:, 600:].tolist()
        assert text() == right
        assert text(exit_idx=k, persistent_manager=True) == right
        family.config.default_exit = 1
        with pytest.raises(ValueError, match="destroy_cached_continuous_batching_manager"):
            text()
        family.destroy_cached_continuous_batching_manager()


def test_a_prompt_is_healed_by_the_exit_that_goes_on():
    family = family_of("llama")
    with pytest.raises(ValueError, match="`token_healing` would run exit -1"):
        family.generate(token_ids(1), exit_idx=0, token_healing=True, **GREEDY)
    config = GenerationConfig(token_healing=True, **GREEDY)
    check_healing(family.config, config, exit_idx=2)
    with pytest.raises(ValueError, match=r"Set `model.config.default_exit = 1`"):
        check_healing(family.config, config, exit_idx=1)


# --- hosts without a cache


@pytest.mark.parametrize("model_type", ["minimax", "openai-gpt"])
def test_a_family_without_a_cache_runs_the_whole_text_at_every_step(model_type):
    """Asked for a cache it has none to use; embeddings, which need one, are refused."""
    family, ids = endless(tiny_family(model_type, [2, 4])), token_ids(2, 7)
    asked = {"max_new_tokens": 6, "do_sample": False}
    for exit_idx in (0, 1):
        right = greedy(partial(family, exit_idx=exit_idx), ids, 6)
        config = GenerationConfig(use_cache=True, pad_token_id=0, **asked)
        for more in ({}, {"use_cache": True}, {"use_cache": False}):
            assert torch.equal(family.generate(ids, exit_idx=exit_idx, **asked, **more), right)
        assert torch.equal(family.generate(ids, config, exit_idx=exit_idx), right)
    embeds = family.get_input_embeddings()(ids).detach()
    with pytest.raises(ValueError, match="`inputs_embeds` needs a cache.*Pass `input_ids`"):
        family.generate(inputs_embeds=embeds, **asked)
