"""Commands for the members of a family: describe, export, push."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from .._wording import parse_size, plural
from ..paths import check_model_place, check_output_folder
from ._help import Command
from .app import MEMBERS, app, one_of, register_models


if TYPE_CHECKING:
    from ..hub.push import Pushed


Source = Annotated[
    str, Argument(metavar="PATH_OR_REPO", help="Folder of a family, or its name on the Hub.")
]
Dtype = Annotated[
    str | None,
    Option(
        metavar="NAME",
        help="Type of the weights: float32, bfloat16 or float16. Unchanged by default.",
    ),
]
Format = Annotated[
    str,
    Option(
        metavar="NAME",
        help="plain saves ordinary models, familial saves families that end at the exit.",
        callback=one_of("--format", "plain", "familial"),
    ),
]
Layout = Annotated[
    str,
    Option(
        metavar="NAME",
        help="repos makes a repository for each member, revisions a branch of REPO.",
        callback=one_of("--layout", "repos", "revisions"),
    ),
]
Revision = Annotated[
    str | None, Option(metavar="NAME", help="Branch, tag or commit of the family on the Hub.")
]
ShardSize = Annotated[str, Option(metavar="SIZE", help="Maximum size of a weights file.")]


@app.command(cls=Command, rich_help_panel=MEMBERS)
def describe(
    path_or_repo: Source,
    memory: Annotated[
        str | None,
        Option(metavar="SIZE", help="Find the deepest member that fits, for example in 2GB."),
    ] = None,
    flops: Annotated[
        float | None,
        Option(help="Find the deepest member that needs at most X FLOPs per token."),
    ] = None,
    context: Annotated[
        int | None,
        Option(help="Tokens of text in the KV cache. By default at most 4096."),
    ] = None,
    dtype: Dtype = None,
    revision: Revision = None,
    as_json: Annotated[bool, Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Show size, memory and FLOPs of every member. No weights are downloaded."""
    limits = (None if memory is None else parse_size(memory), flops)
    check_family(path_or_repo, revision)
    register_models()
    from ..hub.choose import judge_exits, pick_exit
    from ..hub.description import describe

    family = describe(path_or_repo, context=context, dtype=dtype, revision=revision)
    verdicts = () if limits == (None, None) else judge_exits(family, *limits)
    if as_json:
        chosen = next((v.exit_idx for v in reversed(verdicts) if v.fits), None)
        extra = {"fits": chosen} if verdicts else {}
        typer.echo(json.dumps(family.to_dict() | extra, indent=2))
        return
    typer.echo(str(family))
    if verdicts:
        choice = pick_exit(family, verdicts)
        typer.echo(f"\n{choice}\n\nThe deepest member that fits is exit {choice.exit_idx}.")


@app.command(cls=Command, rich_help_panel=MEMBERS)
def export(
    path_or_repo: Source,
    out: Annotated[str, Argument(metavar="OUT", help="Folder to save to.")],
    exit_idx: Annotated[
        str,
        Option(
            "--exit",
            "--exits",
            metavar="K,...|all",
            help="Members to save. Several get one folder each, inside OUT.",
        ),
    ] = "all",
    format: Format = "plain",  # noqa: A002
    dtype: Dtype = None,
    overwrite: Annotated[
        bool, Option("--overwrite/--no-overwrite", help="Replace existing checkpoints.")
    ] = False,
    max_shard_size: ShardSize = "5GB",
    revision: Revision = None,
) -> None:
    """Save members as ordinary checkpoints."""
    exits = parse_exits(exit_idx)
    check_family(path_or_repo, revision)
    check_output_folder("OUT", out)
    register_models()
    from ..hub.export import export_exit, export_family

    options: dict[str, Any] = {
        "format": format,
        "dtype": dtype,
        "max_shard_size": max_shard_size,
        "overwrite": overwrite,
        "revision": revision,
    }
    with plain_errors():
        if exits is None:
            reports = export_family(path_or_repo, out, **options)
        elif len(exits) == 1:
            reports = [export_exit(path_or_repo, exits[0], out, **options)]
        else:
            reports = export_family(path_or_repo, out, exits=exits, **options)
    for report in reports:
        typer.echo(
            f"exit {report.exit_idx}: {report.architecture} with "
            f"{plural(report.depth, 'layer')}, "
            f"{report.nbytes:,} bytes of {report.dtype}, saved in {report.path}"
        )


@app.command(cls=Command, rich_help_panel=MEMBERS)
def push(
    path_or_repo: Source,
    repo_id: Annotated[str, Argument(metavar="REPO", help="Repository on the Hub: user/name.")],
    exits: Annotated[
        str, Option("--exits", "--exit", metavar="K,...|all|none", help="Members to push.")
    ] = "all",
    family: Annotated[
        bool, Option("--family/--no-family", help="Also push the whole family to REPO.")
    ] = False,
    private: Annotated[bool, Option("--private", help="Make new repositories private.")] = False,
    layout: Layout = "repos",
    collection: Annotated[bool, Option(help="Put the members in a collection.")] = True,
    base_model: Annotated[
        str | None,
        Option(metavar="REPO", help="Pretrained model that the family was created from."),
    ] = None,
    dtype: Dtype = None,
    max_shard_size: ShardSize = "5GB",
) -> None:
    """Push members to the Hub. Members that are already there are not sent again."""
    wanted = [] if exits == "none" else parse_exits(exits)
    if not family and wanted == []:
        raise ValueError("`--exits none` pushes nothing. Add `--family` to push the family.")
    check_family(path_or_repo)
    register_models()
    from ..hub.push import push_exits_to_hub, push_family_to_hub

    options: dict[str, Any] = {
        # `None` keeps the default of an organisation, which may be private
        "private": private or None,
        "base_model": base_model,
        "dtype": dtype,
        "max_shard_size": max_shard_size,
    }
    pushed: list[Pushed] = []
    slug = None
    with plain_errors():
        if family:
            pushed += push_family_to_hub(path_or_repo, repo_id, **options).pushed
        if wanted != []:
            options |= {"exits": wanted, "layout": layout, "collection": collection}
            report = push_exits_to_hub(path_or_repo, repo_id, **options)
            pushed, slug = [*pushed, *report.pushed], report.collection
    for row in pushed:
        what = "family" if row.exit_idx is None else f"exit {row.exit_idx}"
        did = f"{len(row.uploaded)} files in one commit" if row.changed else "up to date"
        typer.echo(f"{what}: {row.place.name}, {did}")
    if slug:
        typer.echo(f"collection: {slug}")


def check_family(path_or_repo: str, revision: str | None = None) -> None:
    """Check that a folder is a checkpoint, or that a name can be on the Hub.

    The check runs before torch is imported. With a `revision` the name must be on the Hub.
    """
    folder = Path(path_or_repo)
    if revision is None:
        check_model_place("PATH_OR_REPO", path_or_repo)
    if not folder.is_dir():
        if "/" in path_or_repo and folder.parent.is_dir():
            return  # the Hub client warns about such a name
        typer.echo(f"Folder {path_or_repo} does not exist. Searching on the Hub.", err=True)
        return
    if not (folder / "config.json").is_file():
        inside = sorted(path.parent for path in folder.glob("*/config.json"))
        hint = f" Did you mean `{inside[-1]}`?" if inside else ""
        raise FileNotFoundError(
            f"Folder `{path_or_repo}` is not a checkpoint, because it has no `config.json`. "
            f"`save_pretrained` or `push_family_to_hub` saves a family.{hint}"
        )


@contextmanager
def plain_errors() -> Iterator[None]:
    """Turn the `IndexError` of an exit out of range into a `ValueError` with the same message."""
    try:
        yield
    except IndexError as error:
        raise ValueError(str(error)) from None


def parse_exits(words: str) -> list[int] | None:
    """Parse exits: `all` is `None`, else numbers separated by commas."""
    if words == "all":
        return None
    if not re.fullmatch(r"-?\d+(,-?\d+)*", words):
        raise ValueError(f"`--exits` must be `all` or numbers such as 0,-1, got {words!r}.")
    return [int(word) for word in words.split(",")]
