"""Strict reading of YAML, without repeated fields and without surprising numbers."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from ..errors import DesignError
from ..paths import no_such_path


# numbers as in JSON; YAML 1.1 would read 0200 as 128, 1:30 as 90 and 1e-3 as a string
WHOLE = re.compile(r"[-+]?(0|[1-9][0-9_]*)")
EXPONENT = re.compile(r"[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+")
MERGE = "tag:yaml.org,2002:merge"


def read_yaml(source: str | os.PathLike[str], kind: str = "design") -> Any:
    """Read a YAML file. Messages call it `kind`.

    Its text must be UTF-8, or UTF-16 with a byte order mark.
    """
    path = Path(source)
    if not path.exists():
        raise no_such_path(source, kind)
    if path.is_dir():
        raise IsADirectoryError(f"`{source}` is a folder. Pass a YAML file.")
    return parse_yaml(path.read_bytes(), str(source))


def parse_yaml(text: str | bytes, name: str = "a design") -> Any:
    """Parse YAML. Raise `DesignError` with a message of one line if it is wrong."""
    try:
        return yaml.load(text, _Loader)
    except (yaml.reader.ReaderError, UnicodeError) as error:
        raise DesignError(f"{name} must be text in UTF-8, got {_short(error)}.") from None
    except yaml.YAMLError as error:
        raise DesignError(f"{name} must be YAML: {_short(error)}.") from None
    except RecursionError:
        raise DesignError(f"{name} has brackets nested too deep.") from None


def _short(error: Exception) -> str:
    """Return the line, the column and the problem, as one line of text."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    words = " ".join(str(problem or getattr(error, "reason", error)).split())
    return words if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: {words}"


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key for key, _ in node.value if key.tag != MERGE]
        names = [self.construct_object(key, deep=True) for key in keys]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise DesignError(f"`{twice[0]}` appears twice.", str(twice[0]))
        return super().construct_mapping(node, deep)

    def construct_whole(self, node: Any) -> int:
        if not WHOLE.fullmatch(node.value):
            raise DesignError(
                f"`{node.value}` in line {node.start_mark.line + 1} must be a plain decimal number."
                f" YAML would read it as {self.construct_yaml_int(node)}."
            )
        return int(node.value)

    def construct_real(self, node: Any) -> float:
        if ":" in node.value:
            raise DesignError(f"`{node.value}` must be a plain decimal number.")
        return float(self.construct_yaml_float(node))


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_whole)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_real)
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, list("-+0123456789"))
