"""A checkpoint in a folder or on the Hub, read as far as possible without its weights."""

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

# downloads are tried again by the client itself
ONCE = Retry(attempts=1)


@dataclass(frozen=True)
class Source:
    """A folder, or a repository where `folder` is `None`, read when something is asked of it."""

    name: str  # path of the folder, or id of the repository
    folder: Path | None
    revision: str | None = None  # branch, tag or commit of the repository
    token: str | bool | None = None
    endpoint: str | None = None
    retry: Retry | None = None
    guessed: bool = False  # whether it is a repository because no folder has this name

    @property
    def called(self) -> str:
        """Its name as messages have it."""
        how = " (no folder here is called that, so it was taken for a repository on the Hub)"
        return f"`{self.name}`{how if self.guessed else ''}"

    @property
    def api(self) -> HfApi:
        """The client."""
        return HfApi(endpoint=self.endpoint, token=self.token)

    def read_text(self, filename: str) -> str | None:
        """Return a small file, or `None` if there is none of that name."""
        path = self._local(filename) if self.folder is None else own_file(self.folder, filename)
        return path.read_text(encoding="utf-8") if path is not None and path.is_file() else None

    def read_json(self, filename: str) -> Any:
        """Return a small file of JSON, or `None`; raise `ValueError` if it is not JSON."""
        text = self.read_text(filename)
        try:
            return None if text is None else json.loads(text)
        except ValueError as error:
            raise ValueError(f"`{filename}` of `{self.name}` is not JSON: {error}.") from None

    def _local(self, filename: str) -> Path | None:
        """Return a file of the repository, downloaded unless it is in the client's cache."""
        what = f"read `{filename}` of {self.called}"
        load = partial(self.api.hf_hub_download, self.name, filename, revision=self.revision)
        try:
            return Path(request(what, load, ONCE))
        except LocalEntryNotFoundError as error:
            raise HubUnavailableError(
                f"could not {what}: the Hub does not answer ({error.__cause__}), and the file is "
                "not in the cache."
            ) from error
        except EntryNotFoundError:
            return None

    def cached(self) -> Source | None:
        """Return the folder of the repository in the client's cache, or `None`."""
        try:
            found = snapshot_download(self.name, revision=self.revision, local_files_only=True)
        except LocalEntryNotFoundError:
            return None
        return replace(self, folder=Path(found))

    def config(self) -> FamilialConfig:
        """Read the family's config; raise if there is none, or it is not a family's."""
        fields = self.read_json("config.json")
        if fields is None:
            raise FileNotFoundError(
                f"{self.called} holds no `config.json`: it is not a checkpoint. A family is what "
                "`save_pretrained` or `push_family_to_hub` leaves."
            )
        model_type = fields.get("model_type") if isinstance(fields, dict) else None
        if model_type != FamilialConfig.model_type:
            raise ValueError(
                f"`{self.name}` is a `{model_type}`, not a family: "
                "`FamilialForCausalLM.from_backbone` makes a family of it."
            )
        # as the host reads them from a file: infinities are spelled out in JSON
        return FamilialConfig.from_dict(FamilialConfig._decode_special_floats(fields))

    def tensors(self) -> dict[str, TensorEntry] | None:
        """Read the headers of its safetensors files; `None` if there is none or one is missing."""
        return (self._on_hub() if self.folder is None else self._in_folder(self.folder)) or None

    def _in_folder(self, folder: Path) -> dict[str, TensorEntry]:
        single = own_file(folder, SINGLE).is_file()  # the loader looks for it first
        names = [SINGLE] if single else sorted(set(read_index(self.name, folder).values()))
        files = [own_file(folder, name) for name in names]
        if not all(path.is_file() for path in files):
            return {}  # sizes of a part would be taken for those of the whole
        return {name: row for path in files for name, row in read_header(path).items()}

    def _on_hub(self) -> dict[str, TensorEntry]:
        """Ask the Hub for the first bytes of each file."""
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
        """Bring files to this machine, those that are there; return the folder that holds them."""
        return self.folder or self.download([glob.escape(name) for name in names])

    def download(self, patterns: list[str]) -> Path:
        """Bring files of the repository into the client's cache; return the folder they are in."""
        load = partial(
            self.api.snapshot_download, self.name, revision=self.revision, allow_patterns=patterns
        )
        return Path(request(f"download {self.called}", load, self.retry))

    def small_files(self) -> Path:
        """Return a folder with config, index and companions."""
        if self.folder is not None:
            return self.folder
        names = ["config.json", INDEX, ADAPTER, *COMPANIONS]
        folder = self.download(names)
        if tokenizer_modules(folder):
            # which files the code of a tokenizer imports is known when they are read
            folder = self.download([*names, "*.py"])
        return folder


def find_source(
    path_or_repo: str | os.PathLike[str] | Source, *, local_files_only: bool = False, **where: Any
) -> Source:
    """Tell a folder from a repository."""
    if isinstance(path_or_repo, Source):
        return path_or_repo
    if not isinstance(path_or_repo, (str, os.PathLike)):
        raise TypeError(
            "a family is given as a folder or the id of a repository, got "
            f"{type(path_or_repo).__name__}."
        )
    name = os.fspath(path_or_repo)
    if Path(name).is_dir():
        return Source(name, Path(name))
    if Path(name).is_file():
        raise NotADirectoryError(f"`{name}` is a file; give the folder of the checkpoint.")
    try:
        validate_repo_id(name)
    except HFValidationError:
        if near_path(name):
            raise no_such_path(name, "folder") from None
        raise FileNotFoundError(
            f"there is no folder `{name}`, and the id of a repository looks like `user/name`."
        ) from None
    # a revision says that it is on the Hub
    local = is_local(name) and where.get("revision") is None
    if isinstance(path_or_repo, os.PathLike) or name.startswith((".", "~")) or local:
        raise no_such_path(name, "folder")
    if "/" in name and Path(name).parent.is_dir():
        # the client may try for half a minute before anything is said
        logger.warning("There is no folder `%s`; it is looked for on the Hub.", name)
    source = Source(name, None, guessed=True, **where)
    if not local_files_only and not constants.HF_HUB_OFFLINE:
        return source
    cached = source.cached()
    if cached is None and local_files_only:
        raise FileNotFoundError(f"{source.called} is not in the client's cache.")
    return cached or source  # the client says that it is offline


def open_family(path_or_repo: str | os.PathLike[str] | Source, **where: Any) -> FamilyFiles:
    """Open a family's checkpoint without its weights; arguments as of [`find_source`]."""
    source = find_source(path_or_repo, **where)
    folder = source.small_files()
    config = replace(source, folder=folder).config()
    return FamilyFiles.open(source.name, folder, source.fetch, config)


def origin_of(family: FamilialForCausalLM) -> Path | None:
    """Return the folder that a family in memory was read from; nothing is downloaded."""
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
