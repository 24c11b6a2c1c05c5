"""What modules of sweep tests share: a home for caches, a tiny corpus, a design on it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from sweep_harness import design_of, write_corpus

from hf_familial.isoflop import IsoFlopDesign


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Tokenizers and blocks of a module."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("home")
        patch.setattr(constants, "HF_HOME", str(folder))
        yield folder


@pytest.fixture(scope="module")
def corpus(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("data") / "corpus")


@pytest.fixture(scope="module")
def design(corpus: Path) -> IsoFlopDesign:
    return design_of(corpus)
