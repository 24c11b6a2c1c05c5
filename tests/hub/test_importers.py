"""Importers: Ruyi's layout and LayerSkip's checkpoints as families, equal at every exit."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import tiny_config, tiny_model
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3Config
from transformers.masking_utils import create_causal_mask
from transformers.models.qwen2.modeling_qwen2 import Qwen2Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model

from hf_familial import FamilialForCausalLM
from hf_familial.errors import CheckpointError
from hf_familial.hub.export import export_exit
from hf_familial.hub.importers import from_layerskip, import_ruyi, open_ruyi, ruyi_config


SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
HOSTS = {"ruyi_qwen2": (Qwen2Config, Qwen2Model), "ruyi_qwen3": (Qwen3Config, Qwen3Model)}
POINTS = [1, 3, 4]
IDS = torch.tensor([[5, 17, 3, 88, 42, 9, 61, 30], [7, 7, 1, 2, 90, 13, 27, 55]])


class Ruyi(nn.Module):
    """The layout as its authors describe it, slow and without a cache.

    An exit at layer `e` runs the layers before `e`, then, in the place of layer `e`, a layer of its
    own (the last exit: the last layer), then a norm and mostly a head of its own.
    """

    def __init__(self, model_type: str, points: list[int], shared: bool) -> None:
        super().__init__()
        config_class, model_class = HOSTS[model_type]
        config = config_class(**SIZES, attn_implementation="eager")
        model = model_class(config)
        deeper = model_class(config_class(**SIZES, attn_implementation="eager"))
        model.eelayers = nn.ModuleList(deeper.layers[e] for e in points[:-1])
        model.norms = nn.ModuleList(nn.RMSNorm(32, eps=config.rms_norm_eps) for _ in points)
        del model.norm
        self.model, self.points, self.config = model, points, config
        heads = [nn.Linear(32, 96, bias=False) for _ in points]
        self.lm_head: Any = heads[0] if shared else nn.ModuleList(heads)
        for parameter in self.parameters():
            if parameter.ndim == 1:
                parameter.data = 1 + 0.3 * torch.randn_like(parameter)

    @torch.no_grad()
    def forward(self, ids: torch.Tensor, point: int) -> torch.Tensor:
        i = self.points.index(point)
        hidden = self.model.embed_tokens(ids)
        positions = torch.arange(ids.shape[1]).unsqueeze(0)
        rotary = self.model.rotary_emb(hidden, positions)
        mask = create_causal_mask(self.config, hidden, None, None, position_ids=positions)
        last = self.model.layers[-1] if point == self.points[-1] else self.model.eelayers[i]
        for layer in [*self.model.layers[:point], last]:
            hidden = layer(
                hidden, attention_mask=mask, position_ids=positions, position_embeddings=rotary
            )
        hidden = self.model.norms[i](hidden)
        return (self.lm_head if isinstance(self.lm_head, nn.Linear) else self.lm_head[i])(hidden)

    def save(self, folder: Path, model_type: str, **fields: Any) -> Path:
        folder.mkdir(exist_ok=True)
        weights = {name: t.contiguous() for name, t in self.state_dict().items()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        config = self.config.to_dict() | {
            "model_type": model_type,
            "architectures": ["RuyiForCausalLM"],
            "auto_map": {"AutoConfig": "configuration_ruyi.RuyiConfig"},
            "early_exit_points": self.points,
            "shared_heads": isinstance(self.lm_head, nn.Linear),
            "default_early_exit_point": -1,
            "use_sliding_window": False,
        }
        (folder / "config.json").write_text(json.dumps(config | fields))
        return folder


def ruyi(
    folder: Path, model_type: str = "ruyi_qwen3", shared: bool = False, **fields: Any
) -> tuple[Ruyi, Path]:
    torch.manual_seed(0)
    model = Ruyi(model_type, fields.pop("points", POINTS), shared).eval()
    return model, model.save(folder, fields.pop("said", model_type), **fields)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("model_type", HOSTS)
def test_ruyi_is_equal_at_every_exit(tmp_path, model_type, shared):
    oracle, folder = ruyi(tmp_path / "ruyi", model_type, shared)
    report = import_ruyi(folder, tmp_path / "family")
    assert report.architecture == "FamilialForCausalLM"
    family, loading = FamilialForCausalLM.from_pretrained(
        tmp_path / "family", attn_implementation="eager", output_loading_info=True
    )
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert family.config.exits == [1, 3, 5]
    assert family.config.num_exit_layers == 1
    assert family.config.text_config.model_type == model_type.removeprefix("ruyi_")
    for k, point in enumerate(POINTS):
        expected = oracle(IDS, point)
        found = family(IDS, exit_idx=k).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        # the members differ, so equality says something
        assert (expected - oracle(IDS, POINTS[k - 1])).abs().max() > 0.1


def test_ruyi_generates_with_a_cache_what_the_slow_forward_says(tmp_path):
    """In Ruyi's own code an early exit writes the cache slot of the layer that it replaces."""
    oracle, folder = ruyi(tmp_path / "ruyi")
    import_ruyi(folder, tmp_path / "family")
    family = FamilialForCausalLM.from_pretrained(tmp_path / "family")
    for k, point in enumerate(POINTS):
        ids = IDS
        for _ in range(6):
            ids = torch.cat([ids, oracle(ids, point)[:, -1:].argmax(-1)], dim=1)
        mask = torch.ones_like(IDS)
        made = family.generate(
            IDS, attention_mask=mask, exit_idx=k, max_new_tokens=6, do_sample=False, pad_token_id=0
        )
        assert made.tolist() == ids.tolist()


def test_a_ruyi_member_is_exported_directly(tmp_path):
    oracle, folder = ruyi(tmp_path / "ruyi")
    export_exit(open_ruyi(folder), 1, tmp_path / "member")
    member = AutoModelForCausalLM.from_pretrained(tmp_path / "member", attn_implementation="eager")
    assert type(member).__name__ == "Qwen3ForCausalLM"
    assert member.config.num_hidden_layers == 4
    torch.testing.assert_close(member(IDS).logits, oracle(IDS, 3), rtol=0, atol=1e-5)


def test_ruyi_weights_are_copied_byte_for_byte(tmp_path):
    oracle, folder = ruyi(tmp_path / "ruyi")
    import_ruyi(folder, tmp_path / "family")
    family = FamilialForCausalLM.from_pretrained(tmp_path / "family")
    pairs = [
        (family.model.exits[1].layers[0], oracle.model.eelayers[1]),
        (family.model.exits[0].norm, oracle.model.norms[0]),
        (family.model.backbone.norm, oracle.model.norms[2]),
        (family.exit_heads[1], oracle.lm_head[1]),
        (family.lm_head, oracle.lm_head[2]),
    ]
    for ours, theirs in pairs:
        assert torch.equal(*(next(iter(m.parameters())) for m in (ours, theirs)))


def test_ruyi_without_early_exits_is_the_dense_model(tmp_path):
    oracle, folder = ruyi(tmp_path / "ruyi", points=[4])
    import_ruyi(folder, tmp_path / "family")
    family = FamilialForCausalLM.from_pretrained(tmp_path / "family", attn_implementation="eager")
    assert family.config.exits == [5]
    torch.testing.assert_close(family(IDS).logits, oracle(IDS, 4), rtol=0, atol=1e-5)


def test_ruyi_tied_embeddings_are_tied_again(tmp_path):
    oracle, folder = ruyi(tmp_path / "ruyi", shared=True, tie_word_embeddings=True)
    weights = {n: t for n, t in oracle.state_dict().items() if n != "lm_head.weight"}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    family = FamilialForCausalLM.from_pretrained(import_ruyi(folder, tmp_path / "family").path)
    assert family.lm_head.weight is family.get_input_embeddings().weight


def test_the_rest_of_the_config_is_kept():
    fields = SIZES | {"model_type": "ruyi_qwen2", "early_exit_points": POINTS}
    fields |= {
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-5,
        "eos_token_id": 7,
        "torch_dtype": "bfloat16",
    }
    config = ruyi_config(fields)
    assert config.text_config.rope_parameters["rope_theta"] == 1e6
    assert config.text_config.rms_norm_eps == 1e-5
    assert (config.eos_token_id, config.dtype) == (7, torch.bfloat16)
    assert ruyi_config(fields | {"default_early_exit_point": 3}).default_exit == 1
    assert ruyi_config(fields | {"default_early_exit_point": 2}).default_exit == -1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"early_exit_points": [1, 3]}, r"the last one must be 4 for 5 layers, got \[1, 3\]"),
        ({"early_exit_points": [0, 4]}, "of 1 or more"),
        ({"early_exit_points": [3, 1, 4]}, "increasing"),
        ({"early_exit_points": None}, "got None"),
        ({"early_exit_points": [True, 4]}, "increasing"),
        ({"said": "qwen3"}, "is a `qwen3`, not a Ruyi checkpoint"),
        ({"use_sliding_window": True}, "Only full attention"),
    ],
)
def test_a_config_that_is_no_ruyi(tmp_path, fields, message):
    _, folder = ruyi(tmp_path / "ruyi", **fields)
    with pytest.raises(ValueError, match=message):
        import_ruyi(folder, tmp_path / "family")
    assert not (tmp_path / "family").exists()


def test_a_layout_that_is_no_ruyi(tmp_path):
    _, folder = ruyi(tmp_path / "ruyi", shared_heads=True)
    with pytest.raises(CheckpointError, match=r"`lm_head\.0\.weight` does not .* shared head"):
        import_ruyi(folder, tmp_path / "family")


def test_a_ruyi_that_lacks_a_tensor(tmp_path):
    oracle, folder = ruyi(tmp_path / "ruyi")
    weights = {n: t for n, t in oracle.state_dict().items() if not n.startswith("model.eelayers.1")}
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks .*`model\.exits\.1\.layers\.0"):
        import_ruyi(folder, tmp_path / "family")
    assert not (tmp_path / "family").exists()


def test_a_ruyi_of_pickles_is_refused(tmp_path):
    oracle, folder = ruyi(tmp_path / "ruyi")
    (folder / "model.safetensors").unlink()
    torch.save(oracle.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickles"):
        import_ruyi(folder, tmp_path / "family")


def test_no_ruyi_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        import_ruyi(tmp_path / "nothing", tmp_path / "family")
    with pytest.raises(FileNotFoundError, match=r"no `config\.json`"):
        import_ruyi(tmp_path, tmp_path / "family")


# LayerSkip


def test_layerskip_reads_any_layer_with_the_one_norm_and_head():
    host = tiny_model("llama", tie_word_embeddings=False)
    hidden = host(IDS, output_hidden_states=True).hidden_states
    expected = {depth: host.lm_head(host.model.norm(hidden[depth])) for depth in (1, 3)}
    expected[4] = host(IDS).logits
    added = sum(p.numel() for p in host.parameters())
    family = from_layerskip(host, exits=[1, 3, 4])
    assert sum(p.numel() for p in family.parameters()) == added
    for k, depth in enumerate((1, 3, 4)):
        torch.testing.assert_close(family(IDS, exit_idx=k).logits, expected[depth])


def test_layerskip_norm_and_head_are_shared():
    host = tiny_model("llama")
    with pytest.raises(ValueError, match="`exit_norm` must be 'shared' for a LayerSkip family"):
        from_layerskip(host, exit_norm="own")


@pytest.mark.parametrize("tied", [False, True])
def test_the_plain_deepest_member_works_with_the_hosts_assistant_early_exit(tmp_path, tied):
    """The way back: what LayerSkip's users do with transformers alone."""
    family = from_layerskip(tiny_model("llama", tie_word_embeddings=tied), exits=[2, 4])
    export_exit(family, -1, tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    ids = IDS[:1]
    options["attention_mask"] = torch.ones_like(ids)
    alone = plain.generate(ids, **options)
    assert plain.generate(ids, assistant_early_exit=2, **options).tolist() == alone.tolist()
    assert family.generate(ids, **options).tolist() == alone.tolist()


def test_the_early_member_is_what_the_host_drafts_with(tmp_path):
    family = from_layerskip(tiny_model("llama", tie_word_embeddings=False), exits=[2, 4])
    export_exit(family, 0, tmp_path / "early")
    export_exit(family, -1, tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
    early = AutoModelForCausalLM.from_pretrained(tmp_path / "early").eval()
    plain.config.num_hidden_layers = 2  # what `assistant_early_exit` does while it drafts
    assert torch.equal(plain(IDS, use_cache=False).logits, early(IDS, use_cache=False).logits)


def test_the_imported_family_carries_its_code(tmp_path):
    _, folder = ruyi(tmp_path / "ruyi")
    import_ruyi(folder, tmp_path / "family")
    assert (tmp_path / "family" / "modeling_familial.py").is_file()
    code = (
        "import sys; sys.modules['hf_familial'] = None\n"
        "from transformers import AutoModelForCausalLM\n"
        f"m = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'family')!r}, "
        "trust_remote_code=True)\n"
        "print(m.config.exits)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[1, 3, 5]", done.stderr


def test_a_tiny_config_of_the_zoo_is_no_ruyi():
    with pytest.raises(ValueError, match="not a Ruyi checkpoint"):
        ruyi_config(tiny_config("qwen3").to_dict())
