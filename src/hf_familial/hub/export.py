"""Export of one member of a family as a plain checkpoint or as a smaller family."""

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
# name of each dtype that weights can be converted to
NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS.values()}


@dataclass(frozen=True)
class ExportReport:
    """A summary of the files that an export wrote.

    Attributes:
        path (`Path`): Folder with the exported member.
        exit_idx (`int`): Exit at which the member ends, 0 or more.
        depth (`int`): Number of layers of the member, private layers included.
        format (`str`): `"plain"` or `"familial"`.
        architecture (`str`): Class that loads the member, for example `"LlamaForCausalLM"`.
        dtype (`str`): Dtype of the weights.
        tensors (`int`): Number of tensors.
        nbytes (`int`): Size of the files with weights, in bytes.
        files (`tuple[str, ...]`): Names of all files, sorted.
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
    """Checked arguments of `export_exit`."""

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
                "`max_shard_size` must be a number of bytes, 1 or more, or text like '5GB', got "
                f"{self.max_shard_size!r}."
            )

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype to convert to, or `None`."""
        return NAMES[self.asked] if isinstance(self.asked, str) else self.asked

    def targets(self, config: Any) -> Callable[[str, str], str]:
        """Return a function from a tensor's name and stored dtype to its new dtype."""
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
    """Write one member of a family to a folder, as a checkpoint that loads without the family.

    If the family is in a folder or on the Hub, the model is not built. The function copies the
    bytes of the member's tensors and needs a few MiB of memory. From the Hub, it downloads only the
    files that contain these tensors. `out` is written atomically.

    Args:
        model_or_path ([`FamilialForCausalLM`], `str` or `os.PathLike`): The family: a model in
            memory, a folder, or the id of a repository on the Hub.
        exit_idx (`int`): Exit at which the member ends.
        out (`str` or `os.PathLike`): Folder to write. It must be empty or missing.
        format (`str`, *optional*, defaults to `"plain"`): `"plain"` writes an ordinary checkpoint,
            such as a Llama, which Transformers loads without this package. `"familial"` writes a
            smaller family whose deepest exit is `exit_idx`.
        dtype (`str` or `torch.dtype`, *optional*): Dtype to convert the floating-point weights to.
            Weights that the model class keeps in float32 stay in float32, as with
            `from_pretrained(dtype=...)`. Defaults to no conversion.
        max_shard_size (`int` or `str`, *optional*, defaults to `"5GB"`): Maximum size of a file of
            weights, as a number of bytes or as text like `"5GB"`.
        by_segment (`bool`, *optional*): Whether a smaller family gets separate files for each
            segment, as in `save_pretrained`.
        overwrite (`bool`, *optional*, defaults to `False`): Whether to replace an existing `out`.
        revision (`str`, *optional*): Branch, tag or commit of the repository.
        token (`str` or `bool`, *optional*): Token for the Hub.

    Returns:
        [`ExportReport`]

    Raises:
        CheckpointError: If the checkpoint is damaged or quantised, or consists of pickle files.
        CutError: If the member would not compute the same logits as the exit.
        IndexError: If the exit does not exist.
        OSError: If the checkpoint does not exist, or if `out` cannot be written.
        TypeError: If `model_or_path` is neither a family nor a path.
        ValueError: If an argument is wrong.

    Example:
        >>> export_exit("outputs/pretrain", 0, "small")
        >>> AutoModelForCausalLM.from_pretrained("small")  # an ordinary Llama, Qwen3, ...
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
    """Write several members of a family, each to its own folder `out/exit_<k>`.

    Arguments that are not listed here are those of [`export_exit`].

    Args:
        model_or_path ([`FamilialForCausalLM`], `str` or `os.PathLike`): The family: a model in
            memory, a folder, or the id of a repository on the Hub.
        out (`str` or `os.PathLike`): Folder for the folders of the members.
        exits (`Sequence[int]`, *optional*): Exits to export. Defaults to all.

    Returns:
        `list[ExportReport]`: One report per member, in the order of `exits`.

    Raises:
        CutError: If one of the members cannot be exported. Nothing is written then.
        OSError: If a folder cannot be written. The members written before it stay.

    Example:
        >>> reports = export_family("outputs/pretrain", "members", dtype="bfloat16")
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
        "A family must be a `FamilialForCausalLM`, a folder or the id of a repository, got "
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
    """Export a member of a checkpoint by copying tensors from file to file."""
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
        # written last, because a folder without a config cannot be loaded
        member.save_pretrained(folder)
        if options.format == "plain":
            add_old_names(member, folder)


def _save(family: FamilialForCausalLM, exit_idx: int, out: Path, options: _Options) -> None:
    """Export a member of a model in memory, with `save_pretrained` of the member's class."""
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
    """Raise `ValueError` if the member would replace its own family."""
    folder, out = family.folder.resolve(), out.resolve()
    if out == folder or out in folder.parents:
        raise ValueError(f"`out` ({out}) must not be the folder of the family or a parent of it.")


def _check_space(folder: Path, nbytes: int) -> None:
    """Raise `OSError` if the disk has too little space."""
    free = shutil.disk_usage(folder).free
    if nbytes > free:
        raise OSError(
            errno.ENOSPC,
            f"the member needs {nbytes / 2**20:,.0f} MiB, but {free / 2**20:,.0f} MiB are free",
            str(folder.parent),
        )
