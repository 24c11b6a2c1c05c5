"""Fused passes are the host's, or there is none; a growing cache layer is the host's too."""

import copy
import pickle

import pytest
import torch
from backbones import MUST_WORK, tiny_config, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

from hf_familial.decoding._fused import FusedPasses
from hf_familial.decoding._fused_pass import causal_mask
from hf_familial.decoding._growing_cache import ROOM, GrowingLayer, growing
from hf_familial.models.familial.backbones import LogitTransform
from hf_familial.models.familial.segments import HostDecoder, Segment, grow_cache


FULL = {"layer_types": ["full_attention"] * 4}
# shapes that a fused pass must take: grouped heads, one head each, biases, head norms, no rotation
TAKEN = {
    "llama": ("llama", {}),
    "every head its own keys": ("llama", {"num_key_value_heads": 4}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "scaled rotation": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    ),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", FULL),
    "qwen3": ("qwen3", FULL),
    "smollm3": ("smollm3", FULL | {"no_rope_layers": [1, 0, 1, 0]}),
}
taken = pytest.mark.parametrize(("model_type", "fields"), TAKEN.values(), ids=TAKEN)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


class Host:
    """A tiny host, a growing cache and the fused passes of its segments."""

    def __init__(self, model_type="llama", dtype=torch.float32, **fields):
        self.model = tiny_model(model_type, **fields).to(dtype)
        self.backbone = self.model.base_model
        self.decoder = HostDecoder(self.backbone)
        self.fused = FusedPasses()
        self.cache = growing(DynamicCache(config=self.backbone.config))

    @property
    def layers(self):
        return self.decoder.layers

    def segment(self, start=0, stop=4):
        return Segment(self.layers[start:stop], start, None, range(start, stop))

    def runner(self, start=0, stop=4, cache=None):
        segment = self.segment(start, stop)
        layers = (self.cache if cache is None else cache).layers[start:stop]
        return self.fused.runner(self.decoder, segment, layers)

    def host(self, taps, start=0, stop=4, cache=None, first=0):
        """The host's own pass over taps; without a cache, over all positions at once."""
        positions = torch.arange(first, first + taps.shape[1]).expand(taps.shape[:2])
        return self.decoder.run(
            self.segment(start, stop),
            cache,
            inputs_embeds=taps,
            position_ids=positions,
            use_cache=cache is not None,
        ).last_hidden_state

    def embeddings(self, batch=1, count=20, seed=0):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, 128, (batch, count), generator=generator)
        return self.backbone.get_input_embeddings()(ids)

    def step(self, past=6):
        """Right and found taps of one more token after a prompt of the host's, full depth."""
        taps, cache = self.embeddings(), growing(DynamicCache(config=self.backbone.config))
        self.host(taps[:, :past], cache=cache)
        runner = self.runner(cache=cache)
        right = self.host(taps)[:, past : past + 1]
        return right, runner(taps[:, past : past + 1], cache.layers)


def worst(found, right):
    """Largest difference, relative to the largest value."""
    assert found.shape == right.shape
    return ((found - right).abs().max() / right.abs().max()).item()


# the pass


@taken
@pytest.mark.parametrize("batch", [1, 3])
def test_segments_in_chunks_are_one_whole_forward(model_type, fields, batch):
    host = Host(model_type, **fields)
    taps = host.embeddings(batch)
    right = host.host(taps)
    host.host(taps[:, :7], cache=host.cache)
    low, high = host.runner(0, 2), host.runner(2, 4)
    found, middle, start = [], [], 7
    for count in (1, 1, 2, 3, 1, 5):
        middle.append(low(taps[:, start : start + count], host.cache.layers[:2]))
        start += count
        if count != 2:  # two chunks wait, then go on together
            found.append(high(torch.cat(middle, 1), host.cache.layers[2:]))
            middle = []
    assert start == 20
    assert worst(torch.cat(found, 1), right[:, 7:]) <= 1e-5
    assert {layer.get_seq_length() for layer in host.cache.layers} == {20}


@taken
def test_what_was_cropped_leaves_no_trace(model_type, fields):
    host = Host(model_type, **fields)
    taps, wrong = host.embeddings(), host.embeddings(seed=1)
    host.host(taps[:, :5], cache=host.cache)
    runner, found = host.runner(), []
    for start in range(5, 17, 3):
        runner(wrong[:, :4], host.cache.layers)
        host.cache.crop(-4)
        found.append(runner(taps[:, start : start + 3], host.cache.layers))
    assert worst(torch.cat(found, 1), host.host(taps)[:, 5:17]) <= 1e-5


def test_from_an_empty_cache():
    host = Host()
    taps = host.embeddings(2)
    assert worst(host.runner()(taps, host.cache.layers), host.host(taps)) <= 1e-5


def test_positions_may_be_given():
    host = Host()
    taps = host.embeddings(count=9)
    positions = torch.arange(300, 309)[None]
    found = [
        host.runner()(taps[:, a:b], host.cache.layers, positions[:, a:b])
        for a, b in ((0, 4), (4, 5), (5, 9))
    ]
    assert worst(torch.cat(found, 1), host.host(taps, first=300)) <= 1e-5


def test_the_table_of_angles_grows_with_the_text():
    host = Host(max_position_embeddings=2048)
    taps = host.embeddings(count=600)
    host.host(taps[:, :590], cache=host.cache)
    runner = host.runner()
    found = [runner(taps[:, i : i + 1], host.cache.layers) for i in range(590, 600)]
    assert worst(torch.cat(found, 1), host.host(taps)[:, 590:]) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_differs_by_rounding_only(dtype):
    host = Host(dtype=dtype)
    full = Host()
    right = full.host(full.embeddings())
    host.host(host.embeddings()[:, :8], cache=host.cache)
    runner, taps, found = host.runner(), host.embeddings(), []
    for start, stop in ((8, 9), (9, 12), (12, 20)):
        found.append(runner(taps[:, start:stop], host.cache.layers))
    ours, hosts = torch.cat(found, 1), host.host(taps)[:, 8:]
    assert ours.dtype is dtype
    # as far from the exact result as the host's own rounding leads
    right = right[:, 8:]
    assert worst(ours.float(), right) <= 1.5 * worst(hosts.float(), right) + 1e-3


@pytest.mark.parametrize("built", [True, False])
def test_inference_mode_may_come_and_go(built):
    host = Host()
    taps, cache = host.embeddings(), host.cache
    with torch.inference_mode(built), torch.no_grad():
        runner = host.runner()
        norm, head = host.fused.norm(host.backbone.norm), host.fused.head(host.model.lm_head)
        first = runner(taps[:, :4], cache.layers)
    with torch.inference_mode(not built), torch.no_grad():
        found = torch.cat((first, runner(taps[:, 4:], cache.layers)), 1)
        logits = head(norm(found))
    right = host.host(taps)
    assert worst(found, right) <= 1e-5
    assert worst(logits, host.model.lm_head(host.backbone.norm(right))) <= 1e-5


def test_after_a_dynamic_layer():
    """Slots that do not grow work too, only slower."""
    host, taps = Host(), Host().embeddings()
    cache = DynamicCache(config=host.backbone.config)
    host.host(taps[:, :8], cache=cache)
    found = host.runner(cache=cache)(taps[:, 8:], cache.layers)
    assert worst(found, host.host(taps)[:, 8:]) <= 1e-5


@given(
    count=st.integers(1, 5),
    past=st.integers(0, 6),
    groups=st.integers(1, 3),
)
def test_a_token_sees_all_before_it(count, past, groups):
    mask = causal_mask(count, past, groups, torch.zeros(()))
    for row in range(groups * count):
        for column in range(past + count):
            sees = column <= past + row % count
            assert mask[row, column] == (0 if sees else -torch.inf)


# when there is one


def test_of_the_zoo_only_llama_shaped_hosts_have_one():
    found = set()
    for model_type in MUST_WORK:
        kinds = getattr(tiny_config(model_type), "layer_types", None) or []
        fields = FULL if "sliding_attention" in kinds else {}
        fields |= {"sliding_window": None} if model_type == "mistral" else {}
        host = Host(model_type, **fields)
        if host.runner() is not None:
            found.add(model_type)
            right, step = host.step()
            assert worst(step, right) <= 1e-5
    assert found == {"llama", "mistral", "qwen2", "qwen3", "smollm3"}


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "mistral", "smollm3"])
def test_windows_have_none(model_type):
    assert Host(model_type).runner() is None


def test_a_segment_of_full_layers_among_windows_has_one():
    host = Host("qwen3")  # sliding, full, sliding, full
    assert host.runner(0, 1) is None
    assert host.runner(1, 2) is not None


def test_arithmetic_that_only_far_positions_show_has_none():
    host = Host("ministral3", sliding_window=None)
    rope = host.backbone.config.rope_parameters
    assert "llama_4_scaling_beta" in rope
    assert host.runner() is None


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
        {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "original_max_position_embeddings": 64,
            "short_factor": [1.0] * 4,
            "long_factor": [2.0] * 4,
        },
    ],
    ids=["dynamic", "longrope"],
)
def test_angles_that_change_with_the_length_have_none(rope):
    assert Host(rope_parameters=rope).runner() is None


def hook(host):
    host.layers[1].mlp.register_forward_hook(lambda *_: None)


def pre_hook(host):
    host.layers[1].self_attn.q_proj.register_forward_pre_hook(lambda *_: None)


def hook_backbone(host):
    host.backbone.register_forward_hook(lambda *_: None)


def replace_forward(host):
    host.layers[2].forward = host.layers[2].forward


def train(host):
    host.layers[3].train()


class Adapter(nn.Linear):
    """As an adapter wraps a linear map."""


def adapt(host):
    host.layers[0].self_attn.v_proj = Adapter(32, 16, bias=False)


def add_part(host):
    host.layers[0].mlp.extra = nn.Identity()


def add_parameter(host):
    host.layers[0].self_attn.sinks = nn.Parameter(torch.zeros(4))


def other_norm(host):
    host.layers[0].input_layernorm = nn.LayerNorm(32).eval()


def other_activation(host):
    host.layers[0].mlp.act_fn = nn.GELU().eval()


def ask_for_hidden_states(host):
    host.backbone.config.output_hidden_states = True


def ask_for_other_attention(host):
    host.backbone.config._attn_implementation = "flex_attention"


def in_double(host):
    host.model.double()


@pytest.mark.parametrize(
    "change",
    [
        hook, pre_hook, hook_backbone, replace_forward, train, adapt, add_part, add_parameter,
        other_norm, other_activation, ask_for_hidden_states, ask_for_other_attention, in_double,
    ],
)  # fmt: skip
def test_what_a_fused_pass_would_miss_has_none(change):
    host = Host()
    assert host.runner() is not None
    change(host)
    assert host.runner() is None


def test_a_layer_that_changed_its_arithmetic_before_has_none():
    host = Host()
    host.layers[2].register_buffer("gain", torch.tensor(2.0), persistent=False)
    inner = type(host.layers[2])

    class Louder(inner):
        def forward(self, hidden_states, **kwargs):
            return self.gain * super().forward(hidden_states, **kwargs)

    host.layers[2].__class__ = Louder
    assert host.runner(2, 3) is None
    assert host.runner(0, 2) is not None


@pytest.mark.parametrize("where", ["gradients", "autocast"])
def test_not_where_every_operation_is_watched(where):
    host = Host()
    context = torch.enable_grad() if where == "gradients" else torch.autocast("cpu", torch.bfloat16)
    with context:
        assert host.runner() is None
        assert host.fused.head(host.model.lm_head) is None
        assert host.fused.norm(host.backbone.norm) is None
    assert host.runner() is not None


def test_not_on_a_cache_of_another_kind():
    host = Host()
    static = StaticCache(config=host.backbone.config, max_cache_len=32)
    assert host.runner(cache=static) is None
    windows = DynamicCache(config=tiny_config("mistral"))
    assert host.runner(cache=windows) is None


def test_captured_hidden_states_leave_it_possible():
    host = Host()
    host.model(torch.tensor([[3, 4, 5]]), output_hidden_states=True)
    assert host.layers[0]._forward_hooks
    right, found = host.step()
    assert worst(found, right) <= 1e-5


# weights that change


def in_place(host):
    for parameter in host.layers.parameters():
        parameter.mul_(1.1)


def moved(host):
    for parameter in host.layers.parameters():
        parameter.data = parameter.data * 1.1


def replaced(host):
    for module in host.layers.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                setattr(module, name, nn.Parameter(parameter * 1.1))


def loaded(host):
    state = {name: 1.1 * value for name, value in host.layers.state_dict().items()}
    host.layers.load_state_dict(state)


@pytest.mark.parametrize("change", [in_place, moved, replaced, loaded])
def test_changed_weights_are_followed(change):
    host = Host()
    before, _ = host.step()
    change(host)
    right, found = host.step()
    assert worst(right, before) > 1e-2
    assert worst(found, right) <= 1e-5


def test_changed_numbers_are_followed():
    host = Host()
    before, _ = host.step()
    host.layers[1].self_attn.scaling *= 2
    host.layers[2].input_layernorm.variance_epsilon = 0.5
    right, found = host.step()
    assert worst(right, before) > 1e-3
    assert worst(found, right) <= 1e-5


def test_a_pass_in_use_follows_them_too():
    host = Host()
    runner, taps = host.runner(), host.embeddings()
    runner(taps[:, :1], host.cache.layers)
    host.cache.crop(-1)
    in_place(host)
    found = runner(taps[:, :1], host.cache.layers)
    assert worst(found, host.host(taps)[:, :1]) <= 1e-5


def test_a_changed_precision_is_followed():
    host = Host()
    host.step()
    host.model.bfloat16()
    right, found = host.step()
    assert found.dtype is torch.bfloat16
    assert worst(found.float(), right.float()) <= 0.05


# what is kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_weight_is_copied(dtype):
    host = Host(dtype=dtype)
    assert host.fused.nbytes == 0
    host.step()
    tables = host.fused.nbytes
    assert 0 < tables <= 2 * 256 * 8 * dtype.itemsize * 2  # cosines and sines alone
    host.runner(0, 2)
    assert host.fused.nbytes == tables
    host.fused.clear()
    assert host.fused.nbytes == 0
    right, found = host.step()
    assert worst(found.float(), right.float()) <= (1e-5 if dtype is torch.float32 else 0.05)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_start_empty(copied):
    host = Host()
    host.runner()
    assert copied(host.fused).nbytes == 0


# the head


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "granite", "cohere2"])
@pytest.mark.parametrize("shape", [(1, 1), (2, 3)])
def test_a_head_is_the_hosts(model_type, shape):
    host = Host(model_type)
    norm, head = host.decoder.norm, host.model.get_output_embeddings()
    transform = LogitTransform.of(host.model.config)
    fused, fused_norm = host.fused.head(head), host.fused.norm(norm)
    # of another kind: a norm with a mean, a weight counted from 1
    assert (fused_norm is None) == (model_type in ("cohere2", "gemma2"))
    taps = torch.randn((*shape, 32), generator=torch.Generator().manual_seed(3))
    for factor in (1, 2):
        head.weight.mul_(factor)
        found = transform.read((fused_norm or norm)(taps), fused)
        assert worst(found, transform.read(norm(taps), head)) <= 1e-5
        assert found.shape == (*shape, 128)


def test_a_head_with_a_bias():
    head = nn.Linear(32, 40).eval()
    taps = torch.randn((2, 3, 32), generator=torch.Generator().manual_seed(3))
    assert worst(FusedPasses().head(head)(taps), head(taps)) <= 1e-5


def test_hooked_heads_have_none():
    host = Host()
    host.model.lm_head.register_forward_hook(lambda *_: None)
    host.backbone.norm.register_forward_hook(lambda *_: None)
    assert host.fused.head(host.model.lm_head) is None
    assert host.fused.norm(host.backbone.norm) is None


# the cache

NUMBERS = st.integers(0, 2**31 - 1)
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("update"), st.integers(1, 40)),
        st.tuples(st.just("crop"), st.integers(0, 12)),
        st.tuples(st.just("reorder"), NUMBERS),
        st.tuples(st.just("repeat"), st.just(2)),
        st.tuples(st.just("select"), NUMBERS),
        st.tuples(st.just("reset"), st.none()),
        st.tuples(st.just("deepcopy"), st.none()),
        st.tuples(st.just("inference"), st.integers(1, 3)),
    ),
    max_size=12,
)


def apply(layer, operation, value, new):
    """One operation on a layer; the layer to go on with."""
    batch = 2 if layer.get_seq_length() == 0 else layer.keys.shape[0]
    pick = None if not isinstance(value, int) else (value + torch.arange(batch)) % batch
    if operation == "update":
        shown = layer.update(*new(batch, value))
        assert shown[0] is layer.keys
        assert shown[1] is layer.values
    elif operation == "inference":
        with torch.inference_mode():
            layer.update(*new(batch, value))
    elif operation == "crop":
        layer.crop(-value)
    elif operation == "reorder":
        layer.reorder_cache(pick)
    elif operation == "repeat" and batch < 16:
        layer.batch_repeat_interleave(value)
    elif operation == "select":
        layer.batch_select_indices(pick[: max(1, batch - 1)])
    elif operation == "reset":
        layer.reset()
    elif operation == "deepcopy":
        return copy.deepcopy(layer)
    return layer


@given(operations=OPERATIONS, seed=NUMBERS)
def test_a_growing_layer_is_a_dynamic_layer(operations, seed):
    grown, plain = GrowingLayer(), DynamicLayer()
    generator = torch.Generator().manual_seed(seed)
    for operation, value in operations:
        states: list[torch.Tensor] = []

        def new(batch, count, states=states):
            if not states:
                states += torch.randn((2, batch, 2, count, 3), generator=generator)
            return states

        grown = apply(grown, operation, value, new)
        plain = apply(plain, operation, value, new)
        assert grown.get_seq_length() == plain.get_seq_length()
        assert grown.get_mask_sizes(3) == plain.get_mask_sizes(3)
        if plain.get_seq_length():
            assert torch.equal(grown.keys, plain.keys)
            assert torch.equal(grown.values, plain.values)


def test_growth_and_crop_do_not_copy_the_past():
    layer = GrowingLayer()
    places, token = set(), torch.zeros(1, 2, 1, 4)
    for _ in range(10 * ROOM):
        layer.update(token, token)
        places.add(layer.keys.data_ptr())
        layer.crop(-1)
        layer.update(token, token)
        places.add(layer.keys.data_ptr())
    assert len(places) <= 5  # 64, 128, 256, 512, 1024
    assert layer.get_seq_length() == 10 * ROOM
    assert layer.keys.untyped_storage().nbytes() <= 2 * layer.keys.nbytes


def test_gradients_flow_through_it():
    taken = []
    for layer in (GrowingLayer(), DynamicLayer()):
        with torch.enable_grad():
            states = torch.ones(1, 2, 3, 4, requires_grad=True)
            layer.update(torch.zeros(1, 2, 2, 4), torch.zeros(1, 2, 2, 4))
            layer.update(states, 2 * states)
            keys, values = layer.update(3 * states, states)
            (keys.square().sum() + values.sum()).backward()
        taken.append(states.grad)
        assert layer.get_seq_length() == 8
    assert torch.equal(*taken)


@pytest.mark.parametrize("model_type", ["llama", "lfm2", "qwen3"])
@pytest.mark.parametrize("lazy", [False, True])
def test_generate_writes_the_same_on_it(model_type, lazy):
    if lazy and model_type == "lfm2":
        pytest.skip("the host needs the config there")
    model = tiny_model(model_type)
    ids = torch.randint(3, 128, (2, ROOM - 4), generator=torch.Generator().manual_seed(0))
    texts = []
    for prepare in (lambda cache: cache, growing):
        cache = prepare(DynamicCache() if lazy else DynamicCache(config=model.config))
        texts.append(
            model.generate(
                ids, past_key_values=cache, max_new_tokens=10, do_sample=False, eos_token_id=None
            )
        )
    assert torch.equal(*texts)
    kinds = {type(layer) for layer in cache.layers}
    assert GrowingLayer in kinds
    assert DynamicLayer not in kinds


def test_a_filled_cache_can_grow_from_there():
    host = Host()
    taps = host.embeddings()
    cache = DynamicCache(config=host.backbone.config)
    host.host(taps[:, :8], cache=cache)
    kept = [layer.keys.clone() for layer in cache.layers]
    assert growing(cache) is cache
    assert all(torch.equal(a, layer.keys) for a, layer in zip(kept, cache.layers, strict=True))
    found = host.runner(cache=cache)(taps[:, 8:], cache.layers)
    assert worst(found, host.host(taps)[:, 8:]) <= 1e-5


def test_slots_added_later_grow_like_the_others():
    cache = growing(DynamicCache())
    grow_cache(cache, range(3), [(tiny_config("llama"), i) for i in range(3)])
    assert [type(layer) for layer in cache.layers] == [GrowingLayer] * 3
