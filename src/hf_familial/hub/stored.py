"""The files of a family, in a folder or on the Hub: of its weights only what is asked for."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from ..checkpoints.partial_load import ADAPTED, ADAPTER
from ..errors import CheckpointError, CutError, PickleCheckpointError
from ..models.familial import FamilialConfig, FamilialForCausalLM
from .companions import COMPANIONS, companions, tokenizer_modules
from .remote import request
from .safetensors_io import Stored, read_header
from .source import INDEX, SINGLE, Source, find_source, own_file, read_index


PICKLES = ("*.bin", "*.pt", "*.pth", "*.bin.index.json")


@dataclass(frozen=True)
class StoredFamily:
    """A family's checkpoint whose weights have not been read.

    Attributes:
        source ([`Source`]): Where it is.
        folder (`Path`): A folder with its small files.
        config ([`FamilialConfig`]): Its config.
        files (`Mapping[str, str]`): The file of every tensor, by name.
    """

    source: Source
    folder: Path
    config: FamilialConfig
    files: Mapping[str, str]

    def locate(self, names: Iterable[str]) -> dict[str, Stored]:
        """Where tensors are; from the Hub, only the files that hold them are downloaded.

        Args:
            names (`Iterable[str]`): Of tensors in `files`.

        Returns:
            `dict[str, Stored]`: In the order given.

        Raises:
            CheckpointError: If a file is damaged, or does not hold what the index says.
            OSError: If a file is missing or cannot be downloaded.
        """
        names = list(names)
        needed = sorted({self.files[name] for name in names})
        folder = self.folder
        if self.source.folder is None:
            folder = download(self.source, [glob.escape(file) for file in needed])
        headers = {file: read_header(own_file(folder, file)) for file in needed}
        for name in names:
            if name not in headers[self.files[name]]:
                raise CheckpointError(
                    f"`{self.source.name}`: the index says that `{self.files[name]}` holds "
                    f"`{name}`, but it does not."
                )
        return {name: headers[self.files[name]][name] for name in names}

    def companions(self) -> list[Path]:
        """Tokenizer, generation config and licence, as paths in `folder`."""
        return companions(self.folder)


def open_family(path_or_repo: str | os.PathLike[str], **where: Any) -> StoredFamily:
    """Open a family's checkpoint without its weights.

    Args:
        path_or_repo (`str` or `os.PathLike`): Folder, or id of a repository on the Hub.
        **where: `revision` and `token`, for a repository.

    Returns:
        [`StoredFamily`]

    Raises:
        CheckpointError: If the index is damaged, the weights are pickles or quantised.
        CutError: If an adapter lies beside the weights.
        OSError: If there is no such checkpoint, or the Hub cannot be read.
        ValueError: If it is not a family's.
    """
    source = find_source(path_or_repo, **where)
    folder = source.folder or download_companions(source)
    config = replace(source, folder=folder).config()
    refuse_quantised(f"`{source.name}`", config)
    if own_file(folder, ADAPTER).is_file():
        raise CutError(ADAPTED.format(source.name))
    if source.folder is None and not (folder / INDEX).is_file():
        folder = download(source, [SINGLE])
    return StoredFamily(source, folder, config, weight_files(source.name, folder))


def refuse_quantised(called: str, config: FamilialConfig, quantised: bool = False) -> None:
    """Refuse a family whose tensors a member cannot take over.

    Args:
        called (`str`): What a message calls it.
        config ([`FamilialConfig`]): Its config, which may say so, as may that of its backbone.
        quantised (`bool`, *optional*, defaults to `False`): Whether it is known already.

    Raises:
        CheckpointError: If it is quantised.
    """
    configs = (config, config.text_config)
    if quantised or any(getattr(c, "quantization_config", None) is not None for c in configs):
        raise CheckpointError(
            f"{called} is quantised: its tensors are no copies of a member's. Export the family in "
            "its original precision, then quantise the member."
        )


def origin_of(family: FamilialForCausalLM) -> Path | None:
    """The folder that a family in memory was read from; nothing is downloaded.

    Args:
        family ([`FamilialForCausalLM`]): Loaded from a folder or a repository, or made of a decoder
            that was.

    Returns:
        `Path`: The folder, or the repository's in the client's cache; `None` where there is none.
    """
    name = family.name_or_path or family.config.text_config.name_or_path
    if not name or Path(name).is_dir():
        return Path(name) if name else None
    # of the family, or of the decoder that it was made of
    configs = (family.config, family.config.text_config)
    commits = (getattr(config, "_commit_hash", None) for config in configs)
    commit = next(filter(None, commits), None)
    try:
        # every model that was loaded has a config
        found = try_to_load_from_cache(name, "config.json", revision=commit)
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def download_companions(source: Source) -> Path:
    """Bring config, index and what members take along into the client's cache; the folder."""
    names = ["config.json", INDEX, ADAPTER, *COMPANIONS]
    folder = download(source, names)
    # which files the code of a tokenizer imports is known when they are read
    return download(source, [*names, "*.py"]) if tokenizer_modules(folder) else folder


def download(source: Source, patterns: list[str]) -> Path:
    """Bring files of a repository into the client's cache.

    Args:
        source ([`Source`]): The repository.
        patterns (`list[str]`): Which files, as in `snapshot_download`.

    Returns:
        `Path`: The folder they are in.

    Raises:
        HubError: If the Hub cannot be read.
    """
    fetch = partial(
        source.api.snapshot_download,
        source.name,
        revision=source.revision,
        allow_patterns=patterns,
    )
    return Path(request(f"download {source.called}", fetch, source.retry))


def weight_files(name: str, folder: Path) -> dict[str, str]:
    """The file of every tensor.

    Args:
        name (`str`): What the checkpoint is called in messages.
        folder (`Path`): Where its index or its only file of weights is.

    Returns:
        `dict[str, str]`: Name of a tensor to name of a file in the folder.

    Raises:
        CheckpointError: If the index or the header is damaged, or names files elsewhere.
        FileNotFoundError: If there are no weights.
        PickleCheckpointError: If there are only pickles.
    """
    if own_file(folder, SINGLE).is_file():
        return dict.fromkeys(read_header(folder / SINGLE), SINGLE)
    files = read_index(name, folder)
    if not files:
        pickles = [path.name for pattern in PICKLES for path in folder.glob(pattern)]
        if pickles:
            raise PickleCheckpointError(
                f"`{name}` holds pickles only ({pickles[0]}), which can run any code when they are "
                "read. Load it where you trust it and save it again, as safetensors."
            )
        raise FileNotFoundError(f"`{name}` holds neither `{SINGLE}` nor `{INDEX}`.")
    return files


__all__ = [
    "StoredFamily",
    "download",
    "download_companions",
    "open_family",
    "origin_of",
    "refuse_quantised",
    "weight_files",
]
