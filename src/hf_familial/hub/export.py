"""Members as checkpoints of their own: plain ones of the host's class, or smaller families."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils.hub import convert_file_size_to_int

from .._files import whole_folder
from ..checkpoints.by_segment import segment_of, splits_by_segment
from ..checkpoints.companions import companions
from ..checkpoints.cuts import check_cut, cut_config, cut_names, find_layout, member_depth
from ..checkpoints.family_files import FamilyFiles
from ..checkpoints.index import plan_shards, write_shards
from ..checkpoints.member_models import cut_model, loaded_dtypes, merged_family, plain_model
from ..checkpoints.plain import add_old_names, plain_config, plain_tensors
from ..checkpoints.safetensors_file import FLOATS, TensorCopy, read_header
from ..models import is_family
from ..models.familial import FamilialForCausalLM
from ..models.familial.configuration_familial import check_choice
from ._source import open_family, origin_of


FORMATS = ("plain", "familial")
# dtypes to convert to, by name
NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS.values()}


@dataclass(frozen=True)
class ExportReport:
    """A report of the files that an export wrote.

    Attributes:
        path (`Path`): The folder.
        exit_idx (`int`): Exit at which the member ends, 0 or more.
        depth (`int`): Number of its layers, private ones counted.
        format (`str`): `"plain"` or `"familial"`.
        architecture (`str`): Class that loads it.
        dtype (`str`): Of its weights.
        tensors (`int`): Number of tensors.
        nbytes (`int`): Size of the weights, in bytes.
        files (`tuple[str, ...]`): Names of the files, sorted.
    """

    path: Path
    exit_idx: int
    depth: int
    format: str
    architecture: str
    dtype: str
    tensors: int
    nbytes: int
    files: tuple[str, ...]


@dataclass(frozen=True)
class _Options:
    """Arguments of `export_exit`, checked."""

    format: str
    asked: str | torch.dtype | None
    max_shard_size: int | str
    by_segment: bool | None
    overwrite: bool

    def __post_init__(self) -> None:
        check_choice("format", self.format, FORMATS)
        if self.asked not in (None, *NAMES, *NAMES.values()):
            check_choice("dtype", self.asked, NAMES)
        try:
            sound = convert_file_size_to_int(self.max_shard_size) > 0
        except ValueError:
            sound = False
        if not sound:
            raise ValueError(
                "`max_shard_size` must be a number of bytes, 1 or more, or such as '5GB', got "
                f"{self.max_shard_size!r}."
            )

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype to convert to."""
        return NAMES[self.asked] if isinstance(self.asked, str) else self.asked

    def targets(self, config: Any) -> Callable[[str, str], str]:
        """Return what maps a tensor's name in files and its stored dtype to its new dtype."""
        if self.dtype is None:
            return lambda name, stored: stored
        asked, codes = self.dtype, {kind: code for code, kind in FLOATS.items()}
        kinds = loaded_dtypes(config, asked)

        def target(name: str, stored: str) -> str:
            return codes.get(kinds.get(name, asked), stored) if stored in FLOATS else stored

        return target


def export_exit(
    model_or_path: FamilialForCausalLM | FamilyFiles | str | os.PathLike[str],
    exit_idx: int,
    out: str | os.PathLike[str],
    *,
    format: str = "plain",  # noqa: A002
    dtype: str | torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    by_segment: bool | None = None,
    overwrite: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
) -> ExportReport:
    """Write one member of a family as a checkpoint of its own.

    From a folder or a repository the model is never built: tensors are copied byte for byte from
    the safetensors files that hold them (of a repository, only these are downloaded), in a few MiB
    of memory. `out` appears whole or not at all.

    Args:
        model_or_path ([`FamilialForCausalLM`], `str` or `os.PathLike`): The family: in memory, a
            folder, or the id of a repository on the Hub.
        exit_idx (`int`): Exit at which the member ends.
        out (`str` or `os.PathLike`): Folder to write; it must not hold anything.
        format (`str`, *optional*, defaults to `"plain"`): `"plain"`, a checkpoint of the host's own
            class, which transformers loads without this package; or `"familial"`, the family with
            this exit as its deepest one.
        dtype (`str` or `torch.dtype`, *optional*): Convert floating-point weights to it, as
            `from_pretrained(dtype=...)` does: what the host keeps in float32 stays so.
        max_shard_size (`int` or `str`, *optional*, defaults to `"5GB"`): Size of a file of weights,
            in bytes or as in `"5GB"`.
        by_segment (`bool`, *optional*): Of a smaller family, whether every segment gets files of
            its own, as in `save_pretrained`.
        overwrite (`bool`, *optional*, defaults to `False`): Replace an `out` that holds something.
        revision (`str`, *optional*): Branch, tag or commit of the repository.
        token (`str` or `bool`, *optional*): For the Hub.

    Returns:
        [`ExportReport`]

    Raises:
        CheckpointError: If the checkpoint is damaged, quantised or made of pickles.
        CutError: If the member would not compute what the exit computes.
        IndexError: If there is no exit `exit_idx`.
        OSError: If there is no such checkpoint, or `out` cannot be written.
        TypeError: If `model_or_path` is neither a family nor a name.
        ValueError: If an argument is wrong.

    Example:
        >>> export_exit("outputs/pretrain", 0, "small")
        >>> AutoModelForCausalLM.from_pretrained("small")  # a stock Llama, Qwen3, ...
    """
    family = _open(model_or_path, revision=revision, token=token)
    options = _Options(format, dtype, max_shard_size, by_segment, overwrite)
    return _export(family, exit_idx, Path(out), options)


def export_family(
    model_or_path: FamilialForCausalLM | FamilyFiles | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    exits: Sequence[int] | None = None,
    format: str = "plain",  # noqa: A002
    dtype: str | torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    by_segment: bool | None = None,
    overwrite: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
) -> list[ExportReport]:
    """Write several members of a family, each in a folder `exit_<k>` of its own.

    Args:
        model_or_path ([`FamilialForCausalLM`], `str` or `os.PathLike`): As in [`export_exit`], like
            all that is not named here.
        out (`str` or `os.PathLike`): Folder of the folders.
        exits (`Sequence[int]`, *optional*): Exits to export; defaults to all.

    Returns:
        `list[ExportReport]`: In the order of `exits`.

    Raises:
        CutError: If one of the members cannot be exported; nothing is written then.
        OSError: As `export_exit`; members written before stay.
    """
    family = _open(model_or_path, revision=revision, token=token)
    options = _Options(format, dtype, max_shard_size, by_segment, overwrite)
    config = family.config
    wanted = range(config.num_exits) if exits is None else exits
    numbers = list(dict.fromkeys(config.resolve_exit(exit_idx) for exit_idx in wanted))
    for exit_idx in numbers:
        check_cut(config, exit_idx, verified=not isinstance(family, FamilyFiles))
    return [_export(family, k, Path(out) / f"exit_{k}", options) for k in numbers]


def _open(model_or_path: Any, **where: Any) -> FamilialForCausalLM | FamilyFiles:
    model_or_path = merged_family(model_or_path)
    if isinstance(model_or_path, FamilyFiles) or is_family(model_or_path):
        return model_or_path
    if isinstance(model_or_path, (str, os.PathLike)):
        return open_family(model_or_path, **where)
    raise TypeError(
        "a family is a `FamilialForCausalLM`, a folder or the id of a repository, got "
        f"{type(model_or_path).__name__}."
    )


def _export(
    family: FamilialForCausalLM | FamilyFiles, exit_idx: int, out: Path, options: _Options
) -> ExportReport:
    exit_idx = family.config.resolve_exit(exit_idx)
    if isinstance(family, FamilyFiles):
        _check_apart(family, out)
        _stream(family, exit_idx, out, options)
    else:
        _save(family, exit_idx, out, options)
    fields = json.loads((out / "config.json").read_text(encoding="utf-8"))
    weights = sorted(out.glob("*.safetensors"))
    return ExportReport(
        path=out,
        exit_idx=exit_idx,
        depth=member_depth(family.config, exit_idx),
        format=options.format,
        architecture=fields["architectures"][0],
        dtype=str(fields.get("dtype")),
        tensors=sum(len(read_header(path)) for path in weights),
        nbytes=sum(path.stat().st_size for path in weights),
        files=tuple(sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file())),
    )


def _stream(family: FamilyFiles, exit_idx: int, out: Path, options: _Options) -> None:
    """Export from files to files."""
    config = family.config
    check_cut(config, exit_idx)
    dtype = None if options.dtype is None else str(options.dtype).removeprefix("torch.")
    member: Any
    if options.format == "plain":
        member = plain_config(config, exit_idx, dtype)
        names = plain_tensors(config, exit_idx, family.files)
        groups = [list(names)]
    else:
        member = cut_config(config, exit_idx)
        layout = find_layout(member.text_config)
        member.architectures = [FamilialForCausalLM.__name__]
        member.dtype = dtype or config.dtype
        names = cut_names(config, exit_idx, family.files, layout)
        groups = [[] for _ in member.exits]
        for key, name in names.items():
            groups[segment_of(name, member, layout.layers, layout.norm)].append(key)
    where = family.locate(names)
    target = options.targets(member)
    copies = {
        source: TensorCopy(name, where[source], target(name, where[source].dtype))
        for source, name in names.items()
    }
    nbytes = sum(copy.nbytes for copy in copies.values())
    if not splits_by_segment(nbytes, options.by_segment):
        groups = [list(names)]
    shards = plan_shards([[copies[n] for n in group] for group in groups], options.max_shard_size)
    with whole_folder(out, options.overwrite) as folder:
        _check_space(folder, nbytes)
        write_shards(folder, shards)
        for path in family.companions():
            _copy_file(path, folder / path.relative_to(family.folder))
        if options.format == "familial":
            custom_object_save(FamilialForCausalLM, folder)
        # last: without it, nothing loads
        member.save_pretrained(folder)
        if options.format == "plain":
            add_old_names(member, folder)


def _save(family: FamilialForCausalLM, exit_idx: int, out: Path, options: _Options) -> None:
    """Export from memory to files, by the member's own class."""
    make = plain_model if options.format == "plain" else cut_model
    member = make(family, exit_idx, options.dtype)
    sizes: dict[str, Any] = {"max_shard_size": options.max_shard_size}
    if options.format == "familial":
        sizes["by_segment"] = options.by_segment
    origin = origin_of(family)
    with whole_folder(out, options.overwrite) as folder:
        _check_space(folder, sum(p.nbytes for p in member.state_dict().values()))
        member.save_pretrained(folder, **sizes)
        if options.format == "plain":
            add_old_names(member.config, folder)
        if origin is not None:
            for path in companions(origin):
                if path.name != "generation_config.json":
                    _copy_file(path, folder / path.relative_to(origin))


def _copy_file(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def _check_apart(family: FamilyFiles, out: Path) -> None:
    """Raise if a member would replace its own family."""
    folder, out = family.folder.resolve(), out.resolve()
    if out == folder or out in folder.parents:
        raise ValueError(f"`out` ({out}) must not be the folder of the family, or hold it.")


def _check_space(folder: Path, nbytes: int) -> None:
    """Raise before writing what the disk cannot hold."""
    free = shutil.disk_usage(folder).free
    if nbytes > free:
        raise OSError(
            errno.ENOSPC,
            f"the member takes {nbytes / 2**20:,.0f} MiB and {free / 2**20:,.0f} MiB are free",
            str(folder.parent),
        )
