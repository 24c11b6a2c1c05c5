"""The modules of the `evaluate` library, loaded by path in a process without a network."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_familial.evaluation import metric_path


TESTS = Path(__file__).resolve().parents[1]

SCRIPT = """
import json
import socket

import torch


def refuse(*args):
    raise AssertionError("went to the network")


socket.socket.connect = socket.getaddrinfo = refuse
torch.set_num_threads(1)

import evaluate
from reference import tiny_family

from hf_familial.evaluation import evaluate_exits, metric_path

found = {}
agreement = evaluate.load(metric_path("exit_agreement"))
found["agreement"] = agreement.compute(predictions=[5, 3, 2, 7], references=[5, 4, 2, 7])
agreement.add_batch(predictions=[5, 3], references=[5, 4])
agreement.add_batch(predictions=[2], references=[1])
found["in_batches"] = agreement.compute()

calibration = evaluate.load(metric_path("expected_calibration_error"))
found["calibration"] = calibration.compute(
    predictions=[5, 3, 2], references=[5, 3, 1], confidences=[0.9, 0.9, 0.6], num_bins=2
)

model, blocks = tiny_family("llama", [2, 4]), torch.randint(8, 120, (3, 12)).tolist()
quality = evaluate.load(metric_path("exit_quality"), module_type="measurement")
found["quality"] = quality.compute(input_ids=blocks, model=model, bytes_per_token=4.0)
table = evaluate_exits(model, [{"input_ids": b} for b in blocks], bytes_per_token=4.0).to_pandas()
found["expected"] = table.to_dict("list")
print(json.dumps(found))
"""


def test_modules_load_by_path_offline(tmp_path):
    offline = {"HF_HUB_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=tmp_path,
        env=os.environ | offline | {"PYTHONPATH": str(TESTS)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["agreement"] == {"exit_agreement": 0.75}
    assert found["in_batches"] == {"exit_agreement": pytest.approx(1 / 3)}
    # two right of 1.8 and 0 right of 0.6, all in the upper bin of two
    assert found["calibration"]["expected_calibration_error"] == pytest.approx(abs(2 - 2.4) / 3)
    assert found["quality"] == found["expected"]


def test_an_unknown_module_is_named():
    known = "exit_agreement, exit_quality, expected_calibration_error"
    with pytest.raises(ValueError, match=f"must be one of {known}, got 'bleu'"):
        metric_path("bleu")
