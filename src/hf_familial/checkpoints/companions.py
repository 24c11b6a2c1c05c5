"""The files that are copied with a member: tokenizer, generation config, licence."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_imports

from .index import own_file


logger = logging.getLogger(__name__)

# a saved tokenizer has at least one file that matches one of these patterns
TOKENIZERS = ("tokenizer*", "vocab.*", "*.tiktoken", "*.model", "tekken.json")
TOKENIZER_FILES = (
    *TOKENIZERS,
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template*",
    "additional_chat_templates/*",
)
COMPANIONS = ("generation_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*", *TOKENIZER_FILES)


def companions(folder: Path) -> list[Path]:
    """Return the files that are copied with a member, the code of its tokenizer included."""
    names = {str(path.relative_to(folder)) for p in COMPANIONS for path in folder.glob(p)}
    found = {own_file(folder, name) for name in names}
    return sorted({path for path in found if path.is_file()} | set(_tokenizer_code(folder)))


def holds_tokenizer(folder: Path) -> bool:
    """Return whether a folder contains the files of a tokenizer."""
    return any(path.is_file() for pattern in TOKENIZERS for path in folder.glob(pattern))


def tokenizer_modules(folder: Path) -> list[str]:
    """Return the names of the modules in a folder that contain a tokenizer's own code."""
    path = own_file(folder, "tokenizer_config.json")
    try:
        auto_map = json.loads(path.read_text(encoding="utf-8")).get("auto_map")
    except (OSError, ValueError, AttributeError):
        return []  # there is no config, or the loader raises a better error later
    classes = auto_map.get("AutoTokenizer") if isinstance(auto_map, dict) else auto_map
    classes = [classes] if isinstance(classes, str) else classes or []
    local = [name for name in classes if isinstance(name, str) and "--" not in name]
    return sorted({name.split(".")[0] for name in local})


def code_files(folder: Path, modules: Iterable[str]) -> tuple[list[Path], list[str]]:
    """Return the files of modules and of their relative imports, and the names of missing files."""
    left, seen, found, missing = sorted(f"{module}.py" for module in modules), set(), [], []
    while left:
        name = left.pop()
        if name in seen:
            continue
        seen.add(name)
        path = own_file(folder, name)
        if path.is_file():
            found.append(path)
            left += [f"{module}.py" for module in get_relative_imports(path)]
        else:
            missing.append(name)
    return found, missing


def _tokenizer_code(folder: Path) -> list[Path]:
    """Return the files of a tokenizer's own code, and warn about missing ones."""
    found, missing = code_files(folder, tokenizer_modules(folder))
    for name in missing:
        logger.warning(
            "The tokenizer in `%s` needs the file `%s`, which is missing. The copied tokenizer "
            "cannot be loaded without it. Add the file, or save another tokenizer to this folder.",
            folder,
            name,
        )
    return found
