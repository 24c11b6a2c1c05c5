"""Partial loading: load a family cut at an exit, with only the files and tensors it needs."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import GenerationConfig
from transformers.utils import cached_file

from ..errors import CutError
from ..models import is_family_config
from ..models.familial import FamilialConfig
from .cuts import check_cut, cut_config, cut_names, find_layout
from .index import ADAPTED, ADAPTER, INDEX, SINGLE, lies_in, read_index


# arguments of `from_pretrained` that select the files
WHERE = tuple("cache_dir force_download local_files_only proxies revision subfolder token".split())
OPTIONAL = {f"_raise_exceptions_for_{n}": False for n in ("missing_entries", "connection_errors")}


def load_cut(
    load: Callable[..., Any],
    path_or_repo: Any,
    max_exit: int,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Load a family cut at an exit. Only the files and tensors of the cut family are read.

    Args:
        load (`Callable`): The `from_pretrained` of Transformers, bound to the model class.
        path_or_repo (`str` or `os.PathLike`): The folder or Hub repository of the family.
        max_exit (`int`): The exit of the cut, which becomes the deepest one.
        *args: Positional arguments of `load` after the path.
        **kwargs: Keyword arguments of `load`.

    Raises:
        CutError: If the family cannot be cut there, or if the folder contains an adapter.
    """
    where = {name: kwargs[name] for name in WHERE if name in kwargs}
    config = kwargs.pop("config", None)
    if not is_family_config(config):
        config = FamilialConfig.from_pretrained(config or path_or_repo, **where)
    max_exit = config.resolve_exit(max_exit)
    check_cut(config, max_exit)
    smaller = cut_config(config, max_exit)
    for name in {field.name for field in dataclasses.fields(smaller)} & kwargs.keys() - {"dtype"}:
        setattr(smaller, name, kwargs.pop(name))
    if "generation_config" not in kwargs:
        with suppress(OSError):  # without a file, Transformers creates one from the config
            kwargs["generation_config"] = GenerationConfig.from_pretrained(path_or_repo, **where)
    with ExitStack() as files:
        slices = _slices(config, smaller, max_exit, path_or_repo, files, where)
        loaded = load(None, *args, config=smaller, state_dict=slices, **kwargs)
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    model.name_or_path = model.config.name_or_path = str(path_or_repo)
    return loaded


def _slices(
    config: FamilialConfig,
    smaller: FamilialConfig,
    max_exit: int,
    path_or_repo: Any,
    files: ExitStack,
    where: dict[str, Any],
) -> dict[str, Any]:
    """Return the tensors of the cut family by name, as slices that are read at their first use."""
    find = partial(cached_file, path_or_repo, **where)
    if find(ADAPTER, **OPTIONAL):
        raise CutError(ADAPTED.format(path_or_repo))

    def opened(name: str) -> Any:
        found = find(name) if os.path.basename(name) == name else None
        if found is None or not lies_in(Path(found), Path(found).parent):
            raise ValueError(
                f"`{path_or_repo}` has weights in `{name}`, which is not in its folder or is a "
                "link that leads out of it. Only files of the checkpoint itself are read. Copy the "
                "file into the folder."
            )
        file = files.enter_context(safe_open(found, framework="pt"))
        if quantised and (file.metadata() or {}).keys() - {"format"}:
            raise CutError(
                f"`{path_or_repo}` is quantised with settings in the metadata of its weight files, "
                "which a partial load does not read. Load it without `max_exit`."
            )
        return file

    configs = (config, config.text_config)
    quantised = any(getattr(c, "quantization_config", None) is not None for c in configs)
    index = None if find(SINGLE, **OPTIONAL) else find(INDEX)
    if index is None:
        shards = {SINGLE: opened(SINGLE)}
        weight_map = dict.fromkeys(shards[SINGLE].keys(), SINGLE)
    else:
        shards = {}
        weight_map = read_index(str(path_or_repo), Path(index).parent)
    names = cut_names(config, max_exit, weight_map, find_layout(smaller.text_config))
    for name in sorted({weight_map[source] for source in names} - shards.keys()):
        shards[name] = opened(name)
    return {new: shards[weight_map[old]].get_slice(old) for old, new in names.items()}
