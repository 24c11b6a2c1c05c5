"""Fixtures of sweep tests: a home for caches, one tiny corpus, a design on it, its sweep."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from sweep_harness import Here, design_of, write_corpus

from hf_familial.isoflop import IsoFlopDesign, Sweep


@pytest.fixture(scope="session")
def home_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizers and blocks of all these tests."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module", autouse=True)
def home(home_folder: Path) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HOME", str(home_folder))
        yield home_folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("data") / "corpus")


@pytest.fixture(scope="session")
def design(corpus: Path) -> IsoFlopDesign:
    return design_of(corpus)


@pytest.fixture(scope="session")
def undisturbed(
    design: IsoFlopDesign, home_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder of a sweep of the design that nothing disturbed; to be read only."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HOME", str(home_folder))
        Sweep(design, folder, Here()).run()
    return folder
