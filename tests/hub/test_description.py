"""What members weigh and cost: against real models, real caches and sums done by hand."""

import json
import shutil
from dataclasses import FrozenInstanceError

import pytest
import torch
from backbones import tiny_config
from transformers import DynamicCache, GPT2Config, LlamaConfig, MistralConfig

import hf_familial as hff
from hf_familial import FamilialConfig, FamilialForCausalLM, choose_exit, describe
from hf_familial.errors import CheckpointError, NoExitFitsError
from hf_familial.flops import count_family, count_parameters, measure_flops_per_token


LLAMA = LlamaConfig(
    vocab_size=100,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
# one of each way in which a host remembers
MEMORIES = [
    "llama",  # keys and values of every token
    "qwen3",  # windows in half of its layers
    "mistral",  # windows in all
    "gemma3_text",
    "deepseek_v3",  # latent keys and values
    "falcon_mamba",  # states, one position after the other
    "jamba",  # states and attention, one position after the other
    "mamba2",  # states
    "recurrent_gemma",  # states and windows, one position after the other
    "lfm2_moe",  # short convolutions
    "qwen3_next",  # linear attention, in chunks
    "falcon_h1",  # both in each layer
]


STEPWISE = ("falcon_mamba", "recurrent_gemma")  # a second for every few tokens


def family(model_type: str = "llama", **fields) -> FamilialForCausalLM:
    torch.manual_seed(0)
    fields = {"exits": [2, 4]} | fields
    return FamilialForCausalLM(FamilialConfig(text_config=tiny_config(model_type), **fields)).eval()


def llama(**fields) -> FamilialConfig:
    fields = {"exits": [1, 2, 4]} | fields
    return FamilialConfig(text_config=LlamaConfig(**LLAMA.to_diff_dict()), **fields)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("family")
    torch.manual_seed(0)
    FamilialForCausalLM(llama(exit_head="own", num_exit_layers=1)).save_pretrained(folder)
    return folder


def bytes_of(value) -> int:
    """Of the floating-point tensors inside anything."""
    if isinstance(value, torch.Tensor):
        return value.nbytes if value.is_floating_point() else 0
    if isinstance(value, dict):
        return sum(map(bytes_of, value.values()))
    return sum(map(bytes_of, value)) if isinstance(value, (list, tuple)) else 0


# against what really runs


@pytest.mark.parametrize(
    ("model_type", "dtype"),
    [
        *(
            pytest.param(name, torch.float32, marks=[pytest.mark.slow] if name in STEPWISE else [])
            for name in MEMORIES
        ),
        *((model_type, torch.bfloat16) for model_type in ("qwen3", "deepseek_v3", "qwen3_next")),
    ],
)
def test_the_cache_is_that_of_a_real_run(model_type, dtype):
    model, length = family(model_type).to(dtype), 40
    rows = describe(model, context=length).exits
    ids = torch.randint(3, 100, (1, length + 1), generator=torch.Generator().manual_seed(1))
    for row in rows:
        with torch.no_grad():
            out = model(ids[:, :length], exit_idx=row.exit_idx, use_cache=True)
            cache = out.past_key_values
            before = sum(bytes_of(vars(layer)) for layer in cache.layers)
            model(ids[:, length:], exit_idx=row.exit_idx, past_key_values=cache, use_cache=True)
            after = sum(bytes_of(vars(layer)) for layer in cache.layers)
        assert row.exact
        assert row.cache_bytes == before
        assert row.kv_bytes_per_token == after - before


@pytest.mark.parametrize("model_type", ["qwen3", "deepseek_v3", "mamba2", "recurrent_gemma"])
def test_prefill_is_what_evaluation_measures(model_type):
    model = family(model_type)
    # the kernels that the fake run takes, in which every operation is seen
    model.set_attn_implementation("eager")
    model.set_experts_implementation("batched_mm")
    for row in describe(model, context=24).exits:
        measured = measure_flops_per_token(model, row.exit_idx, 24)
        assert row.prefill_flops_per_token == pytest.approx(measured, rel=1e-9)


# against sums done by hand


def llama_flops(depth: int, pairs: float) -> float:
    """Of one token: projections, gated MLP, head, and attention over so many positions."""
    q, kv, mlp = 32 * 32, 32 * 16, 3 * 32 * 48
    per_layer = 2 * (2 * q + 2 * kv + mlp) + 2 * 2 * 32 * pairs
    return depth * per_layer + 2 * 32 * 100


@pytest.mark.parametrize("context", [1, 7, 64])
def test_the_sums_of_a_llama(context):
    found = describe(llama(), context=context)
    embedding, layer = 100 * 32, 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32
    for row, depth in zip(found.exits, (1, 2, 4), strict=True):
        assert row.depth == depth
        assert row.parameters == 2 * embedding + depth * layer + 32
        assert row.non_embedding == depth * layer + 32
        assert row.weight_bytes == {
            "float32": 4 * row.parameters,
            "bfloat16": 2 * row.parameters,
            "float16": 2 * row.parameters,
        }
        # keys and values of 2 heads of width 8, in float32
        assert row.kv_bytes_per_token == depth * 2 * 2 * 8 * 4
        assert row.cache_bytes == context * row.kv_bytes_per_token
        assert row.prefill_flops_per_token == pytest.approx(llama_flops(depth, context))
        assert row.decode_flops_per_token == pytest.approx(llama_flops(depth, context + 1))


def test_the_sums_of_a_window():
    config = MistralConfig(**LLAMA.to_diff_dict() | {"sliding_window": 16, "model_type": "mistral"})
    short, long = (
        describe(FamilialConfig(text_config=config, exits=[2, 4]), context=n) for n in (8, 40)
    )
    per_token = 2 * 2 * 8 * 4
    for k, depth in enumerate((2, 4)):
        assert short.exits[k].cache_bytes == 8 * depth * per_token
        assert short.exits[k].kv_bytes_per_token == depth * per_token
        # the host keeps one less than the window, for the next token to join
        assert long.exits[k].cache_bytes == 15 * depth * per_token
        assert long.exits[k].kv_bytes_per_token == 0
        assert long.exits[k].decode_flops_per_token == pytest.approx(llama_flops(depth, 16))


def test_latent_attention_keeps_the_latent():
    config = tiny_config("deepseek_v3")
    rows = describe(FamilialConfig(text_config=config, exits=[2, 4]), context=16).exits
    latent = config.kv_lora_rank + config.qk_rope_head_dim
    assert [row.kv_bytes_per_token for row in rows] == [2 * latent * 4, 4 * latent * 4]


def test_private_layers_and_own_heads_count():
    plain, rich = (
        describe(llama(), context=8),
        describe(llama(num_exit_layers=1, exit_head="own"), context=8),
    )
    layer = plain.exits[1].parameters - plain.exits[0].parameters
    for k in (0, 1):
        assert rich.exits[k].parameters == plain.exits[k].parameters + layer
        assert rich.exits[k].kv_bytes_per_token == plain.exits[k].kv_bytes_per_token + 128
    assert rich.exits[2].parameters == plain.exits[2].parameters
    assert rich.num_exit_layers == 1
    assert rich.parameters == count_family(llama(num_exit_layers=1, exit_head="own"))["total"]


def test_a_host_that_cannot_run_without_data_is_estimated():
    """Its experts are chosen by looking at values, so the numbers say that they are estimates."""
    model = family("dbrx")
    for row in describe(model, context=16).exits:
        assert not row.exact
        assert row.parameters == count_parameters(model, row.exit_idx)["total"]
        cache = DynamicCache(config=model.config.text_config)
        with torch.no_grad():
            ids = torch.ones((1, 16), dtype=torch.long)
            model(ids, exit_idx=row.exit_idx, past_key_values=cache)
        assert row.cache_bytes == sum(bytes_of(vars(layer)) for layer in cache.layers)


def test_a_host_without_a_cache_has_none():
    for model_type, dtype in (("openai-gpt", "float32"), ("xlstm", "bfloat16")):
        row = describe(family(model_type), context=16, dtype=dtype).exits[0]
        assert (row.decode_flops_per_token, row.cache_bytes, row.kv_bytes_per_token) == (None,) * 3
        assert row.prefill_flops_per_token > 0


# checkpoints


def test_a_checkpoint_is_described_without_its_weights(saved, tmp_path):
    found, from_config = describe(saved), describe(FamilialConfig.from_pretrained(saved))
    assert from_config.stored_bytes is None
    for with_files, without in zip(found.exits, from_config.exits, strict=True):
        assert with_files.stored_bytes == 4 * with_files.parameters
        assert with_files.parameters == without.parameters
    assert found.stored_bytes == 4 * found.parameters
    assert found.dtype == "float32"
    assert found.context == 64  # the backbone's limit
    # a header, and nothing where the data was
    shutil.copytree(saved, tmp_path / "hollow")
    file = tmp_path / "hollow" / "model.safetensors"
    size = file.stat().st_size
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    file.write_bytes(file.read_bytes()[:header])
    with file.open("r+b") as hollow:
        hollow.truncate(size)
    assert describe(tmp_path / "hollow").exits == found.exits


def test_a_sharded_checkpoint_is_the_same(saved, tmp_path):
    model = FamilialForCausalLM.from_pretrained(saved)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert describe(tmp_path).exits == describe(saved).exits


def test_the_dtype_is_the_checkpoints_or_the_one_asked_for(saved, tmp_path):
    FamilialForCausalLM.from_pretrained(saved, dtype=torch.bfloat16).save_pretrained(tmp_path)
    half, whole = describe(tmp_path), describe(tmp_path, dtype="float32")
    assert (half.dtype, whole.dtype) == ("bfloat16", "float32")
    for a, b in zip(half.exits, whole.exits, strict=True):
        assert a.stored_bytes == 2 * a.parameters
        assert 2 * a.cache_bytes == b.cache_bytes
        assert a.prefill_flops_per_token == b.prefill_flops_per_token


def test_config_alone_is_enough(saved, tmp_path):
    shutil.copy(saved / "config.json", tmp_path)
    found = describe(tmp_path)
    assert found.stored_bytes is None
    assert found.exits[0].parameters == describe(saved).exits[0].parameters


def test_a_description_is_frozen_and_json(saved):
    found = describe(saved)
    with pytest.raises(FrozenInstanceError):
        found.context = 1
    again = json.loads(json.dumps(found.to_dict()))
    assert again["exits"][1]["parameters"] == found.exits[1].parameters
    assert hff.describe is describe


# recorded losses

LOSSES = [3.25, 2.5, 2.125]
RUN = {
    "run_id": "r", "N_total": 1, "N_non_embedding": 1, "N_active": 1, "D_tokens": 1, "C_flops": 1.0,
    "G": 3, "exits": [1, 2, 4], "loss_mean": None, "loss_exits": None, "loss_final": None,
    "eval_loss_mean": 2.625, "eval_loss_exits": LOSSES, "eval_loss_final": 2.125, "seed": 0,
    "lr": 0.1, "batch_tokens": 1, "seq_len": 1, "vocab_size": 100, "data": "d",
    "backbone": {"model_type": "llama", "hidden": 32, "layers": 4}, "wall_s": 1.0,
    "tokens_per_s": 1.0, "code_version": "0", "status": "finished",
}  # fmt: skip
RECORDS = {
    "members.json": json.dumps(
        [{"depth": d, "eval_loss": x} for d, x in zip((1, 2, 4), LOSSES, strict=True)]
    ),
    "exits.json": json.dumps(
        {
            "after": {
                "rows": [{"depth": d, "loss": x} for d, x in zip((1, 2, 4), LOSSES, strict=True)]
            }
        }
    ),
    "trainer_state.json": json.dumps(
        {
            "log_history": [
                {"step": 1, "eval_exit_0_loss": 9, "eval_exit_1_loss": 9, "eval_exit_2_loss": 9},
                {"step": 2} | {f"eval_exit_{k}_loss": x for k, x in enumerate(LOSSES)},
                {"step": 3, "loss": 1.0},
            ]
        }
    ),
    "runs.jsonl": "\n".join(
        [
            json.dumps(RUN | {"eval_loss_exits": [9, 9, 9]}),
            json.dumps(RUN),
            json.dumps(RUN | {"exits": [1, 3, 4], "eval_loss_exits": [8, 8, 8]}),
            '{"cut off',
        ]
    ),
}


@pytest.mark.parametrize("name", RECORDS)
def test_recorded_losses_are_found(saved, tmp_path, name):
    shutil.copy(saved / "config.json", tmp_path)
    (tmp_path / name).write_text(RECORDS[name])
    assert [row.eval_loss for row in describe(tmp_path, context=4).exits] == LOSSES


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("members.json", json.dumps([{"depth": 2, "eval_loss": 1.0}])),
        ("members.json", json.dumps({"depth": 2})),
        ("trainer_state.json", json.dumps({"log_history": []})),
        ("exits.json", json.dumps({"after": {"rows": [{"depth": 2, "loss": 1.0}]}})),
        ("exits.json", json.dumps([1])),
        ("runs.jsonl", json.dumps(RUN | {"G": 2, "exits": [1, 4], "eval_loss_exits": [1, 1]})),
    ],
)
def test_losses_of_something_else_are_not(saved, tmp_path, name, text):
    shutil.copy(saved / "config.json", tmp_path)
    (tmp_path / name).write_text(text)
    assert {row.eval_loss for row in describe(tmp_path, context=4).exits} == {None}


def test_a_description_prints_as_its_table(saved, tmp_path):
    shutil.copy(saved / "config.json", tmp_path)
    lines = str(describe(tmp_path, context=4)).splitlines()
    assert [line.split()[:2] for line in lines[3:6]] == [["0", "1"], ["1", "2"], ["2", "4"]]
    assert max(map(len, lines[2:6])) <= 80
    assert "There is no recorded loss. Measure it with `evaluate_exits`" in lines[-1]
    (tmp_path / "members.json").write_text(RECORDS["members.json"])
    assert "No loss" not in str(describe(tmp_path, context=4))


# bad input


def test_what_is_no_family_is_refused(tmp_path, saved):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        describe(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"has no `config\.json`"):
        describe(tmp_path)
    with pytest.raises(NotADirectoryError, match="is a file"):
        describe(saved / "config.json")
    GPT2Config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a `gpt2`, not a family"):
        describe(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        describe(tmp_path)
    with pytest.raises(TypeError, match="got int"):
        describe(3)


def test_a_damaged_file_is_refused(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "cut")
    file = tmp_path / "cut" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="damaged"):
        describe(tmp_path / "cut")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 0}, "`context` must be a number of tokens, 1 or more, got 0"),
        ({"context": 2.5}, r"got 2\.5"),
        ({"context": True}, "got True"),
        ({"dtype": "int8"}, "`dtype` must be a floating-point dtype, .* got 'int8'"),
        ({"dtype": "nonsense"}, "got 'nonsense'"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        describe(llama(), **options)


# choosing


def need(row, context: int) -> int:
    return 4 * row.parameters + row.cache_bytes


def test_the_deepest_that_fits_is_chosen():
    rows = describe(llama(), context=32).exits
    for k, row in enumerate(rows):
        exact = choose_exit(llama(), memory=need(row, 32), context=32)
        assert exact.exit_idx == k
        assert exact.depth == row.depth
        assert [verdict.fits for verdict in exact.verdicts] == [i <= k for i in range(3)]
    with pytest.raises(NoExitFitsError) as caught:
        choose_exit(llama(), memory=need(rows[0], 32) - 1, context=32)
    assert [verdict.fits for verdict in caught.value.verdicts] == [False] * 3
    assert f"{need(rows[0], 32):,} bytes" in str(caught.value)


def test_a_longer_text_leaves_room_for_less():
    rows = describe(llama(), context=8).exits
    memory = need(rows[2], 8)
    assert choose_exit(llama(), memory=memory, context=8).exit_idx == 2
    assert choose_exit(llama(), memory=memory, context=64).exit_idx == 1


def test_half_precision_leaves_room_for_more():
    memory = need(describe(llama(), context=8).exits[2], 8) - 1
    assert choose_exit(llama(), memory=memory, context=8).exit_idx == 1
    assert choose_exit(llama(), memory=memory, context=8, dtype="bfloat16").exit_idx == 2


def test_memory_may_be_given_as_people_write_it():
    need_kib = need(describe(llama(), context=8).exits[1], 8) / 1024
    assert choose_exit(llama(), memory=f"{need_kib:.6f}KiB", context=8).exit_idx == 1
    assert choose_exit(llama(), memory="2GB", context=8).exit_idx == 2


def test_flops_limit_alone_and_with_memory():
    rows = describe(llama(), context=8).exits
    flops = rows[1].decode_flops_per_token
    assert choose_exit(llama(), flops_per_token=flops, context=8).exit_idx == 1
    both = choose_exit(llama(), flops_per_token=flops, memory=need(rows[0], 8), context=8)
    assert both.exit_idx == 0
    assert "within" in both.verdicts[1].reason
    assert "over" in both.verdicts[1].reason
    lines = str(both).splitlines()
    assert lines[0].startswith("exit 0 (depth 1) fits: ")
    assert lines[2].startswith("exit 2 (depth 4) does not fit: ")


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({}, "are both None"),
        ({"memory": 0}, "`memory` must be more than 0, got 0"),
        ({"memory": "much"}, "a size must look like 2GB or 512MiB, got 'much'"),
        ({"memory": b"2GB"}, "`memory` must be a number, got b'2GB'"),
        ({"flops_per_token": "1e9"}, "`flops_per_token` must be a number, got '1e9'"),
        ({"memory": 1, "flops_per_token": -1.0}, "`flops_per_token` must be more than 0"),
    ],
)
def test_wrong_limits_are_refused(limits, message):
    with pytest.raises(ValueError, match=message):
        choose_exit(llama(), **limits)
