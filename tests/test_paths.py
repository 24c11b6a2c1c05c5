"""Paths that a user typed: checked at once, with the nearest name where there is none."""

import pytest

from hf_familial.hub._source import find_source
from hf_familial.paths import (
    check_model_place,
    check_output_folder,
    is_local,
    near_path,
    no_such_path,
    words_of,
)


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "outputs" / "pretrain").mkdir(parents=True)
    (tmp_path / "notes.txt").write_text("words")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "name",
    ["outputs/pretrian", "./absent", "../absent", "/absent/x", "~/absent", "a/b/c", "a\\b", "x/"],
)
def test_what_can_only_be_a_path_is_no_repository(here, name):
    assert is_local(name)
    with pytest.raises(FileNotFoundError, match="`--model`: there is no folder"):
        check_model_place("--model", name)


@pytest.mark.parametrize("name", ["gpt2", "Qwen/Qwen3-0.6B", "outputs/family", "me/pretrain"])
def test_what_may_be_a_repository_is_left_to_the_hub(here, name):
    check_model_place("--model", name)


def test_a_folder_is_taken_and_a_file_is_not(here):
    check_model_place("--model", "outputs/pretrain")
    with pytest.raises(NotADirectoryError, match="must be the folder of a checkpoint"):
        check_model_place("--model", "notes.txt")


def test_the_nearest_name_is_suggested(here):
    assert near_path("ntoes.txt") == "notes.txt"
    assert near_path("outputs/pretrian/") == "outputs/pretrain"
    assert near_path("something/else") is None
    assert str(no_such_path("outputs/pretrian", "folder")).endswith("mean `outputs/pretrain`?")


def test_a_revision_says_that_a_near_name_is_on_the_hub(here):
    with pytest.raises(FileNotFoundError, match="did you mean `outputs/pretrain`"):
        find_source("outputs/pretrian")
    assert find_source("outputs/pretrian", revision="main").folder is None


def test_an_output_folder_is_probed_and_nothing_is_left(here):
    check_output_folder("--out", "outputs/new/deep")
    check_output_folder("--out", "outputs")
    assert sorted(path.name for path in here.rglob("*")) == ["notes.txt", "outputs", "pretrain"]
    for wrong in ("notes.txt", "notes.txt/deep"):
        with pytest.raises(NotADirectoryError, match="`--out` must be a folder"):
            check_output_folder("--out", wrong)


def test_errors_in_words(here):
    with pytest.raises(FileNotFoundError) as raised:
        open("ntoes.txt")
    assert words_of(raised.value) == (
        "there is no file or folder `ntoes.txt`; did you mean `notes.txt`?"
    )
    assert words_of(ValueError("`x` must be 1")) == "`x` must be 1"
    assert words_of(KeyError("x")) == "KeyError: 'x' (HF_FAMILIAL_TRACEBACK=1 shows where)"
