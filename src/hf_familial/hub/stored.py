"""The files of a family, in a folder or on the Hub: of its weights only what is asked for."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from ..models.familial import FamilialConfig, FamilialForCausalLM
from .remote import request
from .safetensors_io import CheckpointError, PickleCheckpointError, Stored, read_header
from .source import Source, find_source


SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.bin.index.json")

# of these, a tokenizer leaves one at least
TOKENIZERS = ("tokenizer*", "vocab.*", "*.tiktoken", "*.model", "tekken.json")
TOKENIZER_FILES = (
    *TOKENIZERS,
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template*",
    "additional_chat_templates/*",
)
# what a member takes along besides config and weights
COMPANIONS = ("generation_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*", *TOKENIZER_FILES)


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
        folder = download(self.source, needed) if self.source.folder is None else self.folder
        headers = {file: read_header(folder / file) for file in needed}
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
        OSError: If there is no such checkpoint, or the Hub cannot be read.
        ValueError: If it is not a family's.
    """
    source = find_source(path_or_repo, **where)
    folder = source.folder or download(source, ["config.json", INDEX, *COMPANIONS])
    config = replace(source, folder=folder).config()
    if getattr(config, "quantization_config", None) is not None:
        raise CheckpointError(
            f"`{source.name}` is quantised: its tensors are no copies of a member's. Export the "
            "family in its original precision, then quantise the member."
        )
    if source.folder is None and not (folder / INDEX).is_file():
        folder = download(source, [SINGLE])
    return StoredFamily(source, folder, config, weight_files(source.name, folder))


def companions(folder: Path) -> list[Path]:
    """Files of a folder that a member takes along."""
    found = {path for pattern in COMPANIONS for path in folder.glob(pattern)}
    return sorted(path for path in found if path.is_file())


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


def holds_tokenizer(folder: Path) -> bool:
    """Whether a folder holds the files of a tokenizer."""
    return any(path.is_file() for pattern in TOKENIZERS for path in folder.glob(pattern))


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
    if (folder / SINGLE).is_file():
        return dict.fromkeys(read_header(folder / SINGLE), SINGLE)
    if not (folder / INDEX).is_file():
        pickles = [path.name for pattern in PICKLES for path in folder.glob(pattern)]
        if pickles:
            raise PickleCheckpointError(
                f"`{name}` holds pickles only ({pickles[0]}), which can run any code when they are "
                "read. Load it where you trust it and save it again, as safetensors."
            )
        raise FileNotFoundError(f"`{name}` holds neither `{SINGLE}` nor `{INDEX}`.")
    try:
        files = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        sound = all(isinstance(file, str) for file in files.values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        sound = False
    if not sound or not files:
        raise CheckpointError(f"`{INDEX}` of `{name}` is damaged: it has no `weight_map` of names.")
    for file in set(files.values()):
        if Path(file).name != file or not file.endswith(".safetensors"):
            kind = PickleCheckpointError if file.endswith((".bin", ".pt")) else CheckpointError
            raise kind(
                f"`{INDEX}` of `{name}` names `{file}`: only safetensors files beside it are read."
            )
    return files


__all__ = [
    "StoredFamily",
    "companions",
    "download",
    "holds_tokenizer",
    "open_family",
    "origin_of",
    "weight_files",
]
