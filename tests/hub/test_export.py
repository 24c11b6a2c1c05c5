"""Members as checkpoints of their own, loaded by stock transformers in a process of its own."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from backbones import tiny_config, tiny_model
from reference import logits, tiny_family, token_ids, truncated_config
from safetensors.torch import load_file
from support import family_of
from tokenizers import Tokenizer, models
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from hf_familial import FamilialConfig, FamilialForCausalLM
from hf_familial.errors import CutError
from hf_familial.hub import ExportReport, export_exit, export_family


TYPES = (
    "llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "olmo2", "phi3", "granite",
    "cohere2", "gpt2", "gpt_neox", "mixtral", "falcon_h1", "opt",
)  # fmt: skip
EXITS = [1, 3, 4]
SHAPES = [
    {"exit_norm": norm, "exit_head": head, "num_exit_layers": private, "tied": tied}
    for norm, head, private, tied in itertools.product(
        ("own", "shared"), ("own", "shared"), (0, 1), (False, True)
    )
]


def ask_stock_client(folders, tmp_path):
    """What a process without this package makes of folders."""
    client = Path(__file__).with_name("stock_client.py")
    (tmp_path / "folders.json").write_text(json.dumps([str(folder) for folder in folders]))
    command = [sys.executable, client, tmp_path / "answers.pt", tmp_path / "folders.json"]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    return torch.load(tmp_path / "answers.pt")


def check_members(cases, tmp_path, exits=(0, 1, 2), sources=("files", "memory")):
    """Plain members, from files and from memory, are what the exits compute."""
    right = {}
    for model_type, shape in cases:
        family = family_of(model_type, **shape)
        name = "-".join([model_type, *map(str, shape.values())])
        family.save_pretrained(tmp_path / name / "family", by_segment=True)
        for k, source in itertools.product(exits, sources):
            folder = tmp_path / name / f"{source}{k}"
            report = export_exit(
                family if source == "memory" else tmp_path / name / "family", k, folder
            )
            assert report.depth == EXITS[k] + (shape["num_exit_layers"] if k < 2 else 0)
            right[str(folder)] = logits(family, token_ids(), exit_idx=k), report.architecture
    answers = ask_stock_client(right, tmp_path)
    for folder, (expected, architecture) in right.items():
        found = answers[folder]
        assert found["wrong"] == {}, folder
        assert found["class"] == architecture
        assert torch.equal(found["logits"], expected), folder


@pytest.mark.parametrize("source", ["files", "memory"])
def test_stock_transformers_computes_what_the_exit_computes(source, tmp_path):
    # each choice meets every other once
    cases = [("llama", SHAPES[i]) for i in (0, 7, 9, 14)]
    check_members(cases, tmp_path, sources=[source])


def test_every_type_from_files(tmp_path):
    cases = [(t, SHAPES[(5 * i + 2) % 16]) for i, t in enumerate(TYPES)]
    check_members(cases, tmp_path, exits=[1], sources=["files"])


@pytest.mark.slow
@pytest.mark.parametrize("model_type", TYPES)
def test_every_type_in_every_shape(model_type, tmp_path):
    check_members([(model_type, shape) for shape in SHAPES], tmp_path)


def test_what_a_member_keeps_byte_for_byte(tmp_path):
    family = family_of("llama", num_exit_layers=1, exit_head="own")
    family.save_pretrained(tmp_path / "family", max_shard_size="40KB", by_segment=False)
    assert len(list((tmp_path / "family").glob("*.safetensors"))) > 2
    report = export_exit(tmp_path / "family", 0, tmp_path / "out")
    weights, found = family.state_dict(), load_file(tmp_path / "out" / "model.safetensors")
    expected = {
        "model.embed_tokens.weight": "model.backbone.embed_tokens.weight",
        "model.norm.weight": "model.exits.0.norm.weight",
        "lm_head.weight": "exit_heads.0.weight",
    }
    parts = [n.removeprefix("model.layers.0.") for n in found if n.startswith("model.layers.0.")]
    assert len(parts) == 9
    for part in parts:
        expected[f"model.layers.0.{part}"] = f"model.backbone.layers.0.{part}"
        expected[f"model.layers.1.{part}"] = f"model.exits.0.layers.0.{part}"
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[new], weights[old]) for new, old in expected.items())
    assert isinstance(report, ExportReport)
    assert (report.exit_idx, report.depth, report.tensors) == (0, 2, 21)
    assert report.format == "plain"
    assert report.architecture == "LlamaForCausalLM"
    assert report.dtype == "float32"
    assert report.files == ("config.json", "generation_config.json", "model.safetensors")
    assert report.nbytes == (tmp_path / "out" / "model.safetensors").stat().st_size


@pytest.mark.parametrize(
    "model_type", ["qwen2", "smollm3", "gemma3_text", "llama4_text", "jamba", "gpt_neo", "xlstm"]
)
@pytest.mark.parametrize("source", ["files", "memory"])
def test_the_config_is_the_hosts_own(model_type, source, tmp_path):
    family = tiny_family(model_type, [2, 5, 6], depth=6)
    family.save_pretrained(tmp_path / "family")
    export_exit(family if source == "memory" else tmp_path / "family", 1, tmp_path / "out")
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    host = tiny_config(model_type, 6)
    assert fields["model_type"] == model_type
    assert fields["architectures"] == [type(AutoModelForCausalLM.from_config(host)).__name__]
    assert fields["dtype"] == "float32"
    assert "transformers_version" in fields
    strange = {"exits", "num_exit_layers", "exit_norm", "exit_head", "text_config", "auto_map"}
    assert not strange & fields.keys()
    loaded = AutoConfig.from_pretrained(tmp_path / "out")
    assert type(loaded) is type(host)
    assert loaded.num_hidden_layers == 5
    loaded.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == fields
    right = truncated_config(host, 5) if model_type not in ("gpt_neo", "xlstm") else loaded
    for name in ("layer_types", "no_rope_layers", "mlp_layer_types", "attention_layers"):
        values = getattr(loaded, name, None)
        assert values == getattr(right, name, None), name
        assert values is None or len(values) == 5
    assert family.config.text_config.num_hidden_layers == 6


def test_whether_the_head_is_tied(tmp_path):
    family = family_of("llama", tied=True, exit_head="own")
    family.save_pretrained(tmp_path / "family")
    for k, tied in ((0, False), (1, False), (2, True)):
        export_exit(tmp_path / "family", k, tmp_path / str(k))
        fields = json.loads((tmp_path / str(k) / "config.json").read_text())
        assert fields.get("tie_word_embeddings", False) is tied
        names = load_file(tmp_path / str(k) / "model.safetensors").keys()
        assert ("lm_head.weight" in names) is not tied
        assert "model.embed_tokens.weight" in names


def test_tokenizer_generation_config_and_licence_go_along(tmp_path):
    family = family_of("llama")
    family.generation_config = GenerationConfig(temperature=0.3, do_sample=True, eos_token_id=7)
    family.save_pretrained(tmp_path / "family")
    words = Tokenizer(models.WordLevel({"<pad>": 0, "a": 1, "b": 2}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>")
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(tmp_path / "family")
    (tmp_path / "family" / "LICENSE").write_text("free")
    (tmp_path / "family" / "README.md").write_text("a family")
    (tmp_path / "family" / "optimizer.pt").write_bytes(b"not weights")
    reloaded = FamilialForCausalLM.from_pretrained(tmp_path / "family")
    for name, source in (("files", tmp_path / "family"), ("memory", reloaded)):
        export_exit(source, 0, tmp_path / name)
        found = AutoTokenizer.from_pretrained(tmp_path / name)
        assert found.get_vocab() == tokenizer.get_vocab()
        assert found.chat_template == "{{ messages }}"
        generation = GenerationConfig.from_pretrained(tmp_path / name)
        assert (generation.temperature, generation.eos_token_id) == (0.3, 7)
        assert (tmp_path / name / "LICENSE").read_text() == "free"
        left = {path.name for path in (tmp_path / name).iterdir()}
        assert not {"README.md", "optimizer.pt"} & left
        assert not any(file.endswith(".py") for file in left)


def test_a_smaller_family(tmp_path):
    family = family_of("llama", num_exit_layers=1, exit_head="own", default_exit=1)
    family.save_pretrained(tmp_path / "family")
    for source in (family, tmp_path / "family"):
        reports = export_family(
            source, tmp_path / type(source).__name__, format="familial", by_segment=True
        )
        for k, report in enumerate(reports):
            smaller = FamilialForCausalLM.from_pretrained(report.path)
            assert smaller.config.exits == [[2], [1, 4], [1, 3, 4]][k]
            assert smaller.config.resolve_exit() == [0, 1, 1][k]
            assert (report.path / "modeling_familial.py").is_file()
            assert len(list(report.path.glob("*.safetensors"))) == k + 1
            for j in range(k + 1):
                found = logits(smaller, token_ids(), exit_idx=j)
                assert torch.equal(found, logits(family, token_ids(), exit_idx=j))
    ours, theirs = (
        sorted(p.name for p in (tmp_path / n / "exit_1").iterdir())
        for n in (type(family).__name__, type(tmp_path).__name__)
    )
    assert ours == theirs


def test_a_smaller_family_loads_with_its_own_code_alone(tmp_path):
    family = family_of("llama")
    family.save_pretrained(tmp_path / "family")
    export_exit(tmp_path / "family", 1, tmp_path / "out", format="familial")
    script = (
        "import sys, torch; sys.path.insert(0, sys.argv[1]); import stock_client\n"
        "from transformers import AutoModelForCausalLM\n"
        "m = AutoModelForCausalLM.from_pretrained(sys.argv[2], trust_remote_code=True)\n"
        "logits = m(stock_client.IDS, exit_idx=0, use_cache=False).logits\n"
        "torch.save(logits.detach(), sys.argv[3])\n"
    )
    arguments = [str(Path(__file__).parent), str(tmp_path / "out"), str(tmp_path / "logits.pt")]
    subprocess.run(
        [sys.executable, "-c", script, *arguments],
        check=True,
        capture_output=True,
        cwd=tmp_path,
        env={"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
    )
    found = torch.load(tmp_path / "logits.pt")
    assert torch.equal(found, logits(family, token_ids(), exit_idx=0))


def test_all_exits_or_some(tmp_path):
    family = family_of("llama")
    assert [r.path.name for r in export_family(family, tmp_path / "all")] == [
        "exit_0",
        "exit_1",
        "exit_2",
    ]
    reports = export_family(family, tmp_path / "some", exits=[-1, 0, 2])
    assert [r.exit_idx for r in reports] == [2, 0]


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16, "float64"])
@pytest.mark.parametrize("format", ["plain", "familial"])
def test_dtypes(dtype, format, tmp_path):  # noqa: A002
    family = family_of("llama", num_exit_layers=1)
    family.save_pretrained(tmp_path / "family")
    for source in (family, tmp_path / "family"):
        out = tmp_path / type(source).__name__
        report = export_exit(source, 0, out, dtype=dtype, format=format)
        name = str(dtype).removeprefix("torch.")
        assert report.dtype == name
        loaded = AutoModelForCausalLM.from_pretrained(out)
        assert loaded.dtype == getattr(torch, name)
        wide = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        right = logits(family, token_ids(), exit_idx=0)
        error = (logits(wide, token_ids()) - right).abs().max() / right.abs().max()
        assert error <= {"bfloat16": 3e-2, "float16": 3e-3, "float64": 0.0}[name]
    one, two = (load_file(tmp_path / type(s).__name__ / "model.safetensors") for s in (family, out))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[n], two[n]) for n in one)
    assert family.dtype == torch.float32


def test_shards(tmp_path):
    family = family_of("llama")
    family.save_pretrained(tmp_path / "family")
    report = export_exit(tmp_path / "family", 1, tmp_path / "out", max_shard_size="30KB")
    shards = [name for name in report.files if name.endswith(".safetensors")]
    assert len(shards) > 2
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    held = [load_file(tmp_path / "out" / shard) for shard in shards]
    assert index["weight_map"] == {
        n: s for s, tensors in zip(shards, held, strict=True) for n in tensors
    }
    assert index["metadata"]["total_size"] == sum(t.nbytes for h in held for t in h.values())
    assert all(len(h) == 1 or sum(t.nbytes for t in h.values()) <= 30_000 for h in held)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(loaded, token_ids()), logits(family, token_ids(), exit_idx=1))


# what is refused


REFUSED = {
    "residual-scale": ("minicpm3", {}, 0, "scale of every residual branch"),
    "last-layer": ("gpt_neox_japanese", {}, 1, "only the last layer"),
    "layer-constants": ("diffllama", {"num_exit_layers": 2}, 1, "the index of a layer decides"),
    "layer-kinds": ("jamba", {"num_exit_layers": 2}, 1, "which layers attend"),
}


@pytest.mark.parametrize(("model_type", "fields", "k", "message"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("format", ["plain", "familial"])
def test_what_would_not_be_exact_is_refused(model_type, fields, k, message, format, tmp_path):  # noqa: A002
    family = family_of(model_type, **fields)
    family.save_pretrained(tmp_path / "family")
    for source in (family, tmp_path / "family"):
        with pytest.raises(CutError, match=message):
            export_exit(source, k, tmp_path / "out", format=format)
        with pytest.raises(CutError, match=message):
            export_family(source, tmp_path / "out", format=format)
    assert not (tmp_path / "out").exists()
    assert export_exit(tmp_path / "family", 2, tmp_path / "out").depth == 4


def test_private_layers_within_the_depth_are_exact_there(tmp_path):
    family = family_of("diffllama", exits=[1, 2, 4], num_exit_layers=2)
    export_exit(family, 1, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(loaded, token_ids()), logits(family, token_ids(), exit_idx=1))


def test_types_never_tried_are_checked_in_memory_and_refused_from_files(tmp_path, monkeypatch):
    from hf_familial.checkpoints import cuts, member_models

    for module in (member_models, cuts):
        monkeypatch.setattr(module, "VERIFIED", frozenset())
    for model_type, exact in (("llama", True), ("minicpm3", False)):
        monkeypatch.setattr(cuts, "DEPTH_MATTERS", {})
        family = family_of(model_type).train()
        family.save_pretrained(tmp_path / model_type)
        with pytest.raises(CutError, match=f"`{model_type}`.*not tested"):
            export_exit(tmp_path / model_type, 0, tmp_path / "out")
        if exact:
            export_exit(family, 0, tmp_path / "exact")
        else:
            with pytest.raises(CutError, match="logits of a truncated host differ"):
                export_exit(family, 0, tmp_path / "out")
        assert family.training
    assert not (tmp_path / "out").exists()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "exact")
    right = logits(family_of("llama"), token_ids(), exit_idx=0)
    assert torch.equal(logits(loaded, token_ids()), right)


WRONG = {
    "exit": (IndexError, "got 3. This family has", {"exit_idx": 3}),
    "format": (ValueError, "`format`.*plain, familial.*'gguf'", {"format": "gguf"}),
    "dtype": (ValueError, "`dtype`.*'int4'", {"dtype": "int4"}),
    "shards": (ValueError, "`max_shard_size`.*0", {"max_shard_size": 0}),
    "unit": (ValueError, "5 parsecs", {"max_shard_size": "5 parsecs"}),
}


@pytest.mark.parametrize(("error", "message", "arguments"), WRONG.values(), ids=WRONG)
def test_wrong_arguments_leave_nothing(error, message, arguments, tmp_path):
    family = family_of("llama")
    family.save_pretrained(tmp_path / "family")
    for source in (family, tmp_path / "family"):
        with pytest.raises(error, match=message):
            export_exit(source, **({"exit_idx": 0, "out": tmp_path / "out"} | arguments))
    assert [path.name for path in tmp_path.iterdir()] == ["family"]


def test_what_is_no_family(tmp_path):
    with pytest.raises(TypeError, match="LlamaForCausalLM"):
        export_exit(tiny_model("llama"), 0, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="no folder"):
        export_exit(tmp_path / "missing", 0, tmp_path / "out")
    tiny_model("llama").save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="`llama`, not a family"):
        export_exit(tmp_path / "plain", 0, tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no `config.json`"):
        export_exit(tmp_path / "empty", 0, tmp_path / "out")
    family_of("llama").config.save_pretrained(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="neither `model.safetensors` nor"):
        export_exit(tmp_path / "empty", 0, tmp_path / "out")
    with torch.device("meta"):
        hollow = FamilialForCausalLM(FamilialConfig(text_config=tiny_config("llama")))
    with pytest.raises(ValueError, match="no weights in memory"):
        export_exit(hollow, 0, tmp_path / "out")


@pytest.mark.parametrize("kind", ["single", "index", "sharded"])
def test_pickles_are_refused(kind, tmp_path):
    family = family_of("llama")
    family.config.save_pretrained(tmp_path / "family")
    if kind == "single":
        torch.save(family.state_dict(), tmp_path / "family" / "pytorch_model.bin")
    else:
        name = f"{'model.safetensors' if kind == 'index' else 'pytorch_model.bin'}.index.json"
        index = {"weight_map": dict.fromkeys(family.state_dict(), "pytorch_model.bin")}
        (tmp_path / "family" / name).write_text(json.dumps(index))
    from hf_familial.errors import PickleCheckpointError

    with pytest.raises(PickleCheckpointError):
        export_exit(tmp_path / "family", 0, tmp_path / "out")


def test_a_headless_checkpoint_and_a_quantised_one(tmp_path):
    family = family_of("llama")
    family.model.save_pretrained(tmp_path / "headless")
    with pytest.raises(CutError, match="no tensors of layer 0, its output head"):
        export_exit(tmp_path / "headless", 0, tmp_path / "out")
    family.save_pretrained(tmp_path / "family")
    path = tmp_path / "family" / "config.json"
    fields = json.loads(path.read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    path.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="quantised"):
        export_exit(tmp_path / "family", 0, tmp_path / "out")
    assert not (tmp_path / "out").exists()
