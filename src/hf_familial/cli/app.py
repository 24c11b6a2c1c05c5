"""The command `hf-familial`: one application, to which the files beside this add their commands."""

from __future__ import annotations

import sys

import typer


app = typer.Typer(
    name="hf-familial",
    help="Familial models: one training run, many deployable language models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command line; what a user can get wrong ends in one line and exit code 1."""
    try:
        app()
    except BrokenPipeError:
        sys.exit(0)
    except (ValueError, OSError, ImportError) as error:
        typer.secho(f"error: {error}", err=True, fg=typer.colors.RED)
        sys.exit(1)


@app.callback()
def _commands() -> None:
    """Keeps the application a group of commands, however many there are."""
