"""Checkpoints of a family, one group of files per segment, of which a member reads only its own.

Group k holds what exit k needs and no shallower one does: the layers between depth k - 1 and depth
k, and the modules of exit k. So the family up to exit k, and its member k, are in groups 0 to k.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import GenerationConfig
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file, logging

from .configuration_familial import AUTO_MAP, FamilialConfig
from .contract import Contract
from .cuts import CutError, check_cut, cut_config, cut_names, find_layout, reads_embedding


try:
    import fcntl
except ImportError:  # Windows: two processes must not save to one folder at a time
    fcntl = None  # type: ignore[assignment]

logger = logging.get_logger(__name__)

# Bytes of weights from which families are split when nothing is said: a smaller one is downloaded
# whole in a moment, and one file is simpler to handle.
SPLIT_FROM = 100_000_000

# what `from_pretrained` passes on to find files, here as there
WHERE = tuple("cache_dir force_download local_files_only proxies revision subfolder token".split())
OPTIONAL = {f"_raise_exceptions_for_{n}": False for n in ("missing_entries", "connection_errors")}

# files of weights, with the name of their variant, if they have one
WEIGHTS = re.compile(
    r"model(?:\.(?P<variant>.+?))?(?:-\d{5}-of-\d{5})?\.safetensors"
    r"|model\.safetensors\.index(?:\.(?P<of_index>.+))?\.json"
)
SEGMENT = "segment{:05d}"  # what a group is called until all are written
MEASURED = "members.json"  # losses, of this family or of another
ADAPTER = "adapter_config.json"
ADAPTED = (
    "`{}` holds an adapter, which would be left out: move `adapter_config.json` and its weights to "
    "another folder, load that with `PeftModel.from_pretrained(family, folder)`, and merge it."
)
ASIDE = ".saving"  # folder, in the one that is saved to, in which a checkpoint is written

# what else of an older checkpoint would be taken for the new one's: an adapter is looked for first
BESIDE = (
    "config.json",
    "generation_config.json",
    ADAPTER,
    "adapter_model.safetensors",
    *{f"{path.split('.')[0]}.py" for path in AUTO_MAP.values()},
)
# fields of a config that may differ between variants of one model
OF_A_VARIANT = ("dtype", "torch_dtype", "transformers_version", "architectures")


def splits_by_segment(nbytes: int, by_segment: bool | None = None) -> bool:
    """Whether weights of this size go into one group of files per segment."""
    return nbytes >= SPLIT_FROM if by_segment is None else by_segment


def may_split(model: Any, options: Mapping[str, Any], by_segment: bool | None) -> bool:
    """Whether a model is to be saved by segment, the host's other ways of saving considered."""
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
    """The shallowest exit whose member needs a tensor, or the one that it belongs to.

    Args:
        name (`str`): Of a tensor of a `FamilialForCausalLM`, in memory or in a file.
        config ([`FamilialConfig`]): Of the family.
        layers (`str`): Path of the layers in the backbone.
        norm (`str`): Path of the final norm in the backbone; empty if there is none.

    Returns:
        `int`: Index of an exit; the embedding and what is not in a layer belong to exit 0.
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

    It is written aside first, so that the older one lasts until the new one is whole. While one
    takes the other's place the folder does not load: it never holds a mixture. Processes that save
    to one folder take turns.

    Args:
        save (`Callable[..., None]`): The host's `save_pretrained` of the model.
        model ([`FamilialPreTrainedModel`]): What it saves.
        folder (`str` or `os.PathLike`): Where to.
        *args: Passed on.
        by_segment (`bool`, *optional*): Whether each segment gets files of its own.
        **kwargs: Passed on.

    Raises:
        OSError: If something cannot be written.
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
    """Put a finished checkpoint in the place of what a folder holds.

    Without its index or only file a folder does not load: that goes first and comes last. The
    config is never missing, for a folder without one is taken for a model of default sizes.
    """

    def is_whole(name: str) -> bool:
        part = re.search(r"-of-\d{5}\.safetensors$", name)
        return part is None and WEIGHTS.fullmatch(name) is not None

    old = {name for name in os.listdir(folder) if name in BESIDE}
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
    """Save a family's weights in one group of files per segment, with the host's own means.

    Args:
        save (`Callable[..., None]`): The host's `save_pretrained` of the model.
        model ([`FamilialForCausalLM`]): What it saves.
        folder (`Path`): Where to; it holds no other weights.
        state_dict (`Mapping[str, Any]`, *optional*): Instead of the model's own.
        is_main_process (`bool`, *optional*, defaults to `True`): Whether this one writes.
        **kwargs: Passed on.

    Raises:
        OSError: If something cannot be written.
    """
    tensors = dict(model.state_dict() if state_dict is None else state_dict)
    tensors = remove_tied_weights_from_state_dict(tensors, model)
    contract: Contract = model.model.contract
    owner = f"{contract.owner}." if contract.owner else ""
    layers, norm = owner + contract.layers, owner + contract.norm if contract.norm else ""
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
    weight_map: dict[str, str] = {}
    for i, part in enumerate(parts):
        name = f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors"
        with safe_open(part, framework="pt") as file:
            weight_map |= dict.fromkeys(file.keys(), name)
        metadata["total_size"] = metadata.get("total_size", 0) + _data_size(part)
        part.rename(folder / name)
    index = {"metadata": metadata, "weight_map": weight_map}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(text, encoding="utf-8")


def _data_size(path: Path) -> int:
    """Bytes of tensors in a file, from the length of its header."""
    with path.open("rb") as file:
        return path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")


def load_cut(
    load: Callable[..., Any],
    path_or_repo: Any,
    max_exit: int,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Load the family cut at an exit; only the tensors it has are read, only their files fetched.

    Args:
        load (`Callable[..., Any]`): The host's `from_pretrained` of the class.
        path_or_repo (`str` or `os.PathLike`): Folder, or id of a repository on the Hub.
        max_exit (`int`): Exit to cut at: the deepest one of the result.
        *args: Passed on.
        **kwargs: Passed on.

    Returns:
        [`FamilialForCausalLM`], or what `load` returns.

    Raises:
        CutError: If the family cannot be cut at this exit.
        IndexError: If there is no such exit.
        OSError: If there is no such checkpoint, or a file that is needed is missing.
        ValueError: If a file of weights is outside the checkpoint's folder.
    """
    where = {name: kwargs[name] for name in WHERE if name in kwargs}
    config = kwargs.pop("config", None)
    if getattr(config, "model_type", None) != FamilialConfig.model_type:
        config = FamilialConfig.from_pretrained(config or path_or_repo, **where)
    max_exit = config.resolve_exit(max_exit)
    check_cut(config, max_exit)
    smaller = cut_config(config, max_exit)
    for name in {field.name for field in dataclasses.fields(smaller)} & kwargs.keys() - {"dtype"}:
        setattr(smaller, name, kwargs.pop(name))
    if "generation_config" not in kwargs:
        with suppress(OSError):  # the host makes one of the config
            kwargs["generation_config"] = GenerationConfig.from_pretrained(path_or_repo, **where)
    with ExitStack() as files:
        slices = _slices(config, smaller, max_exit, path_or_repo, files, where)
        loaded = load(None, *args, config=smaller, state_dict=slices, **kwargs)
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    model.name_or_path = model.config.name_or_path = str(path_or_repo)
    return loaded


def lies_in(path: Path, folder: Path) -> bool:
    """Tell whether a file of a folder is in it, no link that leads elsewhere.

    The snapshots of the client's cache are links to the files of the same repository.

    Args:
        path (`Path`): A file, by its name in the folder.
        folder (`Path`): The folder.

    Returns:
        `bool`
    """
    home = folder.resolve()
    snapshots = [home.parent for home in (home, *home.parents) if home.parent.name == "snapshots"]
    roots = [home, *(found.parent / "blobs" for found in snapshots)]
    return any(path.resolve().is_relative_to(root) for root in roots)


def _slices(
    config: FamilialConfig,
    smaller: FamilialConfig,
    max_exit: int,
    path_or_repo: Any,
    files: ExitStack,
    where: dict[str, Any],
) -> dict[str, Any]:
    """The tensors of the cut family, by their names there, to be read when they are needed."""

    find = partial(cached_file, path_or_repo, **where)
    if find(ADAPTER, **OPTIONAL):
        raise CutError(ADAPTED.format(path_or_repo))

    def opened(name: str) -> Any:
        found = find(name) if os.path.basename(name) == name else None
        if found is None or not lies_in(Path(found), Path(found).parent):
            raise ValueError(
                f"`{path_or_repo}` has weights in `{name}`, which is not in its folder or is a "
                "link that leads out of it: only files of the checkpoint itself are read."
            )
        file = files.enter_context(safe_open(found, framework="pt"))
        if quantised and (file.metadata() or {}).keys() - {"format"}:
            raise CutError(
                f"`{path_or_repo}` is quantised and its files say how in their own metadata, which "
                "is read of a whole family only: load it without `max_exit`."
            )
        return file

    configs = (config, config.text_config)
    quantised = any(getattr(c, "quantization_config", None) is not None for c in configs)
    index = None if find(SAFE_WEIGHTS_NAME, **OPTIONAL) else find(SAFE_WEIGHTS_INDEX_NAME)
    if index is None:
        shards = {SAFE_WEIGHTS_NAME: opened(SAFE_WEIGHTS_NAME)}
        weight_map = dict.fromkeys(shards[SAFE_WEIGHTS_NAME].keys(), SAFE_WEIGHTS_NAME)
    else:
        shards = {}
        weight_map = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
    names = cut_names(config, max_exit, weight_map, find_layout(smaller.text_config))
    for name in sorted({weight_map[source] for source in names} - shards.keys()):
        shards[name] = opened(name)
    return {new: shards[weight_map[old]].get_slice(old) for old, new in names.items()}


__all__ = ["lies_in", "load_cut", "save_checkpoint", "segment_of", "splits_by_segment"]
