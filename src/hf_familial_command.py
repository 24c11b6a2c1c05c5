"""The entry point of the console script `hf-familial`.

Importing `hf_familial` registers its models with Transformers, which takes some seconds because
torch is imported. This module is outside the package so that it can postpone the registration:
`hf-familial --help` and commands without a model start in less than a second.
"""

# `True` only while `main` imports the command line; the package then does not register its models
STARTING = False


def main() -> None:
    """Run `hf-familial`."""
    global STARTING
    STARTING = True
    try:
        from hf_familial.cli import main as run
    finally:
        STARTING = False
    run()
