"""The files of a family's checkpoint, without its weights in memory."""

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
    """A family's checkpoint, without its weights in memory.

    Attributes:
        name (`str`): The path of the folder or the id of the repository, for messages.
        folder (`Path`): A folder with its small files.
        fetch (`Callable[[list[str]], Path]`): A function that downloads files of the checkpoint if
            needed, and returns the folder that contains them. It skips missing files.
        config ([`FamilialConfig`]): The config of the family.
        files (`Mapping[str, str]`): The file of each tensor, by the tensor's name in the family.
        in_files (`Mapping[str, str]`): The name of a tensor in its file, if it differs.
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
        """Open a checkpoint that this package saved.

        Raises:
            CheckpointError: If the index is damaged, or if the weights are pickles or quantised.
            CutError: If the folder also contains an adapter.
            OSError: If there are no weights.
        """
        check_not_quantised(f"`{name}`", config)
        if own_file(folder, ADAPTER).is_file():
            raise CutError(ADAPTED.format(name))
        return cls(name, folder, fetch, config, weight_files(name, folder, fetch))

    def locate(self, names: Iterable[str]) -> dict[str, TensorEntry]:
        """Return the entries of tensors in their files. Only files with these tensors are fetched.

        Raises:
            CheckpointError: If a file is damaged, or if a tensor is not in the file of the index.
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
                    f"`{file}` of `{self.name}` does not contain the tensor `{inside}`, although "
                    "the index lists it there."
                )
            found[name] = headers[file][inside]
        return found

    def companions(self) -> list[Path]:
        """Return the paths of tokenizer files, generation config and licence in `folder`."""
        return companions(self.folder)
