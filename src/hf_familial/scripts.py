"""What scripts share: a command line, one line for a mistake, a family to try them on."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from argparse import Action, ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from rich.console import Console
from rich.progress import track
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from .models.familial import FamilialForCausalLM
from .paths import TRACEBACK, check_model_place, words_of


Item = TypeVar("Item")

END_OF_TEXT = "<|endoftext|>"
TOY_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
TOY_EXITS = (1, 2, 4)


class _Help(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """The description as it is written, and the defaults that say something."""

    def _get_help_string(self, action: Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


class _Parser(HfArgumentParser):
    """The host's parser; of a wrong choice it names the nearest one."""

    def error(self, message: str) -> NoReturn:
        found = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
        choices = re.findall(r"[\w./-]+", found[2]) if found else []
        near = get_close_matches(found[1].lower(), choices, 1) if found else []
        message = f"{message}; did you mean {near[0]}?" if near else message
        super().error(message)
        raise SystemExit(2)  # for type checkers: the host's has exited


@contextmanager
def arguments(
    description: str,
    classes: Sequence[type],
    *,
    smoke: Callable[[Path], Mapping[str, Any]],
    positional: Mapping[str, str] | None = None,
    argv: Sequence[str] | None = None,
) -> Iterator[tuple[Any, ...]]:
    """Parse the command line of a script, which always has `--smoke`.

    With `--smoke` a script does what it always does, in seconds: `smoke` makes the little that it
    needs and answers with other defaults, over which the words of the user still win.

    Args:
        description (`str`): The script's docstring; `--help` shows it as it is.
        classes (`Sequence[type]`): Dataclasses, as for `HfArgumentParser`. One with an
            `_argument_group_name` is a group of its own in `--help`.
        smoke (`Callable`): Given a temporary folder, which lasts as long as the context; returns
            defaults by name.
        positional (`Mapping[str, str]`, *optional*): Arguments without a dash and their help. They
            are needed, except with `--smoke`.
        argv (`Sequence[str]`, *optional*): The words; those of this process by default.

    Yields:
        `tuple`: One object per dataclass, then an `argparse.Namespace` with `smoke` and the
        positional arguments.

    Raises:
        SystemExit: With code 2 for words that cannot be parsed, 0 after `--help`.
        ValueError: What the dataclasses themselves refuse.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    trying = "--smoke" in words
    names = " ".join(name.upper() for name in positional or {})
    usage = " ".join(filter(None, ["%(prog)s", names, "[--option value ...]"]))
    parser: Any = _Parser(classes, description=description, formatter_class=_Help, usage=usage)
    for name, text in (positional or {}).items():
        parser.add_argument(name, nargs="?" if trying else None, metavar=name.upper(), help=text)
    parser.add_argument(
        "--smoke", action="store_true", help="Try it out in seconds, with something tiny."
    )
    with tempfile.TemporaryDirectory() as folder:
        if trying:
            parser.set_defaults(**smoke(Path(folder)))
        *parsed, unknown = parser.parse_args_into_dataclasses(
            _apart(words, parser), return_remaining_strings=True, look_for_args_file=False
        )
        if unknown:
            known = [name for action in parser._actions for name in action.option_strings]
            near = get_close_matches(unknown[0].partition("=")[0], known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        yield tuple(parsed)
    if trying and int(os.environ.get("RANK", "0")) == 0:
        console().print("That was --smoke: its temporary folder is gone.")


def _apart(words: Sequence[str], parser: Any) -> list[str]:
    """Take numbers between commas apart after an option that takes several: `--exits 2,4,8`."""
    several = {
        name
        for action in parser._actions
        if action.nargs == "+" and action.type is int
        for name in action.option_strings
    }
    found: list[str] = []
    inside = False
    for word in words:
        name, equals, value = word.partition("=")
        if name.startswith("--"):
            inside = name in several
        if inside and re.fullmatch(r"-?\d+(,-?\d+)*,?", value if equals else word):
            parts = (value if equals else word).strip(",").split(",")
            found += [name, *parts] if equals else parts
        else:
            found.append(word)
    return found


def run(main: Callable[[], None]) -> None:
    """Run a script; what a user can get wrong ends in one line and exit code 1.

    Args:
        main (`Callable`): The script.

    Raises:
        SystemExit: With the line, where `main` raised something; with `HF_FAMILIAL_TRACEBACK=1` in
            the environment the error itself is raised.
    """
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if os.environ.get(TRACEBACK):
            raise
        sys.exit(f"error: {' '.join(words_of(error).split())}")


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Begin the message of an `OSError` with what could not be had; the host's often lack a name.

    Args:
        what (`str`): Such as "`--model me/family`".

    Yields:
        `None`

    Raises:
        OSError: With `what` and the first message.
    """
    try:
        yield
    except OSError as error:
        raise OSError(f"{what}: {error}") from error


@contextmanager
def loading(option: str, place: str) -> Iterator[None]:
    """Check a model's place before it is loaded, and name it where it cannot be.

    Args:
        option (`str`): Name of the option that says where the model is.
        place (`str`): Folder, or repository on the Hub, which is said before it is waited for.

    Yields:
        `None`

    Raises:
        OSError: If there is no such folder or repository.
    """
    check_model_place(option, place)
    if not Path(place).is_dir():
        print(f"there is no folder {place}: it is looked for on the Hub", file=sys.stderr)
    with naming(f"`{option} {place}`"):
        yield


def console() -> Console:
    """Where tables go: as wide as the terminal or `COLUMNS`, 100 columns where there is neither."""
    known = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(width=None if known else 100, highlight=False)


def progress(items: Sequence[Item], name: str) -> Iterable[Item]:
    """Go through items with a bar on standard error, where that is a terminal.

    Args:
        items (`Sequence`): What to go through.
        name (`str`): Said beside the bar.

    Returns:
        `Iterable`: The items.
    """
    bar = Console(stderr=True)
    return track(items, name, console=bar, transient=True, disable=not bar.is_terminal)


def toy_decoder(seed: int = 0) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A Llama of 4 layers and 58 thousand parameters that learnt nothing; its tokens are bytes.

    Args:
        seed (`int`): Of the weights.

    Returns:
        `tuple`: The model, in evaluation mode, and its tokenizer of 257 tokens.
    """
    letters = [*sorted(pre_tokenizers.ByteLevel.alphabet()), END_OF_TEXT]
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END_OF_TEXT)
    # without an end of text in its config it writes as many tokens as it is asked for
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    fields = {"model_type": "llama", "vocab_size": len(letters), **TOY_SIZES, **ends}
    config = AutoConfig.for_model(**fields)
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    torch.random.set_rng_state(state)
    return model.eval(), tokenizer


def toy_family(
    exits: Sequence[int] = TOY_EXITS, seed: int = 0
) -> tuple[FamilialForCausalLM, PreTrainedTokenizerBase]:
    """The same decoder as a family: nothing to read, but it does all that a family does.

    Args:
        exits (`Sequence[int]`): Depth of every exit; the last must be 4.
        seed (`int`): Of the weights.

    Returns:
        `tuple`: The family, in evaluation mode, and its tokenizer.

    Raises:
        ValueError: If `exits` are no exits of 4 layers.

    Example:
        >>> model, tokenizer = toy_family()
        >>> inputs = tokenizer("import os", return_tensors="pt")
        >>> tokenizer.decode(model.generate(**inputs, exit_idx=0, max_new_tokens=8)[0])
    """
    decoder, tokenizer = toy_decoder(seed)
    family = FamilialForCausalLM.from_backbone(decoder, exits=list(exits))
    return family.eval(), tokenizer


__all__ = [
    "arguments",
    "console",
    "loading",
    "naming",
    "progress",
    "run",
    "toy_decoder",
    "toy_family",
]
