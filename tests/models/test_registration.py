"""What a fresh interpreter sees: with the package, with remote code alone, with neither."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from reference import logits, tiny_family, token_ids
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import hf_familial


ROOM = Path(hf_familial.__file__).parent / "models" / "familial"
SHAPES = {
    "llama": ("llama", {"num_exit_layers": 1, "exit_head": "own"}),
    "gpt2": ("gpt2", {"exit_norm": "shared"}),
}

# printed by a subprocess: the logits of every exit and a text of each
SHOW = """
import json, sys
import torch
ids = torch.tensor(json.loads(sys.argv[2]))
with torch.no_grad():
    logits = [model(ids, exit_idx=k, use_cache=False).logits.tolist() for k in range(3)]
limits = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
texts = [model.generate(ids, exit_idx=k, **limits).tolist() for k in range(3)]
print()  # transformers may have asked a question here
print(json.dumps({"logits": logits, "texts": texts}))
"""
WITH_IMPORT = """
import importlib, sys, warnings
warnings.simplefilter("error", UserWarning)
import hf_familial
importlib.import_module("hf_familial.models.familial")
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
warnings.simplefilter("default")
assert type(AutoConfig.from_pretrained(sys.argv[1])) is hf_familial.FamilialConfig
assert type(AutoModel.from_pretrained(sys.argv[1])) is hf_familial.FamilialModel
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert type(model) is hf_familial.FamilialForCausalLM
"""
REMOTE = """
import sys
sys.modules["hf_familial"] = None  # as if it were not installed
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, pipeline
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1])
except ValueError as error:
    assert "trust_remote_code=True" in str(error)
else:
    raise AssertionError("it was loaded without leave to run its code")
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules."), type(model)
bare = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
assert type(bare).__name__ == "FamilialModel"
assert type(AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)) is type(model.config)
write = pipeline("text-generation", model=sys.argv[1], trust_remote_code=True)
text = write("w9 w10", max_new_tokens=3, exit_idx=0)[0]["generated_text"]
assert text.startswith("w9 w10"), text
import torch

ids = torch.tensor([[9, 10, 11]])
plain = model.generate(ids, max_new_tokens=6, do_sample=False)
assert torch.equal(model.relay_generate(ids, max_new_tokens=6, do_sample=False), plain)
relay = model.policies["speculative"](draft_exit=0, draft_length=2)
assert torch.equal(model.relay_generate(ids, max_new_tokens=6, do_sample=False, relay=relay), plain)
relay = model.policies["fixed"](exit_idx=0)
shallow = model.generate(ids, max_new_tokens=6, do_sample=False, exit_idx=0)
found = model.relay_generate(ids, max_new_tokens=6, do_sample=False, relay=relay)
assert torch.equal(found, shallow)
for lost, call in {
    "from_backbone": lambda: type(model).from_backbone("gpt2"),
    "max_exit": lambda: type(model).from_pretrained(sys.argv[1], max_exit=0),
    "by_segment": lambda: model.save_pretrained(sys.argv[3], by_segment=True),
}.items():
    try:
        call()
    except ImportError as error:
        assert lost in str(error) and "needs the package `hf_familial`" in str(error), error
    else:
        raise AssertionError(lost)

model.train()
optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
losses = []
for _ in range(2):
    output = model(ids, labels=ids, skip_logits=True)
    assert output.exit_losses.shape == (3,) and output.logits is None
    output.loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(float(output.loss))
assert losses[1] < losses[0], losses
del model, bare
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
model.save_pretrained(sys.argv[3])
model = AutoModelForCausalLM.from_pretrained(sys.argv[3], trust_remote_code=True)
loaded = {name for name, module in sys.modules.items() if module is not None}
assert not [name for name in loaded if name.split(".")[0] == "hf_familial"]
"""


def run(code, *arguments, home):
    """A fresh interpreter that finds nothing of this process's, its standard input closed."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))
    }
    environment |= {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=home,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )


def succeed(code, *arguments, home):
    done = run(code, *arguments, home=home)
    assert done.returncode == 0, done.stderr
    return done


def shown(done):
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Folder of a saved family and what it must say, by the name of its shape."""
    vocabulary = {"<pad>": 0, **{f"w{i}": i for i in range(1, 128)}}
    bare = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    bare.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, pad_token="<pad>")

    def make(shape):
        model_type, fields = SHAPES[shape]
        family = tiny_family(model_type, [1, 3, 4], **fields)
        folder = tmp_path_factory.mktemp("checkpoint")
        family.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        ids = token_ids(2, 8)
        limits = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        right = {
            "logits": [logits(family, ids, exit_idx=k).tolist() for k in range(3)],
            "texts": [family.generate(ids, exit_idx=k, **limits).tolist() for k in range(3)],
        }
        return folder, json.dumps(ids.tolist()), right

    return make


def test_an_import_registers_everything_and_says_nothing(checkpoint, tmp_path):
    folder, ids, right = checkpoint("llama")
    done = succeed(WITH_IMPORT + SHOW, folder, ids, home=tmp_path)
    assert shown(done) == right
    assert len(done.stdout.split()) == len(json.dumps(right).split())
    assert "amilial" not in done.stderr


@pytest.mark.parametrize("shape", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_remote_code_is_enough_and_nothing_less(shape, checkpoint, tmp_path):
    folder, ids, right = checkpoint(shape)
    again = tmp_path / "again"
    done = succeed(REMOTE + SHOW, folder, ids, again, home=tmp_path)
    assert shown(done) == right
    shipped = {path.name: path.read_text() for path in folder.glob("*.py")}
    assert {path.name: path.read_text() for path in again.glob("*.py")} == shipped
    assert (again / "config.json").read_text() == (folder / "config.json").read_text()


def test_the_tables_of_names_know_it():
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_MAPPING_NAMES,
    )

    assert MODEL_MAPPING_NAMES["familial"] == "FamilialModel"
    assert MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["familial"] == "FamilialForCausalLM"


def test_a_checkpoint_carries_its_code_whole(checkpoint):
    folder, _, _ = checkpoint("llama")
    shipped = {path.name: path.read_text() for path in folder.glob("*.py")}
    assert set(shipped) == {path.name for path in ROOM.glob("*.py")} - {"__init__.py"}
    for name, source in shipped.items():
        assert source == (ROOM / name).read_text(), name
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                tops = {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1
                assert f"{node.module}.py" in shipped
                continue
            elif isinstance(node, ast.ImportFrom):
                tops = {node.module.split(".")[0]}
            else:
                continue
            known = {"safetensors", "torch", "transformers"} | sys.stdlib_module_names
            assert tops <= known, (name, tops)


def test_what_travels_can_be_read():
    sizes = {
        path.name: len(path.read_text(encoding="utf-8").splitlines())
        for path in ROOM.glob("*.py")
        if path.name != "__init__.py"
    }
    assert len(sizes) <= 10, sizes
    assert sum(sizes.values()) <= 3500, sizes


def test_the_config_names_classes_that_are_there(checkpoint):
    folder, _, _ = checkpoint("gpt2")
    fields = json.loads((folder / "config.json").read_text())
    assert set(fields["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    for target in fields["auto_map"].values():
        module, name = target.split(".")
        tree = ast.parse((folder / f"{module}.py").read_text())
        assert name in {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    assert fields["architectures"] == ["FamilialForCausalLM"]
    assert fields["model_type"] == "familial"
