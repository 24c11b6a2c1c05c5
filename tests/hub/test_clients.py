"""Exported members in programs that have never heard of this package. Slow, and optional."""

import json
import os
import subprocess
import sys

import pytest
import torch
from reference import logits, tiny_family, token_ids
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from hf_familial import FamilialForCausalLM
from hf_familial.hub import export_exit


pytestmark = pytest.mark.slow

EXITS = [1, 3, 4]

TASK = """
task: opposites
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A family with a tokenizer of words."""
    out = tmp_path_factory.mktemp("family") / "family"
    family = tiny_family("llama", EXITS, num_exit_layers=1, exit_head="own")
    family.generation_config.eos_token_id = None
    family.save_pretrained(out)
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 128)}
    bare = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    bare.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=bare, **special).save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def family(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


# lm_eval


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """A local task; gives every choice's log-likelihood for a model that lm_eval loads itself."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    home = tmp_path_factory.mktemp("task")
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, 128, (12, 9), generator=generator).tolist()
    data = [
        {
            "text": " ".join(f"w{i}" for i in row[:6]),
            "choices": [f"w{i}" for i in row[6:]],
            "label": 0,
        }
        for row in rows
    ]
    (home / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    (home / "task.yaml").write_text(TASK.replace("DATA", str(home / "data.jsonl")))
    tasks = TaskManager(include_path=str(home), include_defaults=False)

    def evaluate(**arguments):
        found = lm_eval.simple_evaluate(
            model="hf",
            model_args=",".join(f"{k}={v}" for k, v in arguments.items()),
            tasks=["opposites"],
            task_manager=tasks,
            device="cpu",
            batch_size=4,
            bootstrap_iters=0,
        )
        samples = sorted(found["samples"]["opposites"], key=lambda sample: sample["doc_id"])
        likelihoods = [[r[0] for r in sample["filtered_resps"]] for sample in samples]
        return found["results"]["opposites"]["acc,none"], torch.tensor(likelihoods)

    return evaluate


@pytest.mark.parametrize("exit_idx", [0, 1, 2])
def test_lm_eval_finds_a_plain_member_and_its_exit_equal(exit_idx, folder, judge, tmp_path):
    export_exit(folder, exit_idx, tmp_path / "plain")
    accuracy, likelihoods = judge(pretrained=tmp_path / "plain")
    through_family = judge(pretrained=folder, default_exit=exit_idx)
    assert through_family[0] == accuracy
    # lm_eval batches alike, so the same operations run on the same numbers
    assert torch.equal(through_family[1], likelihoods)
    assert likelihoods.shape == (12, 3)
    others = [k for k in range(3) if k != exit_idx]
    assert all(
        not torch.equal(judge(pretrained=folder, default_exit=k)[1], likelihoods) for k in others
    )


# onnx


@pytest.mark.parametrize("exit_idx", [0, 2])
def test_onnxruntime_runs_a_member(exit_idx, folder, family, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    export_exit(folder, exit_idx, tmp_path / "plain")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids):
            return self.model(input_ids=input_ids, use_cache=False).logits

    # an example of one row would fix the batch at one
    example = token_ids(batch=2, length=12)
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=128)}
    program = torch.onnx.export(
        Logits().eval(), (example,), dynamo=True, dynamic_shapes={"input_ids": axes}, verbose=False
    )
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(
        tmp_path / "model.onnx", providers=["CPUExecutionProvider"]
    )
    for batch, length in ((2, 12), (1, 7), (3, 20)):
        ids = token_ids(batch, length)
        (found,) = session.run(None, {session.get_inputs()[0].name: ids.numpy()})
        right = logits(family, ids, exit_idx=exit_idx)
        torch.testing.assert_close(torch.from_numpy(found), right, atol=1e-5, rtol=1e-5)


# llama.cpp


def test_llama_cpp_writes_the_same_text(tmp_path):
    """Needs llama-cpp-python, its converter and a real Llama with a tokenizer the converter knows.

    Environment: `GGUF_CONVERTER`, path of `convert_hf_to_gguf.py` (the source distribution of
    llama-cpp-python vendors it); `GGUF_LLAMA`, folder of a checkpoint such as SmolLM2-135M.
    """
    llama_cpp = pytest.importorskip("llama_cpp")
    converter, checkpoint = os.environ.get("GGUF_CONVERTER"), os.environ.get("GGUF_LLAMA")
    if not converter or not checkpoint:
        pytest.skip("`GGUF_CONVERTER` and `GGUF_LLAMA` are not set")
    family = FamilialForCausalLM.from_backbone(checkpoint, num_exits=2, dtype=torch.float32)
    export_exit(family, 0, tmp_path / "plain")
    target = tmp_path / "member.gguf"
    command = [sys.executable, converter, tmp_path / "plain", "--outtype", "f32"]
    subprocess.run([*command, "--outfile", target], check=True, capture_output=True)
    model = llama_cpp.Llama(str(target), logits_all=True, verbose=False, n_ctx=128)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
    text = ids[0].tolist()
    for _ in range(16):
        model.reset()
        model.eval(text)
        text.append(int(model.scores[len(text) - 1].argmax()))
    options = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": -1}
    assert text == family.generate(ids, exit_idx=0, **options)[0].tolist()
