"""Every measure of every exit, against an oracle with all logits at once."""

import math

import datasets
import numpy as np
import pytest
import torch
from backbones import tiny_model
from reference import tiny_family

from hf_familial import FamilialForCausalLM
from hf_familial.evaluation import _predictions, evaluate_exits
from hf_familial.flops import measure_flops_per_token


FAMILIES = {
    "llama": ("llama", {}),
    "softcap": ("gemma2", {}),
    "experts": ("mixtral", {}),
    "own-heads": ("llama", {"exit_head": "own"}),
    "shared-norm": ("qwen3", {"exit_norm": "shared"}),
    "private-layers": ("llama", {"num_exit_layers": 1}),
    "absolute-positions": ("gpt2", {}),
}


def ragged_rows(lengths=(12, 20, 5, 9, 16), seed=3):
    """Rows of different lengths, the second with labels of its own."""
    generator = np.random.default_rng(seed)
    rows = [{"input_ids": generator.integers(8, 120, n).tolist()} for n in lengths]
    rows[1]["labels"] = [-100] * 8 + rows[1]["input_ids"][8:]
    return rows


@torch.no_grad()
def oracle(model, rows, num_bins):
    """Each row alone, without padding, and its logits of all exits; then numpy in float64."""
    logits, targets = [], []
    for row in rows:
        ids = torch.tensor([row["input_ids"]], device=model.device)
        exit_logits = model(input_ids=ids, use_cache=False, output_exits=True).exit_logits
        labels = np.array(row.get("labels", row["input_ids"]))[1:]
        stacked = torch.stack(exit_logits).float().cpu().numpy()[:, 0, :-1]
        logits.append(stacked[:, labels != -100])
        targets.append(labels[labels != -100])
    logits, targets = np.concatenate(logits, axis=1).astype(np.float64), np.concatenate(targets)
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities = shifted / shifted.sum(-1, keepdims=True)
    tops, confidences = probabilities.argmax(-1), probabilities.max(-1)
    return [
        {
            "loss": -np.log(probabilities[k, np.arange(len(targets)), targets]).mean(),
            "accuracy": (tops[k] == targets).mean(),
            "agreement": (tops[k] == tops[-1]).mean(),
            "expected_calibration_error": calibration(confidences[k], tops[k] == targets, num_bins),
        }
        for k in range(len(logits))
    ], len(targets)


@pytest.fixture
def free_flops(monkeypatch):
    """No passes to count FLOPs."""
    monkeypatch.setattr("hf_familial.evaluation.evaluator.measure_flops_per_token", lambda *_: 1.0)


def calibration(confidences, correct, num_bins):
    """Expected calibration error, bin by bin."""
    error = 0.0
    for m in range(num_bins):
        inside = (confidences > m / num_bins) & (confidences <= (m + 1) / num_bins)
        if inside.any():
            gap = abs(correct[inside].mean() - confidences[inside].mean())
            error += inside.sum() / len(confidences) * gap
    return error


@pytest.mark.parametrize(("model_type", "fields"), FAMILIES.values(), ids=FAMILIES)
def test_every_measure_is_the_oracles(model_type, fields, monkeypatch):
    # several chunks to a batch
    monkeypatch.setattr(_predictions, "chunk_rows", lambda vocab_size, device: 7)
    model, rows = tiny_family(model_type, [1, 2, 4], **fields), ragged_rows()
    found = evaluate_exits(model, rows, batch_size=2, bytes_per_token=3.5, num_bins=10)
    expected, num_tokens = oracle(model, rows, num_bins=10)
    assert (found.num_tokens, found.num_sequences, found.seq_length) == (num_tokens, 5, 20)
    for k, (row, wanted) in enumerate(zip(found.rows, expected, strict=True)):
        assert (row.exit_idx, row.depth) == (k, model.config.exits[k])
        for name, value in wanted.items():
            assert getattr(row, name) == pytest.approx(value, abs=2e-5), name
        assert row.perplexity == pytest.approx(math.exp(row.loss))
        assert row.bits_per_byte == pytest.approx(row.loss / math.log(2) / 3.5)
        assert row.flops_per_token == measure_flops_per_token(model, k, 20)
    assert found.rows[-1].agreement == 1.0


def test_one_exit_is_the_dense_model():
    host = tiny_model("llama")
    ids = torch.randint(8, 120, (2, 16))
    dense = host(input_ids=ids, labels=ids).loss.item()
    model = FamilialForCausalLM.from_backbone(host, exits=[4])
    (row,) = evaluate_exits(model, [{"input_ids": block} for block in ids]).rows
    assert row.loss == pytest.approx(dense, rel=1e-6)
    assert (row.agreement, row.bits_per_byte) == (1.0, None)


def test_the_loss_is_the_models_own():
    model, ids = tiny_family("gemma2", [2, 4]), torch.randint(8, 120, (4, 16))
    losses = model(input_ids=ids, labels=ids, skip_logits=True).exit_losses.tolist()
    rows = evaluate_exits(model, datasets.Dataset.from_dict({"input_ids": ids.tolist()})).rows
    assert [row.loss for row in rows] == pytest.approx(losses, rel=1e-6)


def test_batches_change_nothing():
    model, rows = tiny_family("llama", [2, 4]), ragged_rows()
    one, all_at_once = (evaluate_exits(model, rows, batch_size=n).rows for n in (1, 5))
    for a, b in zip(one, all_at_once, strict=True):
        assert (a.agreement, a.accuracy) == (b.agreement, b.accuracy)
        assert a.loss == pytest.approx(b.loss, rel=1e-6)


def test_left_padding_counts_for_nothing():
    model = tiny_family("llama", [2, 4])
    ids = torch.randint(8, 120, (12,)).tolist()
    padded = {"input_ids": [0] * 4 + ids, "attention_mask": [0] * 4 + [1] * 12}
    plain, found = (evaluate_exits(model, [row]) for row in ({"input_ids": ids}, padded))
    assert found.num_tokens == plain.num_tokens == 11
    for a, b in zip(plain.rows, found.rows, strict=True):
        assert a.loss == pytest.approx(b.loss, abs=2e-5)


def test_a_collator_may_leave_the_labels_out():
    model, rows = tiny_family("llama", [2, 4]), ragged_rows()[2:]

    def collate(chunk):
        width = max(len(row["input_ids"]) for row in chunk)
        ids = [row["input_ids"] + [1] * (width - len(row["input_ids"])) for row in chunk]
        mask = [[i < len(row["input_ids"]) for i in range(width)] for row in chunk]
        return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask).long()}

    own, default = (evaluate_exits(model, rows, data_collator=c) for c in (collate, None))
    assert own.num_tokens == default.num_tokens
    for a, b in zip(own.rows, default.rows, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-6)


def test_half_precision():
    model, rows = tiny_family("llama", [2, 4]).to(torch.bfloat16), ragged_rows()
    found, (expected, _) = evaluate_exits(model, rows, batch_size=1), oracle(model, rows, 15)
    for row, wanted in zip(found.rows, expected, strict=True):
        assert row.loss == pytest.approx(wanted["loss"], abs=1e-5)
        assert row.agreement == wanted["agreement"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu():
    model, rows = tiny_family("gemma2", [2, 4]).to("cuda"), ragged_rows()
    found, (expected, _) = evaluate_exits(model, rows, batch_size=2), oracle(model, rows, 15)
    for row, wanted in zip(found.rows, expected, strict=True):
        assert row.loss == pytest.approx(wanted["loss"], abs=1e-3)


def test_one_backbone_pass_and_a_chunk_of_logits_at_a_time(monkeypatch, free_flops):
    monkeypatch.setattr(_predictions, "chunk_rows", lambda vocab_size, device: 8)
    model = tiny_family("llama", [1, 2, 3, 4], exit_head="own")
    passes, rows, modes = [], [], set()
    model.model.backbone.register_forward_hook(lambda *_: passes.append(1))
    for head in (model.lm_head, *model.exit_heads):
        head.register_forward_hook(lambda module, args, output: rows.append(output.shape[:-1]))
    model.register_forward_hook(lambda *_: pytest.fail("the whole model makes all logits"))
    model.model.register_forward_hook(lambda module, *_: modes.add(module.training))
    stream = ({"input_ids": [9] * 11} for _ in range(100))
    evaluate_exits(model, stream, batch_size=2, max_batches=3)
    assert len(passes) == 3
    assert set(rows) == {(8,), (4,)}  # 20 positions to a batch
    assert len(rows) == 3 * 3 * 4
    assert modes == {False}
    assert len(list(stream)) == 94, "read further than asked for"


def test_a_batch_without_targets_is_not_run(free_flops):
    model = tiny_family("llama", [2, 4])
    passes = []
    model.model.backbone.register_forward_hook(lambda *_: passes.append(1))
    rows = [{"input_ids": []}, {"input_ids": [9]}, {"input_ids": [9, 10, 11]}]
    found = evaluate_exits(model, rows, batch_size=2)
    assert (found.num_tokens, found.num_sequences, found.seq_length) == (2, 3, 3)
    assert len(passes) == 1


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_losses_do_not_depend_on_the_batch(free_flops, batch_size):
    model, rows = tiny_family("llama", [2, 4]), ragged_rows()
    rows[3]["labels"] = [-100] * len(rows[3]["input_ids"])
    expected, count = oracle(model, rows, 15)
    found = evaluate_exits(model, rows, batch_size=batch_size)
    assert (found.num_tokens, found.num_sequences) == (count, len(rows))
    for row, right in zip(found.rows, expected, strict=True):
        assert row.loss == pytest.approx(right["loss"], rel=1e-5)


@pytest.mark.parametrize("name", ["labels", "shift_labels"])
@pytest.mark.parametrize("shape", [(2, 7), (3, 8), (8, 2), (16,)], ids=str)
def test_a_batch_whose_labels_have_another_shape_is_refused(name, shape):
    model, ids = tiny_family("llama", [2, 4]), torch.full((2, 8), 9)
    batch = {"input_ids": ids, "labels": ids} | {name: torch.full(shape, 9)}
    with pytest.raises(ValueError, match=rf"`{name}` of a batch .* \(2, 8\), got") as raised:
        evaluate_exits(model, [{}], data_collator=lambda rows: batch)
    assert str(shape) in str(raised.value)


def test_labels_that_a_collator_shifted_are_read_as_they_are(free_flops):
    model, ids = tiny_family("llama", [2, 4]), torch.arange(9, 25).view(2, 8)
    shifted = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    batches = [{"input_ids": ids}, {"input_ids": ids, "labels": ids, "shift_labels": shifted}]
    plain, given = (evaluate_exits(model, [{}], data_collator=lambda _, b=b: b) for b in batches)
    assert plain.rows == given.rows


@pytest.mark.parametrize("fails", [False, True])
def test_every_module_gets_its_mode_back(fails):
    model = tiny_family("llama", [2, 4]).train()
    model.model.exits[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    rows = [{"input_ids": [9, 10, 11]}, {"no": 1}][: 2 if fails else 1]
    if fails:
        with pytest.raises(ValueError, match="input_ids"):
            evaluate_exits(model, rows, batch_size=1)
    else:
        evaluate_exits(model, rows)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("dataset", "options", "expected"),
    [
        pytest.param([], {}, "`dataset` is empty", id="empty"),
        pytest.param(
            datasets.Dataset.from_dict({"text": ["a"], "id": [0]}),
            {},
            r"must have a column `input_ids`, got \['id', 'text'\]",
            id="other-columns",
        ),
        pytest.param(
            datasets.DatasetDict({"train": datasets.Dataset.from_dict({"input_ids": [[9, 9]]})}),
            {},
            "rows with a column `input_ids`, .* got a str",
            id="several-splits",
        ),
        pytest.param([{"input_ids": [9]}], {}, "no token to predict in 1 sequences", id="short"),
        pytest.param(
            [{"input_ids": [9, 9], "labels": [9, -100]}],
            {},
            "a label that is not -100 after its first position",
            id="no-targets",
        ),
        pytest.param(
            [{"input_ids": [9, 9], "labels": [9]}], {}, r"got shapes \[\(2,\), \(1,\)", id="ragged"
        ),
        pytest.param([{"input_ids": [[9, 9]]}], {}, "one-dimensional", id="a-batch-as-a-row"),
        pytest.param(
            [{"input_ids": [9, 9]}],
            {"data_collator": lambda rows: {"ids": rows}},
            r"`data_collator` must return `input_ids`, got \['ids'\]",
            id="collator",
        ),
        pytest.param([], {"batch_size": 0}, "`batch_size` must be 1 or more", id="batch-size"),
        pytest.param([], {"max_batches": 0}, "`max_batches` must be 1 or more", id="max-batches"),
        pytest.param([], {"num_bins": 0}, "`num_bins` must be 1 or more", id="bins"),
        pytest.param([], {"bytes_per_token": 0.0}, "`bytes_per_token` must be", id="bytes"),
    ],
)
def test_errors_name_what_is_wrong(dataset, options, expected):
    with pytest.raises(ValueError, match=expected):
        evaluate_exits(tiny_family("llama", [2, 4]), dataset, **options)


def test_a_model_that_is_no_family():
    with pytest.raises(TypeError, match="must be a FamilialForCausalLM, got a LlamaForCausalLM"):
        evaluate_exits(tiny_model("llama"), [{"input_ids": [9, 9]}])
