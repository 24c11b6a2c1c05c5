"""`FamilialConfig`: defaults, every error, round trips."""

import copy

import numpy as np
import pytest
import torch
from backbones import tiny_config
from hypothesis import given
from hypothesis import strategies as st
from support import family_of
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BartConfig,
    Gemma3Config,
    GPT2Config,
    LlamaConfig,
)

from hf_familial import FamilialConfig, FamilialForCausalLM, evenly_spaced_exits
from hf_familial.models.familial.configuration_familial import check_exits


LLAMA = {"model_type": "llama", "num_hidden_layers": 4}

# one wrong value -> what the message must say, besides the value itself
WRONG_EXITS = {
    "empty": ([], "got []"),
    "repeated": ([1, 1, 4], "strictly increasing"),
    "decreasing": ([2, 1, 4], "strictly increasing"),
    "too-deep": ([1, 5], "equal `num_hidden_layers` (4)"),
    "too-shallow": ([1, 2], "equal `num_hidden_layers` (4)"),
    "string": (["1", 4], "integers"),
    "float": ([1.0, 4], "integers"),
    "bool": ([True, 4], "integers"),
    "none": ([None, 4], "integers"),
    "zero": ([0, 4], "of 1 or more"),
    "negative": ([-2, 4], "of 1 or more"),
    "text": ("24", "integers"),
}
WRONG_FIELDS = {
    "num_exit_layers": ([-1, 1.0, "1", True, None], "integer from 0 to 4"),
    "exit_norm": (["final", None, 1, ["own"]], "one of own, shared"),
    "exit_head": (["tied", None, True], "one of shared, own"),
    "default_exit": ([4, -5, "0", 1.0, True, None], "from -4 to 3"),
}
WRONG_TEXT_CONFIGS = {
    "no-model-type": ({"num_hidden_layers": 3}, "got only the keys ['num_hidden_layers']"),
    "empty": ({}, "model_type='llama'"),
    "unknown": ({"model_type": "no_such_type"}, "no_such_type"),
    "encoder-decoder": ({"model_type": "t5"}, "`t5` is an encoder-decoder"),
    "encoder-decoder-object": (BartConfig(), "`bart` is an encoder-decoder"),
    "family": ({"model_type": "familial"}, "(`llama`)"),
    "string": ("llama", "a config or a dict, got 'llama'"),
    "number": (4, "got 4"),
    "class": (LlamaConfig, "LlamaConfig"),
    "list": ([LLAMA], "a config or a dict"),
}


def config(**fields):
    return FamilialConfig(**{"text_config": dict(LLAMA), **fields})


def content(made):
    return {name: value for name, value in made.to_dict().items() if name != "_name_or_path"}


def test_the_defaults_are_four_exits_on_a_llama():
    default = FamilialConfig()
    assert isinstance(default.text_config, LlamaConfig)
    assert default.exits == [8, 16, 24, 32]
    assert (default.num_exit_layers, default.exit_norm, default.exit_head) == (0, "own", "shared")
    assert default.default_exit == -1
    assert default.num_exits == 4
    assert default.model_type == "familial"


@pytest.mark.parametrize(("depth", "exits"), [(1, [1]), (3, [1, 2, 3]), (6, [2, 3, 4, 6])])
def test_default_exits_of_a_shallow_backbone(depth, exits):
    assert config(text_config=LLAMA | {"num_hidden_layers": depth}).exits == exits


@pytest.mark.parametrize("text_config", [LLAMA, LlamaConfig(num_hidden_layers=4)], ids=type)
def test_a_dict_and_an_object_make_the_same(text_config):
    made = FamilialConfig(text_config=text_config, exits=[1, 4])
    assert isinstance(made.text_config, LlamaConfig)
    assert made.to_dict() == config(exits=[1, 4]).to_dict()


@pytest.mark.parametrize("exits", [[1, 4], (1, 4), range(1, 5)], ids=["list", "tuple", "range"])
def test_exits_become_a_list_of_their_own(exits):
    made = config(exits=exits)
    assert made.exits == list(exits)
    assert made.exits is not exits


@pytest.mark.parametrize(("exits", "message"), WRONG_EXITS.values(), ids=WRONG_EXITS)
def test_wrong_exits_are_refused(exits, message):
    with pytest.raises(ValueError, match="`exits`") as raised:
        config(exits=exits)
    assert message in str(raised.value)
    assert not exits or str(list(exits)) in str(raised.value)
    with pytest.raises(ValueError, match="`exits`"):
        check_exits(exits, 4)


def test_one_depth_alone_is_refused_by_name():
    with pytest.raises(ValueError, match="`exits`"):
        config(exits=4)


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, (values, _) in WRONG_FIELDS.items() for value in values],
)
def test_wrong_fields_are_refused(name, value):
    with pytest.raises(ValueError, match=f"`{name}`") as raised:
        config(**{name: value})
    assert WRONG_FIELDS[name][1] in str(raised.value)
    assert str(value) in str(raised.value)


@pytest.mark.parametrize(
    ("text_config", "message"), WRONG_TEXT_CONFIGS.values(), ids=WRONG_TEXT_CONFIGS
)
def test_wrong_text_configs_are_refused(text_config, message):
    with pytest.raises(ValueError) as raised:  # noqa: PT011 the message is compared below
        FamilialConfig(text_config=text_config)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    "exits",
    [
        [2],
        None,
    ],
)
@pytest.mark.parametrize(
    "text_config", [Gemma3Config(), {"model_type": "clip"}], ids=["vlm", "clip"]
)
def test_a_composite_is_refused_and_names_its_decoder(text_config, exits):
    with pytest.raises(ValueError, match="consists of several models.*`(gemma3|clip)_text"):
        FamilialConfig(text_config=text_config, exits=exits)


NUMBERS = {
    "exits": [np.array([2, 4]), [np.int64(2), np.int8(4)], (np.uint16(2), 4), torch.tensor([2, 4])],
    "num_exit_layers": [np.int64(1), np.uint8(1), torch.tensor(1)],
    "default_exit": [np.int32(-1), np.int64(1), torch.tensor(0)],
    "tie_word_embeddings": [np.bool_(True)],
    "vocab_size": [np.int64(96)],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in NUMBERS.items() for value in values]
)
@pytest.mark.parametrize("later", [False, True])
def test_numbers_of_numpy_and_torch_can_be_saved(name, value, later, tmp_path):
    """They are Python's own once set, at construction or later, and are read again as such."""
    fields = {} if later or name == "vocab_size" else {name: value}
    config = FamilialConfig(text_config=tiny_config("llama"), **fields)
    if not fields:
        setattr(config, name, list(value) if isinstance(value, tuple) else value)
    config.check()
    config.save_pretrained(tmp_path)
    loaded = FamilialConfig.from_pretrained(tmp_path)
    found, right = getattr(loaded, name), np.asarray(value).tolist()
    assert found == right
    assert type(found) is type(right)


def test_a_depth_that_is_changed_in_place_can_be_saved(tmp_path):
    config = FamilialConfig(text_config=tiny_config("llama"), exits=[1, 2, 4])
    config.exits[1] = np.int64(3)
    FamilialForCausalLM(config).save_pretrained(tmp_path)
    assert FamilialConfig.from_pretrained(tmp_path).exits == [1, 3, 4]


@pytest.mark.parametrize("name", ["num_exit_layers", "default_exit"])
@pytest.mark.parametrize("value", [np.bool_(True), torch.tensor(True), np.float64(1), True])
def test_other_scalars_are_no_numbers_of_layers(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        FamilialConfig(text_config=tiny_config("llama"), **{name: value})


def test_depths_in_another_shape_are_refused():
    for exits in (np.array(4), np.array([[2, 4]]), np.array([2.0, 4.0]), [np.bool_(True), 4]):
        with pytest.raises(ValueError, match="`exits` must be"):
            FamilialConfig(text_config=tiny_config("llama"), exits=exits)


def test_a_family_made_with_numbers_of_numpy_can_be_saved(tmp_path):
    fields = {"num_exit_layers": np.int64(1), "default_exit": np.int64(0)}
    config = FamilialConfig(text_config=tiny_config("llama"), exits=np.array([2, 4]), **fields)
    family = FamilialForCausalLM(config)
    family.config.default_exit = np.argmin([2.0, 1.0])
    family.save_pretrained(tmp_path)
    assert FamilialForCausalLM.from_pretrained(tmp_path).config.default_exit == 1


def test_a_field_changed_later_is_checked_when_asked():
    made = config()
    made.check()
    made.exits = [1, 5]
    with pytest.raises(ValueError, match=r"`exits`.*\[1, 5\]"):
        made.check()


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"exits": [1, 4], "default_exit": 0, "num_exit_layers": 2},
        {"exit_norm": "shared", "exit_head": "own", "tie_word_embeddings": True},
        {"text_config": tiny_config("gpt2"), "exits": [3, 4]},
        {"text_config": tiny_config("gemma3_text"), "dtype": "bfloat16"},
    ],
    ids=["default", "exits", "modes", "gpt2", "gemma3"],
)
def test_round_trips_are_equal(fields, tmp_path):
    made = config(**fields)
    made.save_pretrained(tmp_path)
    loaded = FamilialConfig.from_pretrained(tmp_path)
    auto = AutoConfig.from_pretrained(tmp_path)
    assert type(auto) is FamilialConfig
    for other in (FamilialConfig.from_dict(made.to_dict()), loaded, auto, copy.deepcopy(made)):
        assert content(other) == content(made)
        assert type(other.text_config) is type(made.text_config)
    loaded.save_pretrained(tmp_path / "again")
    first, again = (p / "config.json" for p in (tmp_path, tmp_path / "again"))
    assert again.read_text() == first.read_text()


def test_fields_can_be_changed_while_loading(tmp_path):
    config().save_pretrained(tmp_path)
    loaded, unused = FamilialConfig.from_pretrained(
        tmp_path, default_exit=0, vocab_size=70, unheard_of=1, return_unused_kwargs=True
    )
    assert (loaded.default_exit, loaded.vocab_size, unused) == (0, 70, {"unheard_of": 1})


@pytest.mark.parametrize(
    ("text_config", "sizes"),
    [
        (LlamaConfig(hidden_size=32, num_hidden_layers=4, vocab_size=50), (32, 4, 50)),
        (GPT2Config(n_embd=24, n_layer=3, vocab_size=60), (24, 3, 60)),
    ],
    ids=["llama", "gpt2"],
)
def test_sizes_are_those_of_the_backbone(text_config, sizes):
    made = FamilialConfig(text_config=text_config)
    assert (made.hidden_size, made.num_hidden_layers, made.vocab_size) == sizes
    assert made.get_text_config() is made.text_config
    assert made.get_text_config(decoder=True) is made.text_config
    made.vocab_size = 77
    assert made.text_config.vocab_size == 77
    made.text_config.hidden_size = 48
    assert made.hidden_size == 48
    assert "vocab_size" not in made.to_dict()


def test_special_tokens_are_those_of_the_backbone():
    made = config(text_config=LLAMA | {"eos_token_id": [2, 7], "pad_token_id": 3})
    assert (made.bos_token_id, made.eos_token_id, made.pad_token_id) == (1, [2, 7], 3)


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_are_tied_as_the_backbone_says(tied):
    text_config = LLAMA | {"tie_word_embeddings": tied}
    assert config(text_config=text_config).tie_word_embeddings is tied
    assert (
        config(text_config=text_config, tie_word_embeddings=not tied).tie_word_embeddings
        is not tied
    )


def test_nothing_of_the_callers_is_changed():
    text_config = LlamaConfig(num_hidden_layers=4)
    fields, exits, before = dict(LLAMA), [1, 4], dict(vars(text_config))
    by_dict, by_object = config(text_config=fields, exits=exits), config(text_config=text_config)
    exits.append(9)
    assert by_dict.exits == [1, 4]
    assert fields == LLAMA
    assert vars(text_config) == before
    assert by_object.num_exits == 4


@pytest.mark.parametrize(("given", "found"), [(None, 3), (0, 0), (3, 3), (-1, 3), (-4, 0)])
def test_resolve_exit(given, found):
    assert config().resolve_exit(given) == found


def test_resolve_exit_uses_the_default():
    assert config(default_exit=1).resolve_exit() == 1
    assert config(default_exit=-3).resolve_exit() == 1


@pytest.mark.parametrize("exit_idx", [4, -5, 100])
def test_no_such_exit(exit_idx):
    message = rf"`exit_idx` must be between -4 and 3, got {exit_idx}.*\[1, 2, 3, 4\]"
    with pytest.raises(IndexError, match=message):
        config().resolve_exit(exit_idx)


@pytest.mark.parametrize("exit_idx", ["0", 1.0, True, [0]])
def test_an_exit_is_an_integer(exit_idx):
    with pytest.raises(TypeError, match="`exit_idx` must be an integer"):
        config().resolve_exit(exit_idx)


@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))))
def test_evenly_spaced_exits_are_valid_and_even(sizes):
    depth, count = sizes
    exits = evenly_spaced_exits(depth, count)
    check_exits(exits, depth)
    assert len(exits) == count
    gaps = [b - a for a, b in zip([0, *exits], exits, strict=False)]
    assert max(gaps) - min(gaps) <= 2
    assert all(abs(e - depth * (k + 1) / count) <= 0.5 for k, e in enumerate(exits))


@given(st.lists(st.integers(-2, 12), max_size=8), st.integers(1, 12))
def test_exits_are_accepted_exactly_if_the_rule_holds(exits, depth):
    right = exits == sorted(set(exits)) and exits[-1:] == [depth] and min(exits) >= 1
    if right:
        check_exits(exits, depth)
    else:
        with pytest.raises(ValueError, match="`exits`"):
            check_exits(exits, depth)


@pytest.mark.parametrize("num_exits", [0, -1, 5])
def test_as_many_exits_as_layers_at_most(num_exits):
    with pytest.raises(ValueError, match=f"an integer from 1 to 4, got {num_exits}"):
        evenly_spaced_exits(4, num_exits)


@pytest.mark.parametrize("num_exits", ["2", 2.0, True])
def test_a_number_of_exits_is_an_integer(num_exits):
    with pytest.raises(ValueError, match="`num_exits` must be an integer"):
        evenly_spaced_exits(4, num_exits)


def test_a_plain_checkpoint_is_no_family(tmp_path):
    tiny_config("qwen3").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="from_backbone"):
        FamilialConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("model_type", ["bert", "roberta", "vit", "wav2vec2", "t5gemma", "rwkv"])
def test_what_cannot_be_a_backbone_is_refused_before_a_model_is_built(model_type):
    with pytest.raises(ValueError, match="backbone"):
        FamilialConfig(text_config={"model_type": model_type})


@pytest.mark.parametrize(
    ("fields", "near"),
    [
        ({"exit": [2, 4]}, "`exits`"),
        ({"exits_norm": "own"}, "`exit_norm`"),
        ({"num_exits": 2}, "`exits`"),
        ({"exit_norm": "onw"}, "Did you mean 'own'?"),
        ({"exit_head": "Shared"}, "Did you mean 'shared'?"),
        ({"text_config": {"model_type": "quen3"}}, "Did you mean qwen3"),
    ],
)
def test_a_misspelt_field_or_value_names_the_nearest(fields, near):
    with pytest.raises(ValueError) as raised:  # noqa: PT011 the message is compared below
        FamilialConfig(**fields)
    assert near in str(raised.value)
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize(
    "fields",
    [{"exits": [2, 4]}, {"exit_norm": "shared"}, {"exit_head": "own"}, {"num_exit_layers": 2}],
)
def test_fields_that_name_weights_cannot_change_when_a_family_loads(fields, tmp_path):
    """The weights of an exit would silently become those of an exit at another depth."""
    family = family_of(exits=(1, 3, 4), num_exit_layers=1)
    family.save_pretrained(tmp_path)
    (name,) = fields
    with pytest.raises(ValueError, match=f"`{name}` of a saved family is .* and cannot change"):
        FamilialForCausalLM.from_pretrained(tmp_path, **fields)
    with pytest.raises(ValueError, match="cannot change"):
        AutoModelForCausalLM.from_pretrained(tmp_path, **fields)
    same = {name: getattr(family.config, name)}
    assert FamilialForCausalLM.from_pretrained(tmp_path, **same).config.exits == [1, 3, 4]
