"""Families and members in older versions of transformers. Slow, and only where these are installed.

`make old-transformers` installs them, each into a folder of its own, and runs these tests.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from backbones import tiny_model
from packaging.version import Version
from reference import logits, stir, tiny_family

from hf_familial import FamilialForCausalLM
from hf_familial.hub import export_exit
from hf_familial.models.familial.configuration_familial import TRANSFORMERS


pytestmark = pytest.mark.slow

# folders of `pip install --target`, called by the version
HOME = Path(os.environ.get("HF_FAMILIAL_OLD_TRANSFORMERS", ".none"))
VERSIONS = sorted((path.name for path in HOME.glob("[0-9]*")), key=Version)
HERE = Path(__file__).parent

LOAD = """
import sys
from transformers import AutoConfig, AutoModelForCausalLM, __version__

config = AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)
assert config.exits == [1, 2, 4] and config.hidden_size == 32 and config.num_hidden_layers == 4
assert config.get_text_config().model_type == "llama"
config.save_pretrained(sys.argv[2])
again = AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)
assert again.to_dict() == config.to_dict() and type(config)().exits == [8, 16, 24, 32]
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
except ImportError as error:
    assert "transformers>=NEEDED" in str(error) and __version__ in str(error), error
    print("refused")
"""


def old(least, below):
    """Versions from one up to another; one empty case, skipped, where there are none."""
    found = [v for v in VERSIONS if Version(least) <= Version(v) < Version(below)]
    absent = pytest.param(None, marks=pytest.mark.skip("`make old-transformers` installs them"))
    return pytest.mark.parametrize("version", found or [absent])


def run(version, cache, *command):
    """Run Python with an older transformers before this one."""
    paths = [str(HOME.resolve() / version)]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "HF_MODULES_CACHE": str(cache),
    }
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@old("5.0", TRANSFORMERS)
def test_the_config_of_a_family_loads_and_its_model_says_what_it_needs(version, tmp_path):
    tiny_family("llama", [1, 2, 4], num_exit_layers=1).save_pretrained(tmp_path / "family")
    script = LOAD.replace("NEEDED", TRANSFORMERS)
    command = ["-c", script, tmp_path / "family", tmp_path / "again"]
    assert "refused" in run(version, tmp_path / "modules", *command)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 16, "rope_theta": 5e5}
HOSTS = {
    "llama": {"rope_parameters": LLAMA3},
    "qwen2": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "phi": {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}},
}
WHOLE = {"use_sliding_window": False, "layer_types": ["full_attention"] * 4}


@old("4.50", TRANSFORMERS)
@pytest.mark.parametrize("model_type", HOSTS)
@pytest.mark.parametrize("memory", [False, True])
def test_a_plain_member_loads_with_equal_logits(version, model_type, memory, tmp_path):
    fields = HOSTS[model_type] | (WHOLE if model_type == "qwen2" else {})
    host = tiny_model(model_type, **fields)
    family = stir(FamilialForCausalLM.from_backbone(host, exits=[1, 3, 4], exit_head="own"))
    family.save_pretrained(tmp_path / "family")
    folders = [str(tmp_path / str(k)) for k in range(3)]
    for k, folder in enumerate(folders):
        export_exit(family if memory else tmp_path / "family", k, folder)
    (tmp_path / "folders.json").write_text(json.dumps(folders))
    client, answers = HERE / "stock_client.py", tmp_path / "answers"
    run(version, tmp_path / "modules", client, answers, tmp_path / "folders.json")
    ids = torch.randint(8, 120, (2, 20), generator=torch.Generator().manual_seed(1))
    for k, found in enumerate(torch.load(answers)[folder] for folder in folders):
        assert not found["wrong"]
        torch.testing.assert_close(found["logits"], logits(family, ids, exit_idx=k))
