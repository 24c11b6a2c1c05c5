"""Folders that somebody else made: what they name elsewhere stays there, and their code too."""

import json
import logging
import os
import shutil

import pytest
import torch
from hub_server import Blob, Hub, Repo, let_out
from huggingface_hub import constants, snapshot_download
from reference import logits, tiny_family, token_ids
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from hf_familial import FamilialForCausalLM, choose_exit, describe, push_exits_to_hub
from hf_familial.checkpoints.companions import companions
from hf_familial.errors import CheckpointError, HubUnavailableError
from hf_familial.hub import export_exit, export_family


INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def family():
    return tiny_family("llama", [1, 2, 4])


@pytest.fixture
def folder(family, tmp_path):
    family.save_pretrained(tmp_path / "family", by_segment=True)
    return tmp_path / "family"


def attempts(folder, out):
    """All that reads weights of a folder."""
    return (
        lambda: export_exit(folder, 2, out),
        lambda: export_exit(folder, 2, out, format="familial"),
        lambda: describe(folder),
        lambda: FamilialForCausalLM.from_pretrained(folder, max_exit=2),
    )


# files elsewhere


@pytest.mark.parametrize("how", ["absolute", "above", "link", "link to a folder"])
def test_weights_elsewhere_are_not_read(how, folder, tmp_path):
    name = sorted(path.name for path in folder.glob("*.safetensors"))[1]
    (tmp_path / "secret").mkdir()
    elsewhere = tmp_path / "secret" / name
    shutil.move(folder / name, elsewhere)
    index = json.loads((folder / INDEX).read_text())
    places = {"absolute": str(elsewhere), "above": f"../secret/{name}", "link": name}
    place = places.get(how, f"sub/{name}")
    if how == "link":
        (folder / name).symlink_to(elsewhere)
    if how == "link to a folder":
        (folder / "sub").symlink_to(elsewhere.parent)
    index["weight_map"] = {n: place if f == name else f for n, f in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(index))
    for attempt in attempts(folder, tmp_path / "out"):
        with pytest.raises(ValueError, match=r"outside|same folder|leads out"):
            attempt()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["config.json", INDEX, "model.safetensors"])
def test_a_link_that_leads_out_is_refused(name, folder, tmp_path):
    if name == "model.safetensors":
        shutil.rmtree(folder)
        tiny_family("llama", [1, 2, 4]).save_pretrained(folder)
    shutil.move(folder / name, tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    for attempt in attempts(folder, tmp_path / "out")[:3]:
        with pytest.raises(CheckpointError, match="Copy the file into the folder"):
            attempt()


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "LICENSE", "generation_config.json", "additional_chat_templates/a"]
)
@pytest.mark.parametrize("memory", [False, True])
def test_companions_elsewhere_are_not_copied(name, memory, folder, tmp_path):
    (tmp_path / "secret").write_text("secret")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).unlink(missing_ok=True)
    source = FamilialForCausalLM.from_pretrained(folder) if memory else folder
    (folder / name).symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="outside of that folder"):
        export_exit(source, 0, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_links_inside_a_folder_and_a_link_to_the_folder_are_followed(family, folder, tmp_path):
    (folder / "LICENSE.txt").write_text("free")
    (folder / "LICENSE").symlink_to("LICENSE.txt")
    (tmp_path / "link").symlink_to(folder)
    report = export_exit(tmp_path / "link", 2, tmp_path / "out")
    assert {"LICENSE", "LICENSE.txt"} <= set(report.files)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(loaded, token_ids()), logits(family, token_ids()))


def test_names_with_brackets_are_names(family, folder, tmp_path):
    home = tmp_path / "a[1]*?"
    home.mkdir()
    shutil.move(folder, home / "family[0]")
    for _ in range(2):  # the second clears up after the first
        (home / ".out[ab].writing-0123").mkdir(exist_ok=True)
        (home / ".outa.writing-0123").mkdir(exist_ok=True)
        export_exit(home / "family[0]", 0, home / "out[ab]", overwrite=True)
    assert sorted(os.listdir(home)) == [".outa.writing-0123", "family[0]", "out[ab]"]
    loaded = AutoModelForCausalLM.from_pretrained(home / "out[ab]")
    assert torch.equal(logits(loaded, token_ids()), logits(family, token_ids(), exit_idx=0))


# code


def test_a_member_names_no_code_of_its_host(family, tmp_path):
    host = {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.X"}
    family.config.text_config.auto_map = host
    family.config.text_config.custom_pipelines = {"x": {"impl": "x.X", "pt": ["AutoModel"]}}
    try:
        family.save_pretrained(tmp_path / "family")
        for source, out in ((tmp_path / "family", "files"), (family, "memory")):
            export_exit(source, 0, tmp_path / out)
            fields = json.loads((tmp_path / out / "config.json").read_text())
            assert fields.keys().isdisjoint({"auto_map", "custom_pipelines"})
            loaded = AutoModelForCausalLM.from_pretrained(tmp_path / out, trust_remote_code=True)
            assert type(loaded).__module__.startswith("transformers.models.llama")
        assert family.config.text_config.auto_map == host
    finally:
        del family.config.text_config.auto_map, family.config.text_config.custom_pipelines


CODE = """
from transformers import PreTrainedTokenizerFast
from .words_of_mine import WORD

class MyTokenizer(PreTrainedTokenizerFast):
    word = WORD
"""


def write_tokenizer(folder, name="tokenization_mine.MyTokenizer"):
    bare = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=bare).save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    fields = json.loads(path.read_text()) | {"auto_map": {"AutoTokenizer": [None, name]}}
    path.write_text(json.dumps(fields | {"tokenizer_class": "MyTokenizer"}))
    (folder / "tokenization_mine.py").write_text(CODE)
    (folder / "words_of_mine.py").write_text("WORD = 'mine'\n")
    (folder / "other.py").write_text("raise RuntimeError\n")


@pytest.mark.parametrize("where", ["folder", "memory", "hub"])
def test_the_code_of_a_tokenizer_goes_along(where, folder, tmp_path, monkeypatch):
    write_tokenizer(folder)
    source = FamilialForCausalLM.from_pretrained(folder) if where == "memory" else folder
    if where == "hub":
        with hub_of(folder, tmp_path, monkeypatch):
            export_exit("me/fam", 0, tmp_path / "out")
    else:
        export_exit(source, 0, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").glob("*.py")) == [
        "tokenization_mine.py",
        "words_of_mine.py",
    ]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert loaded.word == "mine"


@pytest.mark.parametrize("lost", ["tokenization_mine.py", "words_of_mine.py"])
def test_code_of_a_tokenizer_that_is_missing_is_told(lost, folder, tmp_path, caplog):
    write_tokenizer(folder)
    (folder / lost).unlink()
    with caplog.at_level(logging.WARNING):
        export_exit(folder, 0, tmp_path / "out")
    assert f"needs the file `{lost}`, which is missing" in caplog.text


def test_the_code_of_a_tokenizer_elsewhere_stays_there(folder, tmp_path):
    (tmp_path / "secret.py").write_text("secret = 1\n")
    write_tokenizer(folder, name="../secret.MyTokenizer")
    assert not any("secret" in path.name for path in companions(folder))
    (folder / "tokenization_mine.py").unlink()
    (folder / "tokenization_mine.py").symlink_to(tmp_path / "secret.py")
    write_tokenizer_map(folder, "tokenization_mine.MyTokenizer")
    with pytest.raises(CheckpointError, match="outside of that folder"):
        companions(folder)
    write_tokenizer_map(folder, "me/other--tokenization_mine.MyTokenizer")
    assert not [path for path in companions(folder) if path.suffix == ".py"]


def write_tokenizer_map(folder, name):
    path = folder / "tokenizer_config.json"
    fields = json.loads(path.read_text()) | {"auto_map": {"AutoTokenizer": [name, None]}}
    path.write_text(json.dumps(fields))


# places that cannot be written


def test_an_export_to_a_bad_place_leaves_nothing(family, folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    before = sorted(os.listdir(tmp_path))
    for source in (folder, family):
        for out in ("file/a/b", "new/deep/" + "x" * 300, "x" * 300 + "/deep/out"):
            with pytest.raises(OSError, match="file|xxx"):
                export_exit(source, 0, tmp_path / out)
            with pytest.raises(OSError, match="file|xxx"):
                export_family(source, tmp_path / out)
        full = shutil.disk_usage(tmp_path)._replace(free=10)
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda path, full=full: full)
            with pytest.raises(OSError, match="MiB are free"):
                export_exit(source, 0, tmp_path / "new" / "deep" / "out")
    assert sorted(os.listdir(tmp_path)) == before


# a family in the cache


def hub_of(folder, tmp_path, monkeypatch):
    """A Hub that holds the folder as `me/fam`, running."""
    hub = Hub()
    files = [path for path in folder.iterdir() if path.is_file()]
    tree = {path.name: Blob(path.read_bytes(), lfs=path.suffix == ".safetensors") for path in files}
    hub.repos["me/fam"] = repo = Repo()
    repo.commit("main", tree, "a family")

    class Running:
        def __enter__(self):
            self.running = hub.running()
            found = self.running.__enter__()
            let_out(monkeypatch, tmp_path / "cache", found)
            return found

        def __exit__(self, *args):
            return self.running.__exit__(*args)

    return Running()


@pytest.fixture(params=["segments", "file"])
def cached(request, family, tmp_path, monkeypatch):
    """A family that was downloaded whole, and a Hub that no longer answers."""
    family.save_pretrained(tmp_path / "family", by_segment=request.param == "segments")
    with hub_of(tmp_path / "family", tmp_path, monkeypatch):
        path = snapshot_download("me/fam")
        describe("me/fam")
    assert any(
        (path_ := os.path.join(path, name)) and os.path.islink(path_) for name in os.listdir(path)
    )
    return tmp_path / "family"


@pytest.mark.parametrize("mode", ["offline", "no answer", "local files only"])
def test_a_cached_family_is_described_without_the_hub(mode, cached, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", mode == "offline")
    options = {"local_files_only": True} if mode == "local files only" else {}
    found, right = describe("me/fam", **options).to_dict(), describe(cached).to_dict()
    assert found | {"name": ""} == right | {"name": ""}
    assert choose_exit("me/fam", memory="1GB", **options).exit_idx == 2


@pytest.mark.parametrize("mode", ["offline", "no answer"])
def test_a_cached_family_is_exported_and_cut_without_the_hub(
    mode, cached, family, tmp_path, monkeypatch
):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", mode == "offline")
    right = logits(family, token_ids(), exit_idx=1)
    export_exit("me/fam", 1, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(loaded, token_ids()), right)
    cut = FamilialForCausalLM.from_pretrained("me/fam", max_exit=1, local_files_only=True)
    assert torch.equal(logits(cut, token_ids()), right)


def test_a_cached_family_is_pushed_to_another_hub(cached, monkeypatch):
    with Hub().running() as other:
        report = push_exits_to_hub("me/fam", "me/new", endpoint=other.url, collection=False)
        assert [row.changed for row in report.pushed] == [True] * 3


def test_what_is_not_in_the_cache_is_refused(cached, monkeypatch):
    with pytest.raises(FileNotFoundError, match="not in the local cache"):
        describe("me/absent", local_files_only=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubUnavailableError, match="HF_HUB_OFFLINE|not in the cache"):
        describe("me/absent")
