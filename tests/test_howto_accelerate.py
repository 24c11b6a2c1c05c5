"""The loop of docs/how-to/accelerate.md: two processes learn what one does."""

import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch


ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "how-to" / "accelerate.md"
CONFIG = ROOT / "examples" / "accelerate" / "ddp_cpu.yaml"
STEPS = 3
ENDING = """
if accelerator.is_main_process:
    import sys
    torch.save(accelerator.unwrap_model(model).state_dict(), sys.argv[1])
"""


def learned(folder, accumulated, *launcher):
    """Weights that the page's loop ends with."""
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text("utf-8"), re.S | re.M)
    (loop,) = (block for block in blocks if "Accelerator(" in block)
    changes = {
        "STEPS, ACCUMULATED = 8, 2\n": f"STEPS, ACCUMULATED = {STEPS}, {accumulated}\n",
        # Adam would not notice gradients of another size
        "AdamW(model.parameters(), lr=3e-3)": "SGD(model.parameters(), lr=1.0)",
    }
    for old, new in changes.items():
        assert old in loop
        loop = loop.replace(old, new)
    script, weights = folder / f"loop_{accumulated}.py", folder / f"weights_{accumulated}.pt"
    script.write_text(loop + ENDING, encoding="utf-8")
    command = [sys.executable, *launcher, str(script), str(weights)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.load(weights)


@pytest.mark.slow
def test_two_processes_learn_what_one_does(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(CONFIG)]
    two = learned(tmp_path, 2, *launcher, "--main_process_port", port)
    one = learned(tmp_path, 4)  # the same rows a step, in one process
    assert two.keys() == one.keys()
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, atol=1e-5, rtol=0)
