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
from ..checkpoints.index import INDEX, SINGLE, own_file, read_index
from ..checkpoints.partial_load import ADAPTER
from ..checkpoints.safetensors_file import TensorEntry, read_header
from ..errors import CheckpointError, HubUnavailableError
from ..models.familial import FamilialConfig, FamilialForCausalLM
from ..paths import is_local, near_path, no_such_path
from .remote import Retry, request


logger = logging.getLogger(__name__)

# downloads are tried again by the client itself
ONCE = Retry(attempts=1)


@dataclass(frozen=True)
class Source:
    """A folder or a repository; nothing is read before it is asked for.

    Attributes:
        name (`str`): Path of the folder or id of the repository.
        folder (`Path`, *optional*): The folder; `None` for a repository.
        revision (`str`, *optional*): Branch, tag or commit of the repository.
        token (`str` or `bool`, *optional*): For the Hub.
        endpoint (`str`, *optional*): Address of the Hub.
        retry ([`Retry`], *optional*): How often requests are sent again.
        guessed (`bool`): Whether it is a repository because there is no folder of that name.
    """

    name: str
    folder: Path | None
    revision: str | None = None
    token: str | bool | None = None
    endpoint: str | None = None
    retry: Retry | None = None
    guessed: bool = False

    @property
    def called(self) -> str:
        """As messages have it."""
        how = " (no folder here is called that, so it was taken for a repository on the Hub)"
        return f"`{self.name}`{how if self.guessed else ''}"

    @property
    def api(self) -> HfApi:
        """The client."""
        return HfApi(endpoint=self.endpoint, token=self.token)

    def read_text(self, filename: str) -> str | None:
        """A small file, or `None` if there is none of that name.

        Raises:
            CheckpointError: If it is a link that leads out of the folder.
            HubError: If the Hub cannot be read.
            OSError: If the file cannot be read.
        """
        if self.folder is None:
            path = self._local(filename)
        else:
            path = own_file(self.folder, filename)
        return path.read_text(encoding="utf-8") if path is not None and path.is_file() else None

    def read_json(self, filename: str) -> Any:
        """A small file of JSON, or `None` if there is none of that name.

        Raises:
            ValueError: If it is not JSON.
        """
        text = self.read_text(filename)
        try:
            return None if text is None else json.loads(text)
        except ValueError as error:
            raise ValueError(f"`{filename}` of `{self.name}` is not JSON: {error}.") from None

    def _local(self, filename: str) -> Path | None:
        """A file of the repository, downloaded unless it is in the client's cache."""
        what = f"read `{filename}` of {self.called}"
        try:
            download = partial(
                self.api.hf_hub_download, self.name, filename, revision=self.revision
            )
            return Path(request(what, download, ONCE))
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
        """The family's config.

        Raises:
            FileNotFoundError: If there is no `config.json`.
            ValueError: If it is not a family's.
        """
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
        """Return what the headers of its safetensors files say; no weights are read.

        Returns:
            `dict[str, TensorEntry]`, or `None` without such files, or if one is missing.

        Raises:
            CheckpointError: If a header is damaged.
            HubError: If the Hub cannot be read.
        """
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
        """Bring files of the repository into the client's cache; return the folder they are in.

        Raises:
            HubError: If the Hub cannot be read.
        """
        load = partial(
            self.api.snapshot_download,
            self.name,
            revision=self.revision,
            allow_patterns=patterns,
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
    path_or_repo: str | os.PathLike[str], *, local_files_only: bool = False, **where: Any
) -> Source:
    """Tell a folder from a repository.

    Args:
        path_or_repo (`str` or `os.PathLike`): Folder, or id of a repository on the Hub.
        local_files_only (`bool`, *optional*, defaults to `False`): Whether a repository is read
            from the client's cache alone, as it is in offline mode.
        **where: `revision`, `token`, `endpoint`, `retry` for a repository.

    Returns:
        [`Source`]

    Raises:
        FileNotFoundError: If it can only be a folder, and there is none; or if it must be in the
            cache, and is not.
        NotADirectoryError: If it is a file.
        TypeError: If it is neither a name nor a path.
    """
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


def open_family(path_or_repo: str | os.PathLike[str], **where: Any) -> FamilyFiles:
    """Open a family's checkpoint without its weights.

    Args:
        path_or_repo (`str` or `os.PathLike`): Folder, or id of a repository on the Hub.
        **where: `revision` and `token`, for a repository.

    Raises:
        CheckpointError: If the index is damaged, the weights are pickles or quantised.
        CutError: If an adapter lies beside the weights.
        OSError: If there is no such checkpoint, or the Hub cannot be read.
        ValueError: If it is not a family's.
    """
    source = find_source(path_or_repo, **where)
    folder = source.small_files()
    config = replace(source, folder=folder).config()
    return FamilyFiles.open(source.name, folder, source.fetch, config)


def origin_of(family: FamilialForCausalLM) -> Path | None:
    """Return the folder that a family in memory was read from; nothing is downloaded.

    The family was loaded from a folder or a repository, or made of a decoder that was. The folder
    of a repository is in the client's cache; `None` where there is none.
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
