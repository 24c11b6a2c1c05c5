"""Every member of a family is the model it claims to be, over the whole zoo of hosts."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from backbones import MUST_WORK, tiny_config, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import (
    copy_of,
    endless,
    gradients,
    greedy,
    logits,
    names,
    stir,
    tap,
    tiny_family,
    token_ids,
    truncated_host,
)
from transformers import DynamicCache, EncoderDecoderCache, QuantizedCache, StaticCache
from transformers.cache_utils import Cache

from hf_familial import FamilialConfig, FamilialForCausalLM
from hf_familial.flops import member_parameters


EXITS = [1, 3, 4]
# hosts that differ in kind: attention, windows, convolutions, state spaces, experts, old names
KINDS = ("llama", "gemma2", "lfm2", "falcon_h1", "mixtral", "gpt2")
GREEDY = {"max_new_tokens": 6, "do_sample": False}

every_type = pytest.mark.parametrize("model_type", MUST_WORK)
every_kind = pytest.mark.parametrize("model_type", KINDS)
every_exit = pytest.mark.parametrize("exit_idx", [0, 1, 2])


def family_of(model_type, **fields):
    """A family of three that never ends a text early."""
    family = tiny_family(model_type, EXITS, **fields)
    endless(family)
    return family


def left_padded(ids):
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    mask[1, :1] = 0
    return mask


def caches_of(family):
    """Every kind of cache that a host of this kind can run on."""
    makers = {
        "dynamic": lambda: DynamicCache(config=family.config),
        "static": lambda: StaticCache(config=family.config, max_cache_len=32),
    }
    if family.config.text_config.model_type not in ("falcon_h1", "lfm2"):
        makers["dynamic-without-config"] = DynamicCache
    return makers


def difference(found, right):
    assert found.shape == right.shape
    return (found - right).abs().max().item()


# one exit is the dense model


@every_type
def test_one_exit_is_the_dense_host(model_type):
    host = tiny_model(model_type)
    family = FamilialForCausalLM.from_backbone(copy_of(host), exits=[4])
    ids = token_ids()
    labels = ids.masked_fill(torch.rand(ids.shape, generator=torch.manual_seed(3)) < 0.3, -100)
    outputs = []
    for model in (host, family):
        torch.manual_seed(4)  # of dropout
        outputs.append(model.train()(input_ids=ids, labels=labels))
    assert torch.equal(outputs[0].logits, outputs[1].logits)
    for output in outputs:
        output.loss.backward()
    assert difference(outputs[1].loss, outputs[0].loss) < 1e-6
    right = gradients(host)
    found = gradients(family)
    assert len(found) == len(right)
    inner = host.base_model_prefix
    for name, gradient in right.items():
        mine = name.replace(f"{inner}.", "model.backbone.", 1)
        mine = name if mine not in found else mine
        assert difference(found[mine], gradient) < 1e-6, name


@every_type
@pytest.mark.parametrize(
    ("private", "norm", "head"),
    [(0, "own", "shared"), (1, "own", "own"), (2, "shared", "shared")],
)
def test_every_member_is_the_truncated_host(model_type, private, norm, head):
    host = tiny_model(model_type)
    ids = token_ids()
    dense = logits(host, ids)
    family = FamilialForCausalLM.from_backbone(
        host, exits=EXITS, num_exit_layers=private, exit_norm=norm, exit_head=head
    )
    assert torch.equal(logits(family, ids), dense)
    stir(family)
    assert torch.equal(logits(family, ids), dense)
    with torch.no_grad():
        at_once = family(ids, output_exits=True, use_cache=False).exit_logits
    assert torch.equal(at_once[-1], dense)
    for k in range(2):
        right = logits(truncated_host(family, k), ids)
        assert difference(logits(family, ids, exit_idx=k), right) < 1e-5
        assert difference(at_once[k], right) < 1e-5


@every_type
def test_a_tap_is_what_the_hosts_layer_puts_out(model_type):
    host = tiny_model(model_type)
    ids = token_ids()
    taps = [tap(host, depth, ids) for depth in EXITS]
    family = stir(FamilialForCausalLM.from_backbone(host, exits=EXITS))
    with torch.no_grad():
        states = family.model(ids, output_exits=True, use_cache=False).exit_hidden_states
        final = host.get_submodule(names(host)[1])
        norms = [*(part.norm for part in family.model.exits), final]
        for state, norm, raw in zip(states, norms, taps, strict=True):
            assert difference(state, norm(raw)) < 1e-5


@pytest.mark.parametrize("norm", ["own", "shared"])
def test_own_modules_are_the_exits_alone(norm):
    family = family_of("llama", exit_norm=norm, exit_head="own", num_exit_layers=1)
    before = [logits(family, token_ids(), exit_idx=k) for k in range(3)]
    with torch.no_grad():
        for name, parameter in family.named_parameters():
            if name.startswith(("model.exits.0.", "exit_heads.0.")):
                parameter.add_(1.0)
    after = [logits(family, token_ids(), exit_idx=k) for k in range(3)]
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [False, True, True]


@given(st.sets(st.integers(1, 2)), st.integers(0, 2), st.sampled_from(["own", "shared"]))
@settings(max_examples=8)
def test_wherever_the_exits_stand(early, private, norm):
    exits = [*sorted(early), 3]
    fields = {"num_exit_layers": private, "exit_norm": norm, "exit_head": norm}
    family = tiny_family("gemma2", exits, depth=3, **fields)
    with torch.no_grad():
        at_once = family(token_ids(), output_exits=True).exit_logits
    for k, found in enumerate(at_once):
        right = logits(truncated_host(family, k), token_ids())
        assert difference(found, right) < 1e-5
        assert difference(logits(family, token_ids(), exit_idx=k), right) < 1e-5


# a member runs its own layers and no others


def layer_calls(family):
    """Counts the calls of every layer, the backbone's and the private ones."""
    calls = Counter()
    modules = dict(family.named_modules())
    for name, module in modules.items():
        if name.rpartition(".")[0] in {n for n in modules if n.endswith((".layers", ".h"))}:
            module.register_forward_pre_hook(lambda *_, name=name: calls.update([name]))
    return calls


def layers_of(family, exit_idx):
    inner = "h" if family.config.text_config.model_type == "gpt2" else "layers"
    own = [f"model.backbone.{inner}.{i}" for i in range(EXITS[exit_idx])]
    private = family.config.num_exit_layers if exit_idx < 2 else 0
    return own + [f"model.exits.{exit_idx}.layers.{j}" for j in range(private)]


@every_kind
@every_exit
@pytest.mark.parametrize("private", [0, 1])
def test_an_exit_runs_only_its_layers(model_type, exit_idx, private):
    family = family_of(model_type, num_exit_layers=private)
    calls, wanted = layer_calls(family), layers_of(family, exit_idx)
    family(token_ids(), exit_idx=exit_idx)
    assert calls == Counter(wanted)
    calls.clear()
    family(token_ids(), labels=token_ids(), exit_idx=exit_idx).loss.backward()
    assert calls == Counter(wanted)
    calls.clear()
    family.generate(token_ids(), exit_idx=exit_idx, **GREEDY)
    assert calls == Counter(dict.fromkeys(wanted, 6))


@pytest.mark.parametrize("private", [0, 2])
def test_all_exits_are_one_pass(private):
    family = family_of("llama", num_exit_layers=private)
    calls = layer_calls(family)
    family(token_ids(), labels=token_ids()).loss.backward()
    wanted = [*layers_of(family, 2), *layers_of(family, 0)[1:], *layers_of(family, 1)[3:]]
    assert calls == Counter(wanted)


def test_only_the_members_parameters_get_a_gradient():
    family = family_of("llama", num_exit_layers=1, exit_head="own")
    family(token_ids(), labels=token_ids(), exit_idx=1).loss.backward()
    wanted = {n for n, p in family.named_parameters() if p in set(member_parameters(family, 1))}
    assert set(gradients(family)) == wanted
    assert {n.split(".")[2] for n in wanted if n.startswith("model.exits.")} == {"1"}


# decoding on a cache


@every_type
def test_generate_is_greedy_decoding_of_the_member(model_type):
    family = family_of(model_type, num_exit_layers=1)
    ids = token_ids(3, 14)
    mask = left_padded(ids)
    for k in range(3):
        right = greedy(truncated_host(family, k), ids, 6, mask)
        for implementation in ("dynamic", "static"):
            found = family.generate(
                ids, attention_mask=mask, exit_idx=k, cache_implementation=implementation, **GREEDY
            )
            assert torch.equal(found, right), (k, implementation)


@every_kind
@pytest.mark.parametrize("private", [0, 1])
def test_cached_is_uncached(model_type, private):
    pieces = [9, 1, 1, 1, 8]  # a start past the windows, steps, several tokens at once
    family = family_of(model_type, num_exit_layers=private)
    ids = token_ids()
    with torch.no_grad():
        for make in caches_of(family).values():
            for k in range(3):
                cache = make()
                found = [
                    family(part, past_key_values=cache, use_cache=True, exit_idx=k).logits
                    for part in ids.split(pieces, dim=1)
                ]
                assert difference(torch.cat(found, 1), logits(family, ids, exit_idx=k)) < 1e-5
            cache = make()
            found = [
                family(part, past_key_values=cache, use_cache=True, output_exits=True).exit_logits
                for part in ids.split(pieces, dim=1)
            ]
            for k, parts in enumerate(zip(*found, strict=True)):
                assert difference(torch.cat(parts, 1), logits(family, ids, exit_idx=k)) < 1e-5


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "falcon_h1"])
@every_exit
def test_other_ways_to_decode_give_the_same_text(model_type, exit_idx):
    family = family_of(model_type, num_exit_layers=1)
    ids = token_ids(2, 12)
    right = greedy(truncated_host(family, exit_idx), ids, 6)
    scale = getattr(family.config.text_config, "embedding_multiplier", 1.0)
    embeds = scale * family.get_input_embeddings()(ids)

    def text(*args, **kwargs):
        return family.generate(*args, exit_idx=exit_idx, **{**GREEDY, **kwargs})

    assert torch.equal(text(ids), right)
    assert torch.equal(text(ids, use_cache=False), right)
    assert torch.equal(text(ids, prefill_chunk_size=5), right)
    assert torch.equal(text(ids, output_exits=True), right)
    assert torch.equal(text(inputs_embeds=embeds), right[:, 12:])
    started = text(ids, max_new_tokens=3, return_dict_in_generate=True)
    kept = {"past_key_values": started.past_key_values, "max_new_tokens": 3}
    assert torch.equal(text(started.sequences, **kept), right)


@every_kind
@every_exit
def test_beam_search_is_the_truncated_hosts(model_type, exit_idx):
    family = family_of(model_type, num_exit_layers=1, exit_head="own")
    host = endless(truncated_host(family, exit_idx))
    ids = token_ids(3, 14)
    beams = {"attention_mask": left_padded(ids), "num_beams": 3, **GREEDY}
    assert torch.equal(
        family.generate(ids, exit_idx=exit_idx, **beams), host.generate(ids, **beams)
    )


@pytest.mark.parametrize(
    "model_type",
    [
        "mamba2",
        "recurrent_gemma",
        "jamba",
        "mamba",
        "falcon_mamba",
    ],
)
def test_padded_texts_on_recurrent_hosts(model_type):
    host = endless(tiny_model(model_type))
    ids = token_ids(3, 14)
    inputs = {"attention_mask": left_padded(ids), **GREEDY}
    right = host.generate(ids, **inputs)
    family = FamilialForCausalLM.from_backbone(host, exits=EXITS)
    assert torch.equal(family.generate(ids, **inputs), right)


@pytest.mark.parametrize("model_type", ["llama", "falcon_h1"])
def test_the_default_exit_is_used(model_type):
    family = family_of(model_type, default_exit=1)
    ids = token_ids()
    assert torch.equal(logits(family, ids), logits(family, ids, exit_idx=1))
    assert torch.equal(family.generate(ids, **GREEDY), family.generate(ids, exit_idx=1, **GREEDY))
    family.config.default_exit = -3
    assert torch.equal(logits(family, ids), logits(family, ids, exit_idx=0))
    assert family(ids, labels=ids).exit_losses.shape == (3,)


def test_negative_exits_count_from_the_deepest():
    family = family_of("llama")
    for k in range(3):
        found = logits(family, token_ids(), exit_idx=k - 3)
        assert torch.equal(found, logits(family, token_ids(), exit_idx=k))


def test_logits_to_keep():
    family = family_of("llama")
    for k in range(3):
        every = logits(family, token_ids(), exit_idx=k)
        assert torch.equal(logits(family, token_ids(), exit_idx=k, logits_to_keep=3), every[:, -3:])


def test_sampling_repeats_with_its_seed():
    family = family_of("llama", num_exit_layers=1)
    texts = []
    for _ in range(2):
        torch.manual_seed(0)
        texts.append(family.generate(token_ids(), exit_idx=0, max_new_tokens=8, do_sample=True))
    assert torch.equal(*texts)


# caches that are not what they should be


@every_kind
@pytest.mark.parametrize("private", [0, 1])
@pytest.mark.parametrize("order", [(0, 2), (0, 1), (1, 2)], ids=str)
def test_a_ragged_cache_is_refused(model_type, private, order):
    family = family_of(model_type, num_exit_layers=private)
    cache = DynamicCache(config=family.config)
    family(token_ids(), past_key_values=cache, exit_idx=order[0])
    with pytest.raises(ValueError, match="same number of tokens.*one cache per exit"):
        family(token_ids(2, 1), past_key_values=cache, exit_idx=order[1])


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
@pytest.mark.parametrize("private", [0, 1])
def test_a_ragged_static_cache_is_refused(model_type, private):
    family = family_of(model_type, num_exit_layers=private)
    cache = StaticCache(config=family.config, max_cache_len=32)
    family(token_ids(), past_key_values=cache, exit_idx=0)
    with pytest.raises(ValueError, match="same number of tokens"):
        family(token_ids(2, 1), past_key_values=cache, exit_idx=2)


def test_a_ragged_cache_of_states_is_refused():
    family = family_of("mamba2")
    cache = DynamicCache(config=family.config)
    family(token_ids(), past_key_values=cache, exit_idx=0)
    with pytest.raises(ValueError, match="same number of tokens"):
        family(token_ids(2, 1), past_key_values=cache, exit_idx=2)


def test_a_cache_of_the_deepest_exit_serves_shallower_ones_until_it_is_ragged():
    family = family_of("llama")
    ids = token_ids()
    cache = DynamicCache(config=family.config)
    family(ids[:, :19], past_key_values=cache)
    found = family(ids[:, 19:], past_key_values=cache, exit_idx=0).logits
    assert difference(found, logits(family, ids, exit_idx=0)[:, -1:]) < 1e-5
    with pytest.raises(ValueError, match="same number of tokens"):
        family(ids[:, :1], past_key_values=cache)


@pytest.mark.parametrize("private", [0, 1])
@every_exit
@pytest.mark.parametrize("make", [DynamicCache, StaticCache], ids=["dynamic", "static"])
def test_a_cache_that_is_too_short_grows(private, exit_idx, make):
    family = family_of("llama", num_exit_layers=private)
    sizes = {"max_cache_len": 30} if make is StaticCache else {}
    cache = make(config=tiny_config("llama", 2), **sizes)
    ids = token_ids()
    found = [
        family(part, past_key_values=cache, exit_idx=exit_idx).logits
        for part in ids.split([12, 8], 1)
    ]
    assert difference(torch.cat(found, 1), logits(family, ids, exit_idx=exit_idx)) < 1e-5


@pytest.mark.parametrize(
    "make",
    [
        lambda config: QuantizedCache("fp8", config),
        lambda config: Cache(layers=DynamicCache(config=config).layers),
    ],
    ids=["quantized", "foreign"],
)
def test_a_cache_of_another_kind_cannot_hold_private_layers(make):
    family = family_of("llama", num_exit_layers=1)
    with pytest.raises(ValueError, match="`DynamicCache`.*with 4 layers. This exit needs 5"):
        family(token_ids(), past_key_values=make(family.config), exit_idx=0)
    family(token_ids(), past_key_values=make(family.config), exit_idx=2)
    plain = family_of("llama")
    plain(token_ids(), past_key_values=make(plain.config), exit_idx=0)


@pytest.mark.parametrize("private", [0, 1])
@pytest.mark.parametrize("kind", ["encoder-decoder", "tuple"])
def test_what_is_no_list_of_layers_is_refused_by_name(private, kind):
    family = family_of("llama", num_exit_layers=private)
    cache = {
        "encoder-decoder": EncoderDecoderCache(DynamicCache(), DynamicCache()),
        "tuple": ((torch.zeros(2, 2, 3, 8),) * 2,) * 4,
    }[kind]
    with pytest.raises((TypeError, ValueError), match="past_key_values"):
        family(token_ids(), past_key_values=cache)


def test_a_host_without_a_cache_says_so():
    family = family_of("xlstm")
    assert family(token_ids(), use_cache=True).past_key_values is None
    with pytest.raises(ValueError, match="`xlstm` cannot use .*past_key_values"):
        family(token_ids(), past_key_values=DynamicCache())


@pytest.mark.parametrize("exit_idx", [3, -4, 99])
def test_an_exit_out_of_range_names_the_range(exit_idx):
    family = family_of("llama")
    for call in (family, family.model, family.generate):
        with pytest.raises(IndexError, match=rf"-3 and 2, got {exit_idx}.*\[1, 3, 4\]"):
            call(token_ids(), exit_idx=exit_idx)
    for ask in (family.head, family.model.member_view):
        with pytest.raises(IndexError, match="must be between"):
            ask(exit_idx)


@pytest.mark.parametrize("exit_idx", ["0", 1.0, True, [0]], ids=repr)
def test_an_exit_that_is_no_integer(exit_idx):
    family = family_of("llama")
    for call in (family, family.model, family.generate):
        with pytest.raises(TypeError, match="`exit_idx` must be an integer"):
            call(token_ids(), exit_idx=exit_idx)


def test_a_misspelt_argument_of_generate_is_refused():
    with pytest.raises(ValueError, match="exit_index"):
        family_of("llama").generate(token_ids(), exit_index=0, **GREEDY)


@pytest.mark.parametrize(
    ("private", "labels"),
    [(0, None), (1, None), (0, token_ids()), (1, token_ids())],
    ids=["plain", "private", "labels", "private-labels"],
)
def test_no_input_is_refused(private, labels):
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        family_of("llama", num_exit_layers=private)(labels=labels)


# what else a forward pass returns

WANTED = {
    "states": {"output_hidden_states": True},
    "some-states": {"output_hidden_states": [0, 1]},
    "last-state": {"output_hidden_states": [-1]},
    "one-state": {"output_hidden_states": 1},
    "one-state-from-the-end": {"output_hidden_states": -2},
    "attentions": {"output_attentions": True},
    "both": {"output_hidden_states": True, "output_attentions": True},
}


@pytest.fixture(scope="module")
def eager(tmp_path_factory):
    """A family whose attention can be looked at, by (type, number of private layers)."""
    made = {}

    def get(model_type, private):
        key = (model_type, private)
        if key not in made:
            folder = tmp_path_factory.mktemp("eager")
            family_of(model_type, num_exit_layers=private).save_pretrained(folder)
            family = FamilialForCausalLM.from_pretrained(folder, attn_implementation="eager")
            hosts = [truncated_host(family, k) for k in range(3)]
            for host in hosts:
                host.set_attn_implementation("eager")
            made[key] = family, hosts
        return made[key]

    return get


def assert_same_states(found, right):
    for name in ("hidden_states", "attentions"):
        mine, theirs = getattr(found, name), getattr(right, name)
        assert (mine is None) == (theirs is None)
        if theirs is not None:
            assert len(mine) == len(theirs)
            for a, b in zip(mine, theirs, strict=True):
                assert (a is None) == (b is None)
                assert b is None or difference(a, b) < 1e-5


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "falcon_h1"])
@pytest.mark.parametrize("private", [0, 1])
@pytest.mark.parametrize("wanted", WANTED.values(), ids=WANTED)
def test_states_and_attentions_are_the_members(eager, model_type, private, wanted):
    family, hosts = eager(model_type, private)
    ids = token_ids()
    with torch.no_grad():
        for k, host in enumerate(hosts):
            right = host(ids, use_cache=False, **wanted)
            found = family(ids, use_cache=False, exit_idx=k, **wanted)
            assert_same_states(found, right)
            assert difference(found.logits, right.logits) < 1e-5
            assert_same_states(family(ids, exit_idx=k, labels=ids, **wanted), right)
        for extra in ({"labels": ids}, {"output_exits": True}):
            assert_same_states(family(ids, **extra, **wanted), right)
        nothing = family(ids, labels=ids)
    assert nothing.hidden_states is None
    assert nothing.attentions is None


def test_the_config_can_ask_for_states(eager):
    family, _ = eager("llama", 1)
    family.config.output_hidden_states = True
    try:
        assert len(family(token_ids(), exit_idx=0).hidden_states) == 3
        assert len(family(token_ids(), labels=token_ids()).hidden_states) == 5
    finally:
        family.config.output_hidden_states = False
    assert family(token_ids(), exit_idx=0).hidden_states is None


@pytest.mark.parametrize("private", [0, 1])
def test_tuples(private):
    family, ids = family_of("llama", num_exit_layers=private), token_ids()
    for extra in ({"exit_idx": 0}, {"labels": ids}, {"labels": ids, "output_exits": True}):
        right = family(ids, **extra)
        found = family(ids, return_dict=False, **extra)
        assert isinstance(found, tuple)
        assert len(found) == len(right.to_tuple())
        assert torch.equal(found[0], right[0])
    assert isinstance(family.model(ids, return_dict=False), tuple)


# what a family is made of


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_a_family_drawn_at_random_is_initialised_like_its_host(model_type):
    torch.manual_seed(0)
    config = FamilialConfig(
        text_config=tiny_config(model_type, initializer_range=0.02, hidden_size=64),
        exits=EXITS,
        num_exit_layers=1,
        exit_head="own",
    )
    family = FamilialForCausalLM(config)
    for name, parameter in family.named_parameters():
        if parameter.ndim > 1:
            assert 0.01 < parameter.std().item() < 0.03, name
        elif "norm" in name:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
    own = [*family.model.exits[0].layers.parameters(), *family.exit_heads[0].parameters()]
    copied = [*family.model.backbone.layers[1].parameters(), *family.lm_head.parameters()]
    for a, b in zip(own, copied, strict=True):
        assert a.ndim == 1 or not torch.equal(a, b)


@every_kind
def test_running_members_leaves_the_family_as_it_was(model_type):
    family = family_of(model_type, num_exit_layers=1)
    text_config = family.config.text_config
    before = {n: p.clone() for n, p in family.state_dict().items()}
    fields, modules = text_config.to_dict(), [n for n, _ in family.named_modules()]
    for k in range(3):
        family(token_ids(), exit_idx=k, output_hidden_states=True)
        family.generate(token_ids(), exit_idx=k, **GREEDY)
    assert family.config.text_config is text_config
    assert text_config.to_dict() == fields
    assert [n for n, _ in family.named_modules()] == modules
    assert family.model.backbone.config.num_hidden_layers == 4
    for name, weight in family.state_dict().items():
        assert torch.equal(weight, before[name])


def test_threads_do_not_disturb_each_other():
    family, ids = family_of("llama", num_exit_layers=1), token_ids()
    right = [logits(family, ids, exit_idx=k) for k in range(3)]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda k: logits(family, ids, exit_idx=k), [0, 1, 2] * 8))
    assert all(torch.equal(logit, right[i % 3]) for i, logit in enumerate(found))
