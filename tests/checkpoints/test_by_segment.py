"""Families saved by segment: a member needs the first files only, and reads no others."""

import json
import shutil

import pytest
import torch
from hub.hub_server import Blob, Hub, Repo, let_out
from huggingface_hub import constants
from reference import logits, stir, tiny_family, token_ids
from safetensors.torch import load_file
from support import family_of
from transformers import AutoModelForCausalLM, GenerationConfig

from hf_familial import FamilialForCausalLM, FamilialModel
from hf_familial.checkpoints import by_segment, partial_load, plain_tensors
from hf_familial.checkpoints.safetensors_file import read_header
from hf_familial.errors import CutError
from hf_familial.hub import export_exit


EXITS = [1, 3, 4]
SHAPES = {
    "own": {"num_exit_layers": 1, "exit_norm": "own", "exit_head": "own"},
    "shared": {"exit_norm": "shared", "exit_head": "shared"},
    "mixed": {"num_exit_layers": 1, "exit_norm": "shared", "exit_head": "own"},
}


def shards_of(folder):
    return sorted(folder.glob("model-*.safetensors"))


def held(folder):
    return [set(read_header(path)) for path in shards_of(folder)]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("tied", [False, True])
def test_each_file_holds_what_its_exit_adds(shape, tied, tmp_path):
    family = family_of(tied=tied, **shape)
    family.save_pretrained(tmp_path, by_segment=True)
    found = held(tmp_path)
    assert len(found) == 3
    owner = {}
    for k, names in enumerate(found):
        for name in names:
            owner[name] = k
    for name, k in owner.items():
        parts = name.split(".")
        if name.startswith("model.backbone.layers."):
            assert k == [0, 1, 1, 2][int(parts[3])]
        elif name.startswith(("model.exits.", "exit_heads.")):
            assert k == int(parts[2] if parts[0] == "model" else parts[1])
    assert owner["model.backbone.embed_tokens.weight"] == 0
    assert owner["model.backbone.norm.weight"] == (2 if shape["exit_norm"] == "own" else 0)
    if not tied:
        assert owner["lm_head.weight"] == (2 if shape["exit_head"] == "own" else 0)
    assert ("lm_head.weight" in owner) is not tied
    # no member needs a file beyond its own, and each needs all up to it
    for k in range(3):
        needed = {owner[name] for name in plain_tensors(family.config, k, owner)}
        assert needed == set(range(k + 1))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = [path.name for path in shards_of(tmp_path)]
    assert index["weight_map"] == {name: files[k] for name, k in owner.items()}
    size = sum(t.nbytes for path in shards_of(tmp_path) for t in load_file(path).values())
    assert index["metadata"]["total_size"] == size
    assert index["metadata"]["total_parameters"] == family.num_parameters()


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral", "falcon_h1"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_whole_loads_as_ever(model_type, shape, tmp_path):
    family = family_of(model_type, **shape)
    family.save_pretrained(tmp_path, by_segment=True)
    for cls in (AutoModelForCausalLM, FamilialForCausalLM):
        loaded, info = cls.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values())
        for k in range(3):
            found = logits(loaded, token_ids(), exit_idx=k)
            assert torch.equal(found, logits(family, token_ids(), exit_idx=k))


def test_when_a_family_is_split(tmp_path, monkeypatch):
    family = family_of()

    def files(folder, **options):
        family.save_pretrained(tmp_path / folder, **options)
        return len(list((tmp_path / folder).glob("*.safetensors")))

    assert files("small") == 1
    assert files("asked", by_segment=True) == 3
    monkeypatch.setattr(by_segment, "SPLIT_FROM", 1000)
    assert files("large") == 3
    assert files("one", by_segment=False) == 1
    assert files("variant", variant="fp32", by_segment=True) == 1
    dense = tiny_family("llama", [4])
    dense.save_pretrained(tmp_path / "dense", by_segment=True)
    assert (tmp_path / "dense" / "model.safetensors").is_file()
    family.model.save_pretrained(tmp_path / "headless", by_segment=True)
    assert type(FamilialModel.from_pretrained(tmp_path / "headless")) is FamilialModel


def test_large_segments_are_split_further(tmp_path):
    family = family_of(**SHAPES["own"])
    family.save_pretrained(tmp_path, by_segment=True, max_shard_size="20KB")
    found = held(tmp_path)
    assert len(found) > 6
    groups = [
        {by_segment.segment_of(name, family.config, "layers", "norm") for name in names}
        for names in found
    ]
    assert all(len(group) == 1 for group in groups)
    assert [min(g) for g in groups] == sorted(min(g) for g in groups)
    for path in shards_of(tmp_path):
        tensors = load_file(path)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 20_000
    loaded = FamilialForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, token_ids()), logits(family, token_ids()))


@pytest.mark.parametrize("first", [True, False])
def test_an_earlier_checkpoint_in_the_folder_is_replaced(first, tmp_path):
    old, new = family_of(), stir(family_of(**SHAPES["own"]), seed=9)
    old.save_pretrained(tmp_path, by_segment=first, max_shard_size="20KB" if first else "5GB")
    new.save_pretrained(tmp_path, by_segment=True)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    loaded = FamilialForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, token_ids()), logits(new, token_ids()))
    old.save_pretrained(tmp_path, by_segment=False)
    loaded = FamilialForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, token_ids()), logits(old, token_ids()))


# up to an exit


@pytest.fixture
def read(monkeypatch):
    """Bytes of tensors that are read, by name."""
    sizes = {}
    real = partial_load.safe_open

    class Opened:
        def __init__(self, *args, **kwargs):
            self.file = real(*args, **kwargs)

        def __enter__(self):
            self.file.__enter__()
            return self

        def __exit__(self, *args):
            return self.file.__exit__(*args)

        def keys(self):
            return self.file.keys()

        def get_slice(self, name):
            return Slice(name, self.file.get_slice(name))

    class Slice:
        def __init__(self, name, inner):
            self.name, self.inner = name, inner

        def __getitem__(self, key):
            tensor = self.inner[key]
            sizes[self.name] = sizes.get(self.name, 0) + tensor.nbytes
            return tensor

        def __getattr__(self, name):
            return getattr(self.inner, name)

    monkeypatch.setattr(partial_load, "safe_open", Opened)
    return sizes


@pytest.mark.parametrize("by_segment", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("max_exit", [0, 1, -1])
@pytest.mark.parametrize("cls", [FamilialForCausalLM, AutoModelForCausalLM])
def test_only_what_it_runs_is_read(by_segment, shape, max_exit, cls, read, tmp_path):
    family = family_of(**shape)
    family.save_pretrained(tmp_path, by_segment=by_segment)
    k = family.config.resolve_exit(max_exit)
    for path in shards_of(tmp_path)[k + 1 :]:
        path.unlink()
    loaded, info = cls.from_pretrained(tmp_path, max_exit=max_exit, output_loading_info=True)
    assert type(loaded) is FamilialForCausalLM
    assert not any(info.values())
    private = shape.get("num_exit_layers", 0) if k < 2 else 0
    assert loaded.config.exits == [*EXITS[:k], EXITS[k] + private]
    for j in range(k + 1):
        found = logits(loaded, token_ids(), exit_idx=j)
        assert torch.equal(found, logits(family, token_ids(), exit_idx=j))
    # every tensor once, and no other
    assert sum(read.values()) == sum(p.nbytes for p in loaded.parameters())
    assert len(read) == len(loaded.state_dict())


def test_a_missing_file_is_an_error(tmp_path):
    family_of().save_pretrained(tmp_path, by_segment=True)
    shards_of(tmp_path)[0].unlink()
    with pytest.raises(OSError, match="model-00001-of-00003"):
        FamilialForCausalLM.from_pretrained(tmp_path, max_exit=0)


def test_what_is_loaded_is_a_family_like_any_other(tmp_path):
    family = family_of(default_exit=0, **SHAPES["own"])
    family.generation_config = GenerationConfig(temperature=0.3, do_sample=True)
    family.save_pretrained(tmp_path / "family", by_segment=True)
    loaded = FamilialForCausalLM.from_pretrained(
        tmp_path / "family", max_exit=1, dtype=torch.bfloat16, attn_implementation="eager"
    )
    assert loaded.dtype == torch.bfloat16
    assert loaded.model.backbone.config._attn_implementation == "eager"
    assert loaded.generation_config.temperature == 0.3
    assert loaded.name_or_path == str(tmp_path / "family")
    assert loaded.config.resolve_exit() == 0
    loaded = FamilialForCausalLM.from_pretrained(tmp_path / "family", max_exit=1, default_exit=1)
    assert loaded.config.resolve_exit() == 1
    loaded.save_pretrained(tmp_path / "again", by_segment=True)
    again = FamilialForCausalLM.from_pretrained(tmp_path / "again")
    for k in range(2):
        found = logits(again, token_ids(), exit_idx=k)
        assert torch.equal(found, logits(family, token_ids(), exit_idx=k))
    export_exit(tmp_path / "family", 1, tmp_path / "cut", format="familial", by_segment=True)
    assert held(tmp_path / "again") == held(tmp_path / "cut")
    ids = token_ids()
    text = again.generate(ids, max_new_tokens=4, do_sample=False)
    right = family.generate(ids, exit_idx=1, max_new_tokens=4, do_sample=False)
    assert torch.equal(text, right)


@pytest.mark.parametrize("tied", [False, True])
def test_headless(tied, tmp_path):
    family = family_of(tied=tied, **SHAPES["own"])
    family.save_pretrained(tmp_path, by_segment=True)
    loaded = FamilialModel.from_pretrained(tmp_path, max_exit=0)
    with torch.no_grad():
        found = loaded(token_ids(), use_cache=False).last_hidden_state
        right = family.model(token_ids(), exit_idx=0, use_cache=False).last_hidden_state
    assert torch.equal(found, right)


def test_errors(tmp_path):
    family_of().save_pretrained(tmp_path / "family")
    with pytest.raises(IndexError, match="`exit_idx` must be between -3 and 2, got 3"):
        FamilialForCausalLM.from_pretrained(tmp_path / "family", max_exit=3)
    with pytest.raises(TypeError, match="integer"):
        FamilialForCausalLM.from_pretrained(tmp_path / "family", max_exit="0")
    family_of("minicpm3").save_pretrained(tmp_path / "scaled")
    with pytest.raises(CutError, match="residual branch"):
        FamilialForCausalLM.from_pretrained(tmp_path / "scaled", max_exit=0)
    assert (
        FamilialForCausalLM.from_pretrained(tmp_path / "scaled", max_exit=2).config.exits == EXITS
    )


# from the Hub


@pytest.mark.parametrize("what", ["family", "plain", "familial"])
@pytest.mark.parametrize("exit_idx", [0, 1, 2])
def test_of_a_repository_only_the_files_needed_are_sent(what, exit_idx, tmp_path, monkeypatch):
    family = family_of(**SHAPES["own"])
    folder = tmp_path / "family"
    family.save_pretrained(folder, by_segment=True)
    sizes = {path.name: path.stat().st_size for path in shards_of(folder)}
    with Hub().running() as hub:
        let_out(monkeypatch, tmp_path / "cache", hub)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        hub.repos["me/fam"] = repo = Repo()
        tree = {
            p.name: Blob(p.read_bytes(), lfs=p.suffix == ".safetensors") for p in folder.iterdir()
        }
        repo.commit("main", tree, "a family")
        if what == "family":
            loaded = FamilialForCausalLM.from_pretrained("me/fam", max_exit=exit_idx)
            asked = {"exit_idx": exit_idx}
        else:
            export_exit("me/fam", exit_idx, tmp_path / "out", format=what)
            loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
            asked = {}
        right = logits(family, token_ids(), exit_idx=exit_idx)
        assert torch.equal(logits(loaded, token_ids(), **asked), right)
        sent = sum(
            n for path, n in hub.sent.items() if "safetensors" in path and "index" not in path
        )
    wanted = list(sizes.values())[: exit_idx + 1]
    assert sent == sum(wanted), hub.sent
    shutil.rmtree(tmp_path / "cache")
