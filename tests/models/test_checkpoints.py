"""Saving, loading, resizing, copying: a family survives what users do to models."""

import copy
import io
import itertools
import json
import pickle

import pytest
import torch
from backbones import tiny_config, tiny_model
from reference import copy_of, gradients, logits, stir, token_ids, truncated_host
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BertConfig,
    BertModel,
    LlamaModel,
    PreTrainedTokenizerFast,
    T5Config,
    pipeline,
)

from hf_familial import Distillation, FamilialConfig, FamilialForCausalLM, FamilialModel


EXITS = [1, 3, 4]
TYPES = ("llama", "gemma2", "mixtral", "gpt2", "falcon_h1")
SHAPES = [
    {"exit_norm": norm, "exit_head": head, "num_exit_layers": private, "tied": tied}
    for norm, head, private, tied in itertools.product(
        ("own", "shared"), ("own", "shared"), (0, 1), (False, True)
    )
]


def shape_id(shape):
    tied = "tied" if shape["tied"] else "untied"
    return "{exit_norm}-{exit_head}-{num_exit_layers}-{tied}".format(**{**shape, "tied": tied})


def family_of(model_type, tied=False, **fields):
    host = tiny_model(model_type, tie_word_embeddings=tied)
    return stir(FamilialForCausalLM.from_backbone(host, exits=EXITS, **fields))


def every_logits(family, ids=None):
    ids = token_ids() if ids is None else ids
    return [logits(family, ids, exit_idx=k) for k in range(family.config.num_exits)]


def assert_equal(found, right):
    for a, b in zip(found, right, strict=True):
        assert torch.equal(a, b)


def saved(family, folder, **kwargs):
    family.save_pretrained(folder, **kwargs)
    return folder


def weights_on_disk(folder):
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        shard = load_file(path)
        assert not tensors.keys() & shard.keys()
        tensors |= shard
    return tensors


# round trips


@pytest.mark.parametrize(
    ("model_type", "shape"),
    [("llama", shape) for shape in SHAPES]
    # each choice meets every other once
    + [(model_type, SHAPES[i]) for model_type in TYPES[1:] for i in (0, 7, 9, 14)],
    ids=lambda value: value if isinstance(value, str) else shape_id(value),
)
def test_saved_loaded_and_saved_again_it_is_the_same(model_type, shape, tmp_path):
    family = family_of(model_type, **shape)
    right = every_logits(family)
    saved(family, tmp_path / "one")
    loaded, report = FamilialForCausalLM.from_pretrained(tmp_path / "one", output_loading_info=True)
    assert not any(report[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_equal(every_logits(loaded), right)
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) is shape["tied"]
    saved(loaded, tmp_path / "two")
    first, again = weights_on_disk(tmp_path / "one"), weights_on_disk(tmp_path / "two")
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    unique = {p.data_ptr(): p for p in family.parameters()}.values()
    persistent = {n for n, _ in family.named_buffers()} & family.state_dict().keys()
    assert sum(p.numel() for n, p in first.items() if n not in persistent) == sum(
        p.numel() for p in unique
    )
    assert ("lm_head.weight" in first) is not shape["tied"]


def test_no_tensor_is_on_disk_twice(tmp_path):
    tensors = weights_on_disk(saved(family_of("llama", tied=True, exit_head="own"), tmp_path))
    for (a, x), (b, y) in itertools.combinations(tensors.items(), 2):
        assert x.shape != y.shape or not torch.equal(x, y), (a, b)


@pytest.mark.parametrize("tied", [False, True])
def test_shards(tied, tmp_path):
    family = family_of("llama", tied=tied, num_exit_layers=1, exit_head="own")
    saved(family, tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_equal(every_logits(FamilialForCausalLM.from_pretrained(tmp_path)), every_logits(family))


@pytest.mark.parametrize("cls", [AutoModelForCausalLM, FamilialForCausalLM])
def test_the_auto_classes_load_it(cls, tmp_path):
    family = family_of("llama", num_exit_layers=1)
    loaded = cls.from_pretrained(saved(family, tmp_path))
    assert type(loaded) is FamilialForCausalLM
    assert not loaded.training
    assert_equal(every_logits(loaded), every_logits(family))
    assert type(AutoConfig.from_pretrained(tmp_path)) is FamilialConfig


def test_the_headless_model_loads_saves_and_is_the_same(tmp_path):
    family = family_of("llama", num_exit_layers=1, exit_head="own")
    ids = token_ids()
    bare, report = AutoModel.from_pretrained(saved(family, tmp_path), output_loading_info=True)
    assert type(bare) is FamilialModel
    assert not report["missing_keys"]
    bare.save_pretrained(tmp_path / "bare")
    again = FamilialModel.from_pretrained(tmp_path / "bare")
    with torch.no_grad():
        for model in (bare, again):
            found = model(ids, output_exits=True).exit_hidden_states
            assert_equal(found, family.model(ids, output_exits=True).exit_hidden_states)
    headed, report = FamilialForCausalLM.from_pretrained(
        tmp_path / "bare", output_loading_info=True
    )
    heads = {"lm_head.weight", "exit_heads.0.weight", "exit_heads.1.weight"}
    assert set(report["missing_keys"]) == heads
    assert headed.lm_head.weight.std() > 0


def test_a_family_of_an_old_shape_reports_what_is_missing(tmp_path):
    saved(family_of("llama"), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"exit_head": "own"}))
    _, report = FamilialForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(report["missing_keys"]) == {"exit_heads.0.weight", "exit_heads.1.weight"}


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_exits_that_do_not_fit_are_refused_at_loading(model_type, tmp_path):
    saved(family_of(model_type), tmp_path)
    with pytest.raises(ValueError, match=r"`exits`.*\[2, 5\]"):
        FamilialForCausalLM.from_pretrained(tmp_path, exits=[2, 5])


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2", "phi"])
@pytest.mark.parametrize("tied", [False, True])
def test_its_state_dict_loads_strictly(model_type, tied):
    family = family_of(model_type, tied=tied, exit_head="own", num_exit_layers=1)
    other = FamilialForCausalLM(family.config)
    other.load_state_dict(family.state_dict())
    assert_equal(every_logits(other.eval()), every_logits(family))


# what goes wrong


def test_a_missing_folder(tmp_path):
    for load in (FamilialForCausalLM.from_pretrained, FamilialForCausalLM.from_backbone):
        with pytest.raises(OSError, match="nowhere"):
            load(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("damage", ["cut", "noise", "gone"])
def test_a_damaged_checkpoint(damage, tmp_path):
    path = saved(family_of("llama"), tmp_path) / "model.safetensors"
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(content[:-1000] if damage == "cut" else b"\xff" * len(content))
    with pytest.raises((OSError, SafetensorError), match="(?i)safetensors|header|incomplete"):
        FamilialForCausalLM.from_pretrained(tmp_path)


def test_a_damaged_config(tmp_path):
    path = saved(family_of("llama"), tmp_path) / "config.json"
    fields = json.loads(path.read_text())
    fields["exits"] = [3, 1]
    path.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"`exits`.*\[3, 1\]"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


# dtype, attention, devices


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_reach_every_part(dtype, tmp_path):
    family = family_of("llama", num_exit_layers=1, exit_head="own")
    saved(family, tmp_path)
    config = FamilialConfig.from_pretrained(tmp_path)
    hosts = tmp_path / "host"
    tiny_model("llama").save_pretrained(hosts)
    made = {
        "loaded": FamilialForCausalLM.from_pretrained(tmp_path, dtype=dtype),
        "drawn": AutoModelForCausalLM.from_config(config, dtype=dtype),
        "warm": FamilialForCausalLM.from_backbone(hosts, exits=EXITS, dtype=dtype, exit_head="own"),
        "cast": copy_of(family).to(dtype),
    }
    for label, model in made.items():
        assert {p.dtype for p in model.parameters()} == {dtype}, label
        assert logits(model, token_ids(), exit_idx=0).dtype is dtype, label
        assert model.dtype is dtype, label
    saved(made["warm"], tmp_path / "warm")
    auto = AutoModelForCausalLM.from_pretrained(tmp_path / "warm", dtype="auto")
    assert auto.dtype is dtype


def test_half_is_close_to_whole():
    family = family_of("llama", num_exit_layers=1)
    right, found = every_logits(family), every_logits(family.to(torch.bfloat16))
    assert all((a - b.float()).abs().max() < 0.5 for a, b in zip(right, found, strict=True))


def attentions_of(family):
    return {
        m.config._attn_implementation
        for n, m in family.named_modules()
        if n.endswith("self_attn") and hasattr(m, "config")
    }


@pytest.mark.parametrize("kind", ["eager", "sdpa"])
def test_attention_reaches_every_part(kind, tmp_path):
    family = family_of("llama", num_exit_layers=1)
    saved(family, tmp_path)
    loaded = FamilialForCausalLM.from_pretrained(tmp_path, attn_implementation=kind)
    drawn = AutoModelForCausalLM.from_config(loaded.config, attn_implementation=kind)
    for model in (loaded, drawn):
        assert model.model.backbone.config._attn_implementation == kind
        assert attentions_of(model) == {kind}
    for a, b in zip(every_logits(loaded), every_logits(family), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("how", ["model", "path"])
def test_a_warm_start_keeps_the_hosts_attention(how, tmp_path):
    host = tiny_model("llama")
    host.set_attn_implementation("eager")
    if how == "path":
        host.save_pretrained(tmp_path)
        family = FamilialForCausalLM.from_backbone(
            tmp_path, exits=EXITS, attn_implementation="eager"
        )
    else:
        family = FamilialForCausalLM.from_backbone(host, exits=EXITS)
    assert family.config._attn_implementation == "eager"
    assert family.model.backbone.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    "private",
    [
        0,
        1,
    ],
)
def test_attention_can_be_changed_later(private, tmp_path):
    saved(family_of("llama", num_exit_layers=private), tmp_path)
    family = FamilialForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    right = every_logits(family)
    family.set_attn_implementation("sdpa")
    for a, b in zip(every_logits(family), right, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert attentions_of(family) == {"sdpa"}


def test_a_device_map(tmp_path):
    family = family_of("llama", num_exit_layers=1, exit_head="own")
    saved(family, tmp_path)
    hooked = dict.fromkeys(
        ("model.backbone", "model.exits.0", "model.exits.1", "lm_head", "exit_heads"), "cpu"
    )
    for device_map in ("cpu", "auto", {"": "cpu"}, hooked):
        loaded = FamilialForCausalLM.from_pretrained(tmp_path, device_map=device_map)
        assert_equal(every_logits(loaded), every_logits(family))
        text = loaded.generate(token_ids(), exit_idx=0, max_new_tokens=4, do_sample=False)
        right = family.generate(token_ids(), exit_idx=0, max_new_tokens=4, do_sample=False)
        assert torch.equal(text, right)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_weights_offloaded_to_the_disk(model_type, tmp_path):
    from accelerate import cpu_offload

    family = family_of(model_type, num_exit_layers=1)
    right = every_logits(family)
    cpu_offload(family, execution_device=torch.device("cpu"))
    assert_equal(every_logits(family), right)


# vocabulary


@pytest.mark.parametrize("head", ["own", "shared"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "phi"])
@pytest.mark.parametrize("size", [140, 100])
def test_the_vocabulary_can_be_resized(model_type, head, tied, size, tmp_path):
    family = family_of(model_type, tied=tied, exit_head=head, num_exit_layers=1)
    ids, kept = token_ids().clamp(max=99), min(size, 128)
    before = every_logits(family, ids)
    family.resize_token_embeddings(size)
    after = every_logits(family, ids)
    for a, b in zip(after, before, strict=True):
        assert a.shape[-1] == size
        torch.testing.assert_close(a[..., :kept], b[..., :kept])
    assert (family.lm_head.weight is family.get_input_embeddings().weight) is tied
    assert family.config.vocab_size == family.config.text_config.vocab_size == size
    assert family.vocab_size == size
    family(ids, labels=ids).loss.backward()
    loaded = FamilialForCausalLM.from_pretrained(saved(family, tmp_path))
    assert_equal(every_logits(loaded, ids), after)
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) is tied


def test_resizing_to_a_multiple():
    family = family_of("llama", exit_head="own")
    family.resize_token_embeddings(130, pad_to_multiple_of=64)
    assert {found.shape[-1] for found in every_logits(family)} == {192}
    assert family.resize_token_embeddings() is family.get_input_embeddings()
    assert family.config.vocab_size == 192


@pytest.mark.parametrize("model_type", ["llama", "phi"])
@pytest.mark.parametrize("size", [100, 140])
def test_a_resized_head_stays_as_it_was(model_type, size):
    """What was frozen stays frozen, weight and bias apart; dtype, mode and hooks stay too."""
    family = family_of(model_type, exit_head="own").to(torch.bfloat16).eval()
    first, second = family.exit_heads
    first.requires_grad_(False)
    if second.bias is not None:
        second.bias.requires_grad_(False)
    family.lm_head.requires_grad_(False)
    calls = []
    first.register_forward_hook(lambda *_: calls.append(1))
    right = {name: (p.requires_grad, p.dtype) for name, p in family.named_parameters()}
    family.resize_token_embeddings(size)
    assert {name: (p.requires_grad, p.dtype) for name, p in family.named_parameters()} == right
    assert [head.weight.shape[0] for head in family.exit_heads] == [size, size]
    assert first.out_features == size
    assert not any(head.training for head in family.exit_heads)
    assert logits(family, token_ids() % 90, exit_idx=0).shape[-1] == size
    assert calls


# training


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("exit_idx", [None, 0])
def test_checkpointed_gradients_are_the_same(model_type, reentrant, exit_idx):
    family = family_of(model_type, num_exit_layers=1).train()
    ids = token_ids()

    def step():
        torch.manual_seed(0)
        family.zero_grad()
        loss = family(ids, labels=ids, exit_idx=exit_idx).loss
        loss.backward()
        return loss.detach(), gradients(family)

    loss, right = step()
    family.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert family.is_gradient_checkpointing
    again, found = step()
    torch.testing.assert_close(again, loss)
    assert found.keys() == right.keys()
    for name, gradient in right.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("exit_idx", [None, 0, 2])
def test_checkpointing_recomputes_the_layers(exit_idx):
    family = family_of("llama", num_exit_layers=1).train()
    family.gradient_checkpointing_enable({"use_reentrant": False})
    calls = []
    for name, module in family.named_modules():
        if name.endswith("mlp"):
            module.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    family(token_ids(), labels=token_ids(), exit_idx=exit_idx).loss.backward()
    assert {calls.count(name) for name in calls} == {2}
    assert len(set(calls)) == {None: 6, 0: 2, 2: 4}[exit_idx]


def compiled_step(family, backend, **inputs):
    """Loss, losses of the exits and gradients of a step that is compiled as one graph."""
    torch._dynamo.reset()
    compiled = torch.compile(family.train(), backend=backend, fullgraph=True)
    outputs = compiled(token_ids(), use_cache=False, **inputs)
    outputs.loss.backward()
    assert not outputs.exit_losses.requires_grad
    return outputs, gradients(family)


OBJECTIVES = {
    "labels": {},
    "no-logits": {"skip_logits": True},
    "all-logits": {"output_exits": True},
    "one-exit": {"exit_idx": 0},
    "distillation": {"distillation": Distillation(0.5, 2.0), "exit_weights": [0.2, 0.3, 0.5]},
    "part-of-a-batch": {"num_items_in_batch": torch.tensor(40)},
}


@pytest.mark.parametrize(
    ("model_type", "objective", "backend"),
    [
        ("llama", "no-logits", "eager"),
        *(
            pytest.param("llama", objective, "aot_eager", marks=pytest.mark.slow)
            for objective in OBJECTIVES
        ),
        *(
            pytest.param(model_type, "distillation", "aot_eager", marks=pytest.mark.slow)
            for model_type in ("gemma2", "mixtral", "phi")
        ),
        pytest.param("llama", "distillation", "inductor", marks=pytest.mark.slow),
    ],
)
def test_a_training_step_compiles_as_one_graph(model_type, objective, backend):
    """The first call of a family: nothing needs to have run before."""
    fields = {"exit_head": "own", "num_exit_layers": 1}
    labels = token_ids().masked_fill(token_ids() % 3 == 0, -100)
    inputs = OBJECTIVES[objective] | {"labels": labels}
    right = family_of(model_type, **fields).train()
    expected = right(token_ids(), use_cache=False, **inputs)
    expected.loss.backward()
    family = family_of(model_type, **fields)
    found, slopes = compiled_step(family, backend, **inputs)
    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(found.exit_losses, expected.exit_losses)
    torch.testing.assert_close(slopes, gradients(right), atol=1e-6, rtol=1e-4)


@pytest.mark.slow
def test_a_compiled_loss_takes_other_lengths_and_dtypes():
    """Batches of other shapes, other weights, autocast, and a batch without a target."""
    torch._dynamo.reset()
    family, right = family_of("llama").train(), family_of("llama").train()
    compiled = torch.compile(family, backend="aot_eager", fullgraph=True)
    for step, shape in enumerate([(2, 12), (3, 17), (3, 17)]):
        ids = torch.randint(3, 100, shape)
        labels = ids if step < 2 else torch.full_like(ids, -100)
        inputs = {"labels": labels, "skip_logits": True, "num_items_in_batch": torch.tensor(50)}
        inputs["exit_weights"] = [0.1 * step, 0.2, 0.5]
        found = []
        for model in (compiled, right):
            with torch.autocast("cpu", torch.bfloat16, enabled=step == 1):
                outputs = model(ids, use_cache=False, **inputs)
            outputs.loss.backward()
            found.append(outputs.loss.detach())
        torch.testing.assert_close(*found)
        torch.testing.assert_close(gradients(family), gradients(right), atol=2e-2, rtol=1e-2)


@pytest.mark.slow
def test_all_exits_compile_as_one_graph():
    torch._dynamo.reset()
    family = family_of("llama", num_exit_layers=1)
    compiled = torch.compile(family, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        found = compiled(token_ids(), use_cache=False, output_exits=True, output_hidden_states=True)
        right = family(token_ids(), use_cache=False, output_exits=True, output_hidden_states=True)
    torch.testing.assert_close(found.exit_logits, right.exit_logits)
    assert len(found.hidden_states) == len(right.hidden_states)


# copies


@pytest.mark.xfail(strict=True, raises=AttributeError, reason="hooks of transformers do not pickle")
def test_a_family_pickles_after_a_training_step():
    family = family_of("llama").train()
    family(token_ids(), labels=token_ids()).loss.backward()
    pickle.dumps(family)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch"])
@pytest.mark.parametrize("tied", [False, True])
def test_copies_are_the_same_and_apart(how, tied):
    family = family_of("llama", tied=tied, num_exit_layers=1)
    right = every_logits(family)
    if how == "deepcopy":
        other = copy.deepcopy(family)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(family))
    else:
        file = io.BytesIO()
        torch.save(family, file)
        other = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    assert_equal(every_logits(other), right)
    assert (other.lm_head.weight is other.get_input_embeddings().weight) is tied
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert_equal(every_logits(family), right)


# pipelines


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 128)}}
    bare = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    bare.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=bare, **special)


@pytest.mark.parametrize("exit_idx", [None, 0])
def test_the_pipeline_generates(tokenizer, exit_idx, tmp_path):
    family = family_of("llama", num_exit_layers=1)
    family.generation_config.eos_token_id = None
    saved(family, tmp_path)
    tokenizer.save_pretrained(tmp_path)
    generator = pipeline("text-generation", model=str(tmp_path))
    assert type(generator.model) is FamilialForCausalLM
    extra = {} if exit_idx is None else {"exit_idx": exit_idx}
    limits = {"max_new_tokens": 5, "do_sample": False}
    found = generator("w9 w10 w11", return_full_text=False, **limits, **extra)
    ids = tokenizer("w9 w10 w11", return_tensors="pt").input_ids
    right = family.generate(ids, **limits, **extra)[0, ids.shape[1] :]
    assert found[0]["generated_text"].split() == tokenizer.decode(right).split()
    batch = generator(["w9", "w10 w11 w12"], batch_size=2, **limits, **extra)
    assert len(batch) == 2


# warm starts


def test_from_a_path_is_from_the_model(tmp_path):
    host = tiny_model("llama")
    host.generation_config.temperature = 0.3
    host.generation_config.do_sample = True
    host.save_pretrained(tmp_path)
    by_path = FamilialForCausalLM.from_backbone(tmp_path, exits=EXITS)
    by_name = FamilialForCausalLM.from_backbone(str(tmp_path), exits=EXITS)
    by_model = FamilialForCausalLM.from_backbone(host, exits=EXITS)
    for family in (by_path, by_name, by_model):
        assert_equal(every_logits(family), every_logits(by_model))
        assert family.generation_config.temperature == 0.3
        assert family.generation_config.do_sample
        assert family.config.exits == EXITS
    # a name of its own would be taken for its checkpoint, and there is none yet
    assert by_path.name_or_path == ""
    assert by_path.config.text_config.name_or_path == str(tmp_path)


def test_num_exits_are_evenly_spaced():
    assert FamilialForCausalLM.from_backbone(tiny_model("llama"), num_exits=2).config.exits == [
        2,
        4,
    ]
    assert FamilialForCausalLM.from_backbone(tiny_model("llama")).config.exits == [1, 2, 3, 4]


@pytest.mark.parametrize("training", [False, True])
def test_a_warm_start_shares_the_hosts_weights_and_mode(training):
    host = tiny_model("llama").train(training)
    weights = {p.data_ptr() for p in host.parameters()}
    family = FamilialForCausalLM.from_backbone(host, exits=EXITS, exit_norm="shared")
    assert {p.data_ptr() for p in family.parameters()} == weights
    assert family.training is training


def test_early_exits_start_from_copies():
    family = FamilialForCausalLM.from_backbone(
        tiny_model("llama"), exits=EXITS, exit_head="own", num_exit_layers=2
    )
    backbone = family.model.backbone
    for k, sources in enumerate([(1, 2), (3, 3)]):
        part = family.model.exits[k]
        pairs = [(part.norm, backbone.norm), (family.exit_heads[k], family.lm_head)]
        pairs += [(part.layers[j], backbone.layers[i]) for j, i in enumerate(sources)]
        for copied, source in pairs:
            for a, b in zip(copied.parameters(), source.parameters(), strict=True):
                assert torch.equal(a, b)
                assert a.data_ptr() != b.data_ptr()


def test_the_language_model_of_a_composite_becomes_a_family():
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 4}
    text_config = tiny_config("gemma3_text", final_logit_softcapping=None)  # the composite has none
    config = AutoConfig.for_model(
        "gemma3",
        text_config=text_config.to_dict(),
        vision_config=vision,
        mm_tokens_per_image=4,
    )
    torch.manual_seed(0)
    host = AutoModelForCausalLM.from_config(config).eval()
    ids = token_ids()
    right = logits(host, ids)
    family = FamilialForCausalLM.from_backbone(host, exits=EXITS)
    assert family.config.text_config.model_type == "gemma3_text"
    torch.testing.assert_close(logits(family, ids), right)


WRONG = {
    "both": (ValueError, "`exits` or `num_exits`, not both", {"exits": [1, 4], "num_exits": 2}),
    "exits": (ValueError, r"`exits`.*\[1, 9\]", {"exits": [1, 9]}),
    "num-exits": (ValueError, "an integer from 1 to 4", {"num_exits": 5}),
    "kwargs": (TypeError, "'dtype'.*loaded model", {"exits": [1, 4], "dtype": torch.float16}),
    "default": (ValueError, "`default_exit`", {"exits": [1, 4], "default_exit": 2}),
    "layers": (ValueError, "`num_exit_layers`", {"exits": [1, 4], "num_exit_layers": -1}),
    "norm": (ValueError, "`exit_norm`", {"exits": [1, 4], "exit_norm": "none"}),
}


@pytest.mark.parametrize(("error", "message", "arguments"), WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_refused(error, message, arguments):
    host = tiny_model("llama")
    with pytest.raises(error, match=message):
        FamilialForCausalLM.from_backbone(host, **arguments)
    assert host.config.num_hidden_layers == 4
    assert not hasattr(host.config, "exits")


def not_hosts():
    bert = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
    )
    t5 = T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2)
    return {
        "none": (lambda: None, TypeError, "got NoneType"),
        "config": (lambda: tiny_config("llama"), TypeError, "got LlamaConfig"),
        "module": (lambda: torch.nn.Linear(2, 2), TypeError, "got Linear"),
        "encoder": (lambda: BertModel(bert), ValueError, "`bert`.*no language model head"),
        "headless": (lambda: LlamaModel(tiny_config("llama")), ValueError, "LlamaModel has no"),
        "t5": (lambda: AutoModelForSeq2SeqLM.from_config(t5), ValueError, "`t5`"),
        "family": (lambda: family_of("llama"), ValueError, "a family already.*from_pretrained"),
    }


@pytest.mark.parametrize(("make", "error", "message"), not_hosts().values(), ids=not_hosts())
def test_what_is_no_causal_lm_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        FamilialForCausalLM.from_backbone(make(), exits=[1, 2])


@pytest.mark.parametrize("exit_idx", [0, 1])
def test_a_member_is_a_plain_checkpoint(exit_idx, tmp_path):
    """What export will do, by hand: the truncated host saves and loads with stock classes."""
    host = truncated_host(family_of("llama", num_exit_layers=1, exit_head="own"), exit_idx)
    host.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(host)
    assert torch.equal(logits(loaded, token_ids()), logits(host, token_ids()))
