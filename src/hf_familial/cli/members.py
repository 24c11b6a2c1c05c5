"""`hf-familial describe`, `export` and `push`: the members of a family."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from .._wording import parse_size
from ..paths import check_model_place, check_output_folder
from .app import app, one_of


if TYPE_CHECKING:
    from ..hub.push import Pushed


Source = Annotated[str, Argument(metavar="PATH_OR_REPO", help="A family.")]
Dtype = Annotated[str | None, Option(help="Weights: float32, bfloat16 or float16.")]
Format = Annotated[
    str, Option(help="plain or familial.", callback=one_of("--format", "plain", "familial"))
]
Layout = Annotated[
    str, Option(help="repos or revisions.", callback=one_of("--layout", "repos", "revisions"))
]
Revision = Annotated[str | None, Option(help="Branch, tag or commit on the Hub.")]
ShardSize = Annotated[str, Option(help="Size of a file of weights, at most.")]


@app.command()
def describe(
    path_or_repo: Source,
    context: Annotated[int | None, Option(help="Tokens of text; else at most 4096.")] = None,
    dtype: Dtype = None,
    memory: Annotated[str | None, Option(help="Which member fits in 2GB, 512MiB, ...?")] = None,
    flops: Annotated[float | None, Option(help="Which needs no more FLOPs per token?")] = None,
    revision: Revision = None,
    as_json: Annotated[bool, Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what every member weighs and costs; no weights are downloaded."""
    limits = (None if memory is None else parse_size(memory), flops)
    check_family(path_or_repo, revision)

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
        typer.echo(f"\n{choice}\n\nThe deepest that fits is exit {choice.exit_idx}.")


@app.command()
def export(
    path_or_repo: Source,
    out: Annotated[str, Argument(help="Folder to write.")],
    exit_idx: Annotated[
        str, Option("--exit", "--exits", metavar="K,...|all", help="Several get a folder each.")
    ] = "all",
    format: Format = "plain",  # noqa: A002
    dtype: Dtype = None,
    max_shard_size: ShardSize = "5GB",
    overwrite: Annotated[bool, Option(help="Replace what is there.")] = False,
    revision: Revision = None,
) -> None:
    """Write members as checkpoints of their own."""
    exits = parse_exits(exit_idx)
    check_family(path_or_repo, revision)
    check_output_folder("OUT", out)

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
            f"exit {report.exit_idx}: {report.architecture} of {report.depth} layers, "
            f"{report.nbytes:,} bytes of {report.dtype}, in {report.path}"
        )


@app.command()
def push(
    path_or_repo: Source,
    repo_id: Annotated[str, Argument(metavar="REPO", help="user/name on the Hub.")],
    exits: Annotated[
        str, Option("--exits", "--exit", metavar="K,...|all|none", help="Members to push.")
    ] = "all",
    family: Annotated[bool, Option(help="Push the whole family too, to REPO.")] = False,
    layout: Layout = "repos",
    private: Annotated[bool, Option("--private", help="Make new ones private.")] = False,
    collection: Annotated[bool, Option(help="Gather the members in a collection.")] = True,
    base_model: Annotated[str | None, Option(help="What the family was made of.")] = None,
    dtype: Dtype = None,
    max_shard_size: ShardSize = "5GB",
) -> None:
    """Push members to the Hub; what is there already is left as it is."""
    wanted = [] if exits == "none" else parse_exits(exits)
    if not family and wanted == []:
        raise ValueError("nothing to push: `--exits none` goes with `--family`.")
    check_family(path_or_repo)

    from ..hub.push import push_exits_to_hub, push_family_to_hub

    options: dict[str, Any] = {
        # not `False`: an organisation may make its repositories private by default
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
    """Check that a family can be where it is said to be, before torch is imported.

    A revision says that it is on the Hub.
    """
    folder = Path(path_or_repo)
    if revision is None:
        check_model_place("PATH_OR_REPO", path_or_repo)
    if not folder.is_dir():
        typer.echo(f"there is no folder {path_or_repo}: it is looked for on the Hub", err=True)
        return
    if not (folder / "config.json").is_file():
        inside = sorted(path.parent for path in folder.glob("*/config.json"))
        hint = f" Did you mean `{inside[-1]}`?" if inside else ""
        raise FileNotFoundError(
            f"`{path_or_repo}` holds no `config.json`: it is not a checkpoint. A family is what "
            f"`save_pretrained` or `push_family_to_hub` leaves.{hint}"
        )


@contextmanager
def plain_errors() -> Iterator[None]:
    """Raise an exit that is out of range as a `ValueError`: it is the user's mistake."""
    try:
        yield
    except IndexError as error:
        raise ValueError(str(error)) from None


def parse_exits(words: str) -> list[int] | None:
    """Parse `all` as `None`, and numbers between commas."""
    if words == "all":
        return None
    if not re.fullmatch(r"-?\d+(,-?\d+)*", words):
        raise ValueError(f"exits must be `all` or numbers such as 0,-1, got {words!r}.")
    return [int(word) for word in words.split(",")]
