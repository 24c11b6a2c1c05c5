"""Save a family in one group of files per segment, so that a member reads only its own.

Group k holds what exit k needs and no shallower one does: the layers between depth k - 1 and depth
k, and the modules of exit k. So the family up to exit k, and its member k, are in groups 0 to k.
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
except ImportError:  # Windows: two processes must not save to one folder at a time
    fcntl = None  # type: ignore[assignment]

logger = logging.get_logger(__name__)

# Bytes of weights from which families are split when nothing is said: a smaller one is downloaded
# whole in a moment, and one file is simpler to handle.
SPLIT_FROM = 100_000_000

# files of weights, with the name of their variant, if they have one
WEIGHTS = re.compile(
    r"model(?:\.(?P<variant>.+?))?(?:-\d{5}-of-\d{5})?\.safetensors"
    r"|model\.safetensors\.index(?:\.(?P<of_index>.+))?\.json"
)
SEGMENT = "segment{:05d}"  # what a group is called until all are written
MEASURED = "members.json"  # losses, of this family or of another
ASIDE = ".saving"  # folder, in the one that is saved to, in which a checkpoint is written

# what else of an older checkpoint would be taken for the new one's: an adapter is looked for first
BESIDE = (
    "config.json",
    "generation_config.json",
    ADAPTER,
    "adapter_model.safetensors",
)
# fields of a config that may differ between variants of one model
OF_A_VARIANT = ("dtype", "torch_dtype", "transformers_version", "architectures")


def splits_by_segment(nbytes: int, by_segment: bool | None = None) -> bool:
    """Return whether weights of this size go into one group of files per segment."""
    return nbytes >= SPLIT_FROM if by_segment is None else by_segment


def may_split(model: Any, options: Mapping[str, Any], by_segment: bool | None) -> bool:
    """Return whether to save a model by segment: the host's other ways of saving exclude it."""
    if getattr(model, "hf_quantizer", None) is not None:
        return False  # the quantiser names and lays out all weights at once
    weights = options.get("state_dict") or model.state_dict()
    nbytes = sum(getattr(weight, "nbytes", 0) for weight in weights.values())
    asked = splits_by_segment(nbytes, by_segment) and model.config.num_exits > 1
    adapters = getattr(model, "_hf_peft_config_loaded", False)
    distributed = getattr(model.config, "distributed_config", None) is not None
    others = ("variant", "distributed_checkpoint", "push_to_hub")
    headless = model.base_model is model
    return asked and not (adapters or distributed or headless or any(map(options.get, others)))


def segment_of(name: str, config: FamilialConfig, layers: str, norm: str) -> int:
    """Return the shallowest exit whose member needs a tensor, or the one that it belongs to.

    `layers` and `norm` are paths in the backbone. What is not in a layer belongs to exit 0.
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
    """Save a family with the host's own means; the checkpoint that a folder held is replaced.

    The new one is written aside first, so that the older one lasts until it is whole. While one
    takes the other's place the folder does not load: it never holds a mixture. Processes that save
    to one folder take turns.
    """
    given = inspect.signature(save).bind(folder, *args).arguments
    kwargs |= {name: value for name, value in given.items() if name != "save_directory"}
    adapters = getattr(model, "_hf_peft_config_loaded", False)
    if adapters or kwargs.get("distributed_checkpoint"):
        save(folder, **kwargs)  # files of other kinds, which are none of ours
        return
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
        write(folder, **kwargs)  # it writes nothing, and takes part in what processes share
    model.barrier_after_gathered_checkpoint_save(getattr(model.config, "distributed_config", None))


@contextmanager
def _written_aside(folder: Path) -> Iterator[Path]:
    """An empty folder to write in, of one process at a time; it is removed in the end."""
    aside, lock = folder / ASIDE, None
    while lock is None:
        aside.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # another process just removed it
            lock = _turn(aside) if fcntl else -1
    try:
        for left in aside.iterdir():  # of a process that was killed
            left.unlink()
        yield aside
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        if lock != -1:
            os.close(lock)


def _turn(aside: Path) -> int | None:
    """Wait until no other process writes here; `None` where it removed the folder by then."""
    lock = os.open(aside, os.O_RDONLY)
    with suppress(OSError):  # a file system without locks
        fcntl.flock(lock, fcntl.LOCK_EX)
    if aside.exists() and os.path.samestat(os.stat(aside), os.fstat(lock)):
        return lock
    os.close(lock)
    return None


def _replace(folder: Path, aside: Path, variant: str | None) -> None:
    """Put a finished checkpoint in the place of what a folder holds."""
    # Without its index or only file a folder does not load: that goes first and comes last. The
    # config is never missing, for a folder without one is taken for a model of default sizes.

    def is_whole(name: str) -> bool:
        part = re.search(r"-of-\d{5}\.safetensors$", name)
        return part is None and WEIGHTS.fullmatch(name) is not None

    old = {name for name in os.listdir(folder) if name in BESIDE} | code_files(folder)
    keeps = _told(folder) == _told(aside)  # another variant of the same family may stay
    if not keeps and (folder / MEASURED).exists():
        old.add(MEASURED)
    for found in filter(None, map(WEIGHTS.fullmatch, os.listdir(folder))):
        other = found["variant"] or found["of_index"]
        if not keeps or other == variant or re.fullmatch(r"segment\d{5}", other or ""):
            old.add(found[0])
    if ADAPTER in old:
        logger.warning("The adapter in `%s` is removed: it would be loaded instead.", folder)
    for name in sorted(old - {"config.json"}, key=is_whole, reverse=True):
        (folder / name).unlink()
    for name in sorted(os.listdir(aside), key=is_whole):
        os.replace(aside / name, folder / name)


def code_files(folder: Path) -> set[str]:
    """Return the names of the files of code that a family in a folder runs."""
    try:
        fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        paths = fields["auto_map"].values() if fields["model_type"] == "familial" else ()
        entries = [folder / f"{str(path).split('.')[0]}.py" for path in paths]
    except (AttributeError, KeyError, OSError, TypeError, ValueError):
        return set()
    found = set()
    for entry in entries:
        with suppress(OSError, ValueError):  # it is gone, or no text
            found |= {entry, *map(Path, get_relative_import_files(entry))}
    return {path.name for path in found if path.parent == folder and path.is_file()}


def _told(folder: Path) -> Any:
    """The config in a folder, without what differs between variants; `None` if it has none."""

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
    """Save a family's weights in one group of files per segment, with the host's own means."""
    tensors = dict(model.state_dict() if state_dict is None else state_dict)
    tensors = remove_tied_weights_from_state_dict(tensors, model)
    spec = model.model.spec
    layers, norm = spec.path(spec.layers), spec.path(spec.norm)
    groups: list[dict[str, Any]] = [{} for _ in model.config.exits]
    for name, tensor in tensors.items():
        groups[segment_of(name, model.config, layers, norm)][name] = tensor
    for k, group in enumerate(groups):
        # the name keeps the files of one call from those of the next, until all are there
        kwargs["variant"] = SEGMENT.format(k)
        save(folder, state_dict=group, is_main_process=is_main_process, **kwargs)
    if model.should_save_on_this_rank(is_main_process):
        _number(folder, {"total_parameters": model.num_parameters()})


def _number(folder: Path, metadata: dict[str, Any]) -> None:
    """Give the files of all segments the names of one sharded checkpoint, and its index."""
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
