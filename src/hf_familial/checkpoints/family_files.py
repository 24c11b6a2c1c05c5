"""The files of a family's checkpoint, opened without reading its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import CheckpointError, CutError
from ..models.familial import FamilialConfig
from .companions import companions
from .index import ADAPTED, ADAPTER, own_file, weight_files
from .plain import check_not_quantised
from .safetensors_file import TensorEntry, read_header


@dataclass(frozen=True)
class FamilyFiles:
    """A family's checkpoint whose weights have not been read.

    Attributes:
        name (`str`): What messages call it: path of the folder, or id of the repository.
        folder (`Path`): A folder with its small files.
        fetch (`Callable[[list[str]], Path]`): Brings files of the checkpoint to this machine and
            returns the folder that holds them; a missing file is left out.
        config ([`FamilialConfig`]): Its config.
        files (`Mapping[str, str]`): The file of every tensor, by the family's name of the tensor.
        in_files (`Mapping[str, str]`): Name of a tensor in its file, where it is another one.
    """

    name: str
    folder: Path
    fetch: Callable[[list[str]], Path]
    config: FamilialConfig
    files: Mapping[str, str]
    in_files: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def open(
        cls, name: str, folder: Path, fetch: Callable[[list[str]], Path], config: FamilialConfig
    ) -> FamilyFiles:
        """Open a checkpoint of this package.

        Raises:
            CheckpointError: If the index is damaged, the weights are pickles or quantised.
            CutError: If an adapter lies beside the weights.
            OSError: If there are no weights.
        """
        check_not_quantised(f"`{name}`", config)
        if own_file(folder, ADAPTER).is_file():
            raise CutError(ADAPTED.format(name))
        return cls(name, folder, fetch, config, weight_files(name, folder, fetch))

    def locate(self, names: Iterable[str]) -> dict[str, TensorEntry]:
        """Return where tensors are; only the files that hold them are fetched.

        Raises:
            CheckpointError: If a file is damaged, or does not hold what the index says.
            OSError: If a file is missing or cannot be downloaded.
        """
        names = list(names)
        needed = sorted({self.files[name] for name in names})
        folder = self.fetch(needed)
        headers = {file: read_header(own_file(folder, file)) for file in needed}
        found = {}
        for name in names:
            file, inside = self.files[name], self.in_files.get(name, name)
            if inside not in headers[file]:
                raise CheckpointError(
                    f"`{self.name}`: the index says that `{file}` holds `{inside}`, but it does "
                    "not."
                )
            found[name] = headers[file][inside]
        return found

    def companions(self) -> list[Path]:
        """Return tokenizer, generation config and licence, as paths in `folder`."""
        return companions(self.folder)
