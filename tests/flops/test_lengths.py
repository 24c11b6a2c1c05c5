"""FLOPs at every length follow from a few counts, and equal a count of that length."""

from typing import Any

import pytest
from backbones import MUST_WORK, tiny_config
from peft import LoraConfig
from reference import counted_training_flops, without_kept_counts

from hf_familial import FamilialConfig
from hf_familial.flops import FlopCount, _lengths, prepare_training_flops, training
from hf_familial.flops import training_flops_per_token as flops
from hf_familial.flops._fake_model import RECURRENT
from hf_familial.models.backbone_verification import VERIFIED


TRAINED: dict[str, Any] = {
    "all": "all",
    "exits": "exits",
    "lora": LoraConfig(r=4, target_modules=["q_proj"]),
}


def config_of(model_type: str, **fields: Any) -> FamilialConfig:
    return FamilialConfig(text_config=tiny_config(model_type, 2), exits=[1, 2], **fields)


def counting(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths that a family without weights runs at from now on."""
    seen: list[int] = []
    run = training._run

    def watched(family: Any, seq_length: int) -> int:
        seen.append(seq_length)
        return run(family, seq_length)

    monkeypatch.setattr(training, "_run", watched)
    without_kept_counts(monkeypatch)
    return seen


def assert_followed(config: FamilialConfig, train: Any = "all", at: Any = (7, 67)) -> None:
    prepare_training_flops(config, train)
    found = [round(flops(config, length, train).per_token * length) for length in at]
    assert found == [counted_training_flops(config, length, train) for length in at]


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen3_moe", "minimax"])
def test_every_length_equals_its_count(model_type: str) -> None:
    assert_followed(config_of(model_type, num_exit_layers=1))


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted({*VERIFIED, *MUST_WORK}))
def test_every_length_of_every_host_equals_its_count(model_type: str) -> None:
    assert_followed(config_of(model_type), at=(7, 30 if model_type in RECURRENT else 150))


@pytest.mark.parametrize("train", TRAINED)
@pytest.mark.parametrize("fields", [{}, {"num_exit_layers": 1, "exit_head": "own"}], ids=str)
def test_whatever_learns_follows_too(train: str, fields: dict[str, Any]) -> None:
    assert_followed(config_of("llama", **fields), TRAINED[train])


def test_chunks_that_are_begun_count() -> None:
    """At the edges of chunks of 8, in the first and in later ones."""
    assert_followed(config_of("mamba2"), at=(1, 8, 9, 16, 17, 63))


def test_a_family_is_counted_at_three_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first length costs one count, the second a few more, all others none."""
    seen, config = counting(monkeypatch), config_of("llama")
    first = flops(config, 40)
    assert seen == [40]
    assert flops(config, 41).per_token > first.per_token
    assert seen == [40, *_lengths.SHORT]
    assert flops(config, 40) == first
    assert [flops(config, n).per_token for n in range(1, 500)] == sorted(
        flops(config, n).per_token for n in range(1, 500)
    )
    assert len(seen) == 4


def test_what_is_prepared_is_not_counted_again(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, config = counting(monkeypatch), config_of("llama")
    prepare_training_flops(config)
    assert seen == list(_lengths.SHORT)
    for length in (1, 40, 4096):
        flops(config, length)
    prepare_training_flops(config)
    assert len(seen) == 3


def test_a_host_that_follows_no_polynomial_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """An unknown host is checked at one length more, and counted at every one if it differs."""
    config = config_of("llama")
    monkeypatch.setattr(_lengths, "VERIFIED", frozenset())

    def wavy(family: Any, seq_length: int) -> int:
        return seq_length * 100 + seq_length % 7

    without_kept_counts(monkeypatch)
    monkeypatch.setattr(training, "_run", wavy)
    heads = flops(config, 14).per_token - 100
    for length in (14, 15, 20, 99):
        expected = FlopCount((length * 100 + length % 7) / length + heads, exact=True)
        assert flops(config, length) == expected
