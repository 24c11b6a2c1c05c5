"""Time and memory to export one member of a family.

    python benchmarks/export.py            # about 5 minutes, 12 GB of disk
    python benchmarks/export.py --quick    # under 50 seconds, one checkpoint of 100 MB
    python benchmarks/export.py --save     # also saves the result in benchmarks/results/

A Llama family with two exits is exported from a folder to a folder, without the deeper half of its
layers. The variants:

- ours: `export_exit`, which copies tensors from file to file and waits until they are on the disk;
- whole: load the family, truncate it and save it with `save_pretrained`, which does not wait for
  the disk. `whole_synced` also waits.

The bfloat16 checkpoints have about 300 MB (one file) and 4 GB (sharded by segment). Every run is a
new process. Times are medians of wall seconds without imports. Memory is the peak of resident
memory minus its value before the export.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import child, finish, peak_mebibytes
from transformers import LlamaConfig
from transformers.models.llama import modeling_llama  # noqa: F401 - imported before the clock starts

from hf_familial import FamilialConfig, FamilialForCausalLM
from hf_familial.checkpoints.member_models import plain_model
from hf_familial.hub.export import export_exit


BLOCK = 1 << 20

# name: width, layers, width of the MLPs, vocabulary. A parameter has about 2 bytes.
SIZES = {
    "100mb": (384, 16, 1536, 32768),
    "300mb": (576, 30, 1536, 49152),
    "4gb": (2048, 36, 5632, 32768),
}


def write_family(size: str, folder: Path) -> None:
    """Write a checkpoint with random weights, without holding it in memory."""
    width, layers, inner, vocab_size = SIZES[size]
    text_config = LlamaConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        intermediate_size=inner,
        vocab_size=vocab_size,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        tie_word_embeddings=True,
    )
    config = FamilialConfig(text_config=text_config, exits=[layers // 2, layers])
    config.dtype, config.architectures = "bfloat16", ["FamilialForCausalLM"]
    with torch.device("meta"):
        tensors = FamilialForCausalLM(config).state_dict()
    tensors.pop("lm_head.weight")
    shallow = {n: t for n, t in tensors.items() if not _is_deep(n, layers // 2)}
    deep = {n: t for n, t in tensors.items() if n not in shallow}
    config.save_pretrained(folder)
    if size != "4gb":
        return write_shard(folder / "model.safetensors", tensors)
    names = {f"model-0000{i + 1}-of-00002.safetensors": g for i, g in enumerate((shallow, deep))}
    for name, group in names.items():
        write_shard(folder / name, group)
    weight_map = {n: file for file, group in names.items() for n in group}
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    return None


def _is_deep(name: str, depth: int) -> bool:
    parts = name.split(".")
    return "layers" in parts and int(parts[parts.index("layers") + 1]) >= depth


def write_shard(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a safetensors file of random finite bfloat16 numbers."""
    header, end = {}, 0
    for name, tensor in sorted(tensors.items()):
        size = 2 * tensor.numel()
        row = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [end, end + size]}
        header[name], end = row, end + size
    text = json.dumps(header).encode()
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(BLOCK // 2, generator=generator).to(torch.bfloat16)
    data = block.view(torch.uint8).numpy().tobytes()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for start in range(0, end, BLOCK):
            file.write(data[: min(BLOCK, end - start)])
        file.flush()
        os.fsync(file.fileno())


def run(variant: str, folder: Path, out: Path) -> dict[str, float]:
    """Export once. Return time and memory."""
    # do not measure the disk writes of earlier runs
    os.sync()
    before, start = peak_mebibytes(reset=True), time.perf_counter()
    if variant == "ours":
        export_exit(folder, 0, out)
    else:
        family = FamilialForCausalLM.from_pretrained(folder)
        plain_model(family, 0).save_pretrained(out)
        if variant == "whole_synced":
            for path in out.iterdir():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
    return {"seconds": time.perf_counter() - start, "mib": peak_mebibytes() - before}


def measure(size: str, repeats: int, folder: Path) -> dict[str, float]:
    """Return medians over runs of all variants in turn."""
    family, out = folder / size, folder / "out"
    write_family(size, family)
    runs: dict[str, list[dict[str, float]]] = {"ours": [], "whole": [], "whole_synced": []}
    for _ in range(repeats):
        for variant, done in runs.items():
            done.append(child("--variant", variant, "--folder", str(family), "--out", str(out)))
            shutil.rmtree(out)
    shutil.rmtree(family)
    metrics = {}
    for variant, done in runs.items():
        metrics[f"{variant}_{size}_seconds"] = statistics.median(r["seconds"] for r in done)
        metrics[f"{variant}_{size}_peak_mib"] = max(r["mib"] for r in done)
    for rival in ("whole", "whole_synced"):
        ratios = [
            a["seconds"] / b["seconds"] for a, b in zip(runs["ours"], runs[rival], strict=True)
        ]
        metrics[f"time_over_{rival}_{size}"] = statistics.median(ratios)
    return metrics


def main() -> int:
    """Measure, print the numbers, and end with one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="Use one small checkpoint.")
    parser.add_argument("--save", action="store_true", help="Save in benchmarks/results/.")
    parser.add_argument("--repeats", type=int, default=None)
    parser.add_argument("--tmp", type=Path, default=None, help="Folder for the checkpoints.")
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.variant:
        print(json.dumps(run(args.variant, args.folder, args.out)))
        return 0
    sizes = {"100mb": 2} if args.quick else {"300mb": 7, "4gb": 3}
    metrics: dict[str, float] = {}
    targets: dict[str, tuple[str, float]] = {}
    with tempfile.TemporaryDirectory(dir=args.tmp) as folder:
        for size, repeats in sizes.items():
            metrics |= measure(size, args.repeats or repeats, Path(folder))
            targets[f"ours_{size}_peak_mib"] = ("<=", 20.0)
            targets[f"time_over_whole_{size}"] = ("<=", 0.5)
    for key, value in metrics.items():
        print(f"{key:40s} {value:10.3f}")
    return finish("export", metrics, targets, args.save)


if __name__ == "__main__":
    sys.exit(main())
