"""Checkpoints in a folder or on the Hub, read without their weights where possible."""

from __future__ import annotations

import glob
import json
import logging
import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    NotASafetensorsRepoError,
    SafetensorsParsingError,
)
from huggingface_hub.utils import validate_repo_id

from ..checkpoints.companions import COMPANIONS, tokenizer_modules
from ..checkpoints.family_files import FamilyFiles
from ..checkpoints.index import ADAPTER, INDEX, SINGLE, own_file, read_index
from ..checkpoints.safetensors_file import TensorEntry, read_header
from ..errors import CheckpointError, HubUnavailableError
from ..models.familial import FamilialConfig, FamilialForCausalLM
from ..paths import is_local, near_path, no_such_path
from ._client import Retry, request


logger = logging.getLogger(__name__)

# the Hub client itself retries downloads
ONCE = Retry(attempts=1)


@dataclass(frozen=True)
class Source:
    """A checkpoint in a folder, or in a Hub repository if `folder` is `None`.

    Nothing is read until a method needs it.
    """

    name: str  # path of the folder, or id of the repository
    folder: Path | None
    revision: str | None = None  # branch, tag or commit of the repository
    token: str | bool | None = None
    endpoint: str | None = None
    retry: Retry | None = None
    guessed: bool = False  # true if no folder has this name, so it must be a repository

    @property
    def called(self) -> str:
        """The name of the checkpoint in messages."""
        how = " (there is no folder with this name, so it must be a repository on the Hub)"
        return f"`{self.name}`{how if self.guessed else ''}"

    @property
    def api(self) -> HfApi:
        """The Hub client."""
        return HfApi(endpoint=self.endpoint, token=self.token)

    def read_text(self, filename: str) -> str | None:
        """Return the text of a small file, or `None` if the file does not exist."""
        path = self._local(filename) if self.folder is None else own_file(self.folder, filename)
        return path.read_text(encoding="utf-8") if path is not None and path.is_file() else None

    def read_json(self, filename: str) -> Any:
        """Return the content of a JSON file, or `None` if the file does not exist.

        Raise `ValueError` if the file is not JSON.
        """
        text = self.read_text(filename)
        try:
            return None if text is None else json.loads(text)
        except ValueError as error:
            raise ValueError(f"`{filename}` of `{self.name}` is not JSON: {error}.") from None

    def _local(self, filename: str) -> Path | None:
        """Return the local path of a file of the repository. Download the file if necessary."""
        what = f"read `{filename}` of {self.called}"
        load = partial(self.api.hf_hub_download, self.name, filename, revision=self.revision)
        try:
            return Path(request(what, load, ONCE))
        except LocalEntryNotFoundError as error:
            raise HubUnavailableError(
                f"could not {what}: the Hub does not answer ({error.__cause__}), and the file is "
                "not in the local cache."
            ) from error
        except EntryNotFoundError:
            return None

    def cached(self) -> Source | None:
        """Return the repository as a folder of the local cache, or `None` if it is not there."""
        try:
            found = snapshot_download(self.name, revision=self.revision, local_files_only=True)
        except LocalEntryNotFoundError:
            return None
        return replace(self, folder=Path(found))

    def config(self) -> FamilialConfig:
        """Read the config of the family. Raise if there is no config or it is not a family."""
        fields = self.read_json("config.json")
        if fields is None:
            raise FileNotFoundError(
                f"{self.called} has no `config.json`, so it is not a checkpoint. Pass a family "
                "that `save_pretrained` or `push_family_to_hub` wrote."
            )
        model_type = fields.get("model_type") if isinstance(fields, dict) else None
        if model_type != FamilialConfig.model_type:
            raise ValueError(
                f"`{self.name}` is a `{model_type}`, not a family. Turn it into a family with "
                "`FamilialForCausalLM.from_backbone`."
            )
        # Transformers writes infinite numbers as strings, because JSON has none
        return FamilialConfig.from_dict(FamilialConfig._decode_special_floats(fields))

    def tensors(self) -> dict[str, TensorEntry] | None:
        """Read the headers of all safetensors files. Return `None` if a file is missing."""
        return (self._on_hub() if self.folder is None else self._in_folder(self.folder)) or None

    def _in_folder(self, folder: Path) -> dict[str, TensorEntry]:
        single = own_file(folder, SINGLE).is_file()  # `from_pretrained` looks for it first
        names = [SINGLE] if single else sorted(set(read_index(self.name, folder).values()))
        files = [own_file(folder, name) for name in names]
        if not all(path.is_file() for path in files):
            return {}  # the sizes of some files would look like those of the whole checkpoint
        return {name: row for path in files for name, row in read_header(path).items()}

    def _on_hub(self) -> dict[str, TensorEntry]:
        """Download only the first bytes of each file."""
        ask = partial(self.api.get_safetensors_metadata, self.name, revision=self.revision)
        try:
            metadata = request(f"read the headers of {self.called}", ask, self.retry)
        except NotASafetensorsRepoError:
            return {}
        except SafetensorsParsingError as error:
            raise CheckpointError(f"`{self.name}` has a damaged header: {error}.") from None
        return {
            name: TensorEntry(tensor.dtype, tuple(tensor.shape), start, end - start)
            for file in metadata.files_metadata.values()
            for name, tensor in file.tensors.items()
            for start, end in [tensor.data_offsets]
        }

    def fetch(self, names: list[str]) -> Path:
        """Download the existing files among `names`, and return the folder that contains them."""
        return self.folder or self.download([glob.escape(name) for name in names])

    def download(self, patterns: list[str]) -> Path:
        """Download files of the repository into the local cache, and return their folder."""
        load = partial(
            self.api.snapshot_download, self.name, revision=self.revision, allow_patterns=patterns
        )
        return Path(request(f"download {self.called}", load, self.retry))

    def small_files(self) -> Path:
        """Return a folder with the config, the index and the companion files."""
        if self.folder is not None:
            return self.folder
        names = ["config.json", INDEX, ADAPTER, *COMPANIONS]
        folder = self.download(names)
        if tokenizer_modules(folder):
            # the tokenizer's code may import other files, so download all of them
            folder = self.download([*names, "*.py"])
        return folder


def find_source(
    path_or_repo: str | os.PathLike[str] | Source, *, local_files_only: bool = False, **where: Any
) -> Source:
    """Return the folder or the Hub repository that `path_or_repo` names."""
    if isinstance(path_or_repo, Source):
        return path_or_repo
    if not isinstance(path_or_repo, (str, os.PathLike)):
        raise TypeError(
            "A family must be a folder or the id of a repository, got "
            f"{type(path_or_repo).__name__}."
        )
    name = os.fspath(path_or_repo)
    if Path(name).is_dir():
        return Source(name, Path(name))
    if Path(name).is_file():
        raise NotADirectoryError(f"`{name}` is a file. Pass the folder of the checkpoint.")
    try:
        validate_repo_id(name)
    except HFValidationError:
        if near_path(name):
            raise no_such_path(name, "folder") from None
        raise FileNotFoundError(
            f"there is no folder `{name}`, and it is not a repository id such as `user/name`."
        ) from None
    # a revision means that the checkpoint is on the Hub
    local = is_local(name) and where.get("revision") is None
    if isinstance(path_or_repo, os.PathLike) or name.startswith((".", "~")) or local:
        raise no_such_path(name, "folder")
    if "/" in name and Path(name).parent.is_dir():
        # without this message, the user may wait for half a minute
        logger.warning("There is no folder `%s`. Looking for it on the Hub.", name)
    source = Source(name, None, guessed=True, **where)
    if not local_files_only and not constants.HF_HUB_OFFLINE:
        return source
    cached = source.cached()
    if cached is None and local_files_only:
        raise FileNotFoundError(f"{source.called} is not in the local cache.")
    return cached or source  # the Hub client reports that it is offline


def open_family(path_or_repo: str | os.PathLike[str] | Source, **where: Any) -> FamilyFiles:
    """Open the checkpoint of a family without reading its weights.

    The arguments are those of [`find_source`].
    """
    source = find_source(path_or_repo, **where)
    folder = source.small_files()
    config = replace(source, folder=folder).config()
    return FamilyFiles.open(source.name, folder, source.fetch, config)


def origin_of(family: FamilialForCausalLM) -> Path | None:
    """Return the folder that a family in memory was loaded from, without downloading anything."""
    name = family.name_or_path or family.config.text_config.name_or_path
    if not name or Path(name).is_dir():
        return Path(name) if name else None
    # the commit of the family, or of the pretrained decoder that it was created from
    configs = (family.config, family.config.text_config)
    commits = (getattr(config, "_commit_hash", None) for config in configs)
    commit = next(filter(None, commits), None)
    try:
        # every model that was loaded has a config in the cache
        found = try_to_load_from_cache(name, "config.json", revision=commit)
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None
