"""The family of benchmarks/relay.py, trained once by examples/pretrain.py and kept.

    python benchmarks/relay_family.py            # about 20 minutes on 2 cores, can be stopped
    python benchmarks/relay_family.py --quick    # a smaller one, under a minute

Twelve layers of width 256, trained on the source code of Python's standard library. All exits share
norm and head, because `assistant_early_exit` of Transformers cannot use others. The early exits
also learn from the deepest exit by distillation. The folder is `$HF_FAMILIAL_CACHE`, by default
`benchmarks/.cache`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


HERE = Path(__file__).resolve().parent
PRETRAIN = HERE.parent / "examples" / "pretrain.py"

COMMON: dict[str, Any] = {
    "exit_norm": "shared",
    "distillation_weight": 1,
    "bf16": True,
    "use_cpu": True,
    "eval_strategy": "no",
    "save_strategy": "steps",
    "save_total_limit": 1,
}
FULL = COMMON | {
    "hidden_size": 256,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "intermediate_size": 768,
    "exits": [3, 6, 12],
    "vocab_size": 2048,
    "max_steps": 2000,
    "save_steps": 50,
}
QUICK = COMMON | {
    "hidden_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "intermediate_size": 384,
    "exits": [2, 6],
    "vocab_size": 1024,
    "max_train_bytes": 2_000_000,
    "max_eval_tokens": 4096,
    "max_steps": 100,
    "per_device_train_batch_size": 4,
    "save_steps": 1000,
}


def relay_family(quick: bool = False) -> Path:
    """Return the folder of the trained family. Train it first, or continue its training.

    Args:
        quick (`bool`): Use the smaller family.

    Returns:
        `Path`: Checkpoint with a tokenizer. Its `members.json` contains the loss of every exit.

    Raises:
        subprocess.CalledProcessError: If the training fails.
    """
    recipe = QUICK if quick else FULL
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:8]
    cache = Path(os.environ.get("HF_FAMILIAL_CACHE") or HERE / ".cache")
    folder = cache / f"relay_family-{digest}"
    if (folder / "members.json").is_file():
        return folder
    recipe = recipe | {"output_dir": folder, "cache_dir": cache / "data"}
    if any(folder.glob("checkpoint-*")):
        recipe["resume_from_checkpoint"] = "last"
    words = []
    for name, value in recipe.items():
        values = value if isinstance(value, list) else [value]
        words += [f"--{name}", *map(str, values)]
    # standard output is for the benchmark, whose last line is JSON
    subprocess.run([sys.executable, str(PRETRAIN), *words], check=True, stdout=sys.stderr)
    return folder


def main() -> None:
    """Train the family, then print its folder and the loss of each exit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="Train a smaller family.")
    folder = relay_family(parser.parse_args().quick)
    print(folder)
    for row in json.loads((folder / "members.json").read_text(encoding="utf-8")):
        print(f"depth {row['depth']:3d}: loss {row['eval_loss']:.3f} nats per token")


if __name__ == "__main__":
    main()
