"""Checkpoints with one group of files per segment, so that a member loads only the files it needs.

Group k contains the tensors that exit k needs and shallower exits do not: the layers between the
depths of exits k - 1 and k, and the modules of exit k. So member k is in the groups 0 to k.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_relative_import_files
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.utils import logging

from ..models.familial import FamilialConfig
from .cuts import reads_embedding
from .index import ADAPTER, shard_name, write_index
from .safetensors_file import read_header


try:
    import fcntl
except ImportError:  # Windows: there is no lock, so only one process may save to a folder
    fcntl = None  # type: ignore[assignment]

logger = logging.get_logger(__name__)

# Families of at least this size in bytes are split by default. Smaller ones download fast, and one
# file is simpler to handle.
SPLIT_FROM = 100_000_000

# names of weight files, with an optional variant
WEIGHTS = re.compile(
    r"model(?:\.(?P<variant>.+?))?(?:-\d{5}-of-\d{5})?\.safetensors"
    r"|model\.safetensors\.index(?:\.(?P<of_index>.+))?\.json"
)
SEGMENT = "segment{:05d}"  # temporary variant name of a group, until all groups are written
MEASURED = "members.json"  # the measured losses of the members
ASIDE = ".saving"  # temporary subfolder in which a new checkpoint is written

# other files of an older checkpoint that would be loaded with the new one
BESIDE = (
    "config.json",
    "generation_config.json",
    ADAPTER,
    "adapter_model.safetensors",
)
# fields of a config that may differ between variants of one model
OF_A_VARIANT = ("dtype", "torch_dtype", "transformers_version", "architectures")


def splits_by_segment(nbytes: int, by_segment: bool | None = None) -> bool:
    """Return whether weights of this size are saved in one group of files per segment."""
    return nbytes >= SPLIT_FROM if by_segment is None else by_segment


def may_split(model: Any, options: Mapping[str, Any], by_segment: bool | None) -> bool:
    """Return whether to save a model by segment.

    Quantised, distributed, small or headless models, adapters, variants and uploads exclude this.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        return False  # the quantiser must name all weights in one call
    weights = options.get("state_dict") or model.state_dict()
    nbytes = sum(getattr(weight, "nbytes", 0) for weight in weights.values())
    asked = splits_by_segment(nbytes, by_segment) and model.config.num_exits > 1
    adapters = getattr(model, "_hf_peft_config_loaded", False)
    distributed = getattr(model.config, "distributed_config", None) is not None
    others = ("variant", "distributed_checkpoint", "push_to_hub")
    headless = model.base_model is model
    return asked and not (adapters or distributed or headless or any(map(options.get, others)))


def segment_of(name: str, config: FamilialConfig, layers: str, norm: str) -> int:
    """Return the exit whose group of files contains a tensor.

    It is the shallowest exit that needs the tensor. `layers` and `norm` are paths in the backbone.
    Tensors outside of layers and exits, such as the embedding, belong to exit 0.
    """
    last = config.num_exits - 1
    numbered = re.match(rf"model\.backbone\.{re.escape(layers)}\.(\d+)\.", name)
    if numbered:
        layer = int(numbered[1])
        return next((k for k, depth in enumerate(config.exits) if layer < depth), last)
    early = re.match(r"(?:model\.exits|exit_heads)\.(\d+)\.", name)
    if early:
        return int(early[1])
    if norm and name.startswith(f"model.backbone.{norm}.") and config.exit_norm == "own":
        return last
    if name.startswith("lm_head.") and config.exit_head == "own":
        return 0 if reads_embedding(config, last) else last
    return 0


def save_checkpoint(
    save: Callable[..., None],
    model: Any,
    folder: str | os.PathLike[str],
    *args: Any,
    by_segment: bool | None = None,
    **kwargs: Any,
) -> None:
    """Save a family to a folder, and replace a checkpoint that is already there.

    The new checkpoint is first written to a subfolder, so the old one stays until the new one is
    complete. During the replacement the folder does not load, so a mixture is never loaded.
    Processes that save to the same folder take turns.

    Args:
        save (`Callable`): The `save_pretrained` of Transformers, bound to `model`.
        model ([`FamilialForCausalLM`]): The family.
        folder (`str` or `os.PathLike`): The folder.
        *args: Positional arguments of `save` after the folder.
        by_segment (`bool`, *optional*): Whether to write one group of files per segment. By default
            families of 100 MB or more are split.
        **kwargs: Keyword arguments of `save`.
    """
    given = inspect.signature(save).bind(folder, *args).arguments
    kwargs |= {name: value for name, value in given.items() if name != "save_directory"}
    adapters = getattr(model, "_hf_peft_config_loaded", False)
    if adapters or kwargs.get("distributed_checkpoint"):
        save(folder, **kwargs)  # files of other formats, which Transformers handles
        return
    if kwargs.get("state_dict"):
        kwargs["state_dict"] = _without_ties(model, kwargs["state_dict"])
    folder = Path(folder)
    here = model.should_save_on_this_rank(kwargs.get("is_main_process", True))
    if kwargs.get("push_to_hub"):
        kwargs.setdefault("repo_id", folder.name)
    split = may_split(model, kwargs, by_segment)
    write = partial(save_by_segment, save, model) if split else save
    if here:
        with _written_aside(folder) as aside:
            write(aside, **kwargs)
            _replace(folder, aside, kwargs.get("variant"))
    else:
        write(folder, **kwargs)  # writes nothing here, but joins collective operations
    model.barrier_after_gathered_checkpoint_save(getattr(model.config, "distributed_config", None))


def _without_ties(model: Any, weights: Mapping[str, Any]) -> dict[str, Any]:
    """Return weights without the second name of a tied weight.

    Transformers finds ties by memory address, but DeepSpeed passes clones of all weights.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    second = set()
    for name, first in model.all_tied_weights_keys.items():
        both = name in weights and first in weights and name in parameters
        if both and parameters[name] is parameters.get(first):
            second.add(name)
    return {name: weight for name, weight in weights.items() if name not in second}


@contextmanager
def _written_aside(folder: Path) -> Iterator[Path]:
    """Create an empty subfolder for one process at a time, and remove it at the end."""
    aside, lock = folder / ASIDE, None
    while lock is None:
        aside.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # another process just removed it
            lock = _turn(aside) if fcntl else -1
    try:
        for left in aside.iterdir():  # files of a killed process
            left.unlink()
        yield aside
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        if lock != -1:
            os.close(lock)


def _turn(aside: Path) -> int | None:
    """Wait for the lock of a folder and return it. Return `None` if the folder was removed."""
    lock = os.open(aside, os.O_RDONLY)
    with suppress(OSError):  # some file systems do not support locks
        fcntl.flock(lock, fcntl.LOCK_EX)
    if aside.exists() and os.path.samestat(os.stat(aside), os.fstat(lock)):
        return lock
    os.close(lock)
    return None


def _replace(folder: Path, aside: Path, variant: str | None) -> None:
    """Replace the checkpoint in a folder by the finished one in `aside`."""
    # Without its index or single weight file a folder does not load. So the old one is removed
    # first, and the new one is moved last. The config is never missing, because a folder without
    # a config would load as a model of default sizes.

    def is_whole(name: str) -> bool:
        part = re.search(r"-of-\d{5}\.safetensors$", name)
        return part is None and WEIGHTS.fullmatch(name) is not None

    old = {name for name in os.listdir(folder) if name in BESIDE} | code_files(folder)
    keeps = _shared_config(folder) == _shared_config(aside)  # other variants of a family stay
    if not keeps and (folder / MEASURED).exists():
        old.add(MEASURED)
    for found in filter(None, map(WEIGHTS.fullmatch, os.listdir(folder))):
        other = found["variant"] or found["of_index"]
        if not keeps or other == variant or re.fullmatch(r"segment\d{5}", other or ""):
            old.add(found[0])
    if ADAPTER in old:
        logger.warning(
            "`%s` contained an adapter of an older checkpoint. It is removed, because it would be "
            "loaded with the new weights.",
            folder,
        )
    for name in sorted(old - {"config.json"}, key=is_whole, reverse=True):
        (folder / name).unlink()
    for name in sorted(os.listdir(aside), key=is_whole):
        os.replace(aside / name, folder / name)


def code_files(folder: Path) -> set[str]:
    """Return the names of the Python files that the family in a folder runs."""
    try:
        fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        paths = fields["auto_map"].values() if fields["model_type"] == "familial" else ()
        entries = [folder / f"{str(path).split('.')[0]}.py" for path in paths]
    except (AttributeError, KeyError, OSError, TypeError, ValueError):
        return set()
    found = set()
    for entry in entries:
        with suppress(OSError, ValueError):  # the file is missing or not text
            found |= {entry, *map(Path, get_relative_import_files(entry))}
    return {path.name for path in found if path.parent == folder and path.is_file()}


def _shared_config(folder: Path) -> Any:
    """Return the config in a folder without fields that differ by variant, or `None`."""

    def kept(fields: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in fields.items() if name not in OF_A_VARIANT}

    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"), object_hook=kept)
    except (OSError, ValueError):
        return None


def save_by_segment(
    save: Callable[..., None],
    model: Any,
    folder: Path,
    *,
    state_dict: Mapping[str, Any] | None = None,
    is_main_process: bool = True,
    **kwargs: Any,
) -> None:
    """Save the weights of a family with `save`, in one group of files per segment."""
    tensors = dict(model.state_dict() if state_dict is None else state_dict)
    tensors = remove_tied_weights_from_state_dict(tensors, model)
    spec = model.model.spec
    layers, norm = spec.path(spec.layers), spec.path(spec.norm)
    groups: list[dict[str, Any]] = [{} for _ in model.config.exits]
    for name, tensor in tensors.items():
        groups[segment_of(name, model.config, layers, norm)][name] = tensor
    for k, group in enumerate(groups):
        # a variant name per group, so that the files of the next group do not overwrite this one's
        kwargs["variant"] = SEGMENT.format(k)
        save(folder, state_dict=group, is_main_process=is_main_process, **kwargs)
    if model.should_save_on_this_rank(is_main_process):
        _number(folder, {"total_parameters": model.num_parameters()})


def _number(folder: Path, metadata: dict[str, Any]) -> None:
    """Rename the files of all groups to shards of one checkpoint, and write its index."""
    for path in folder.glob("model.safetensors.index.segment*.json"):
        path.unlink()
    parts = sorted(folder.glob("model.segment*.safetensors"))
    files: dict[str, str] = {}
    total = 0
    for i, part in enumerate(parts, start=1):
        header = read_header(part)
        files |= dict.fromkeys(header, shard_name(i, len(parts)))
        total += sum(entry.nbytes for entry in header.values())
        part.rename(folder / shard_name(i, len(parts)))
    write_index(folder, files, metadata | {"total_size": total})
