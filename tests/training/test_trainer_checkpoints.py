"""Checkpoints of a run, in a folder in which an older run of another family left its own."""

import shutil

import pytest
import torch
from reference import stir, tiny_family
from test_trainer import trainer_of

from hf_familial import FamilialForCausalLM
from hf_familial.training import last_complete_checkpoint


SAVED = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}


@pytest.mark.parametrize("by_segment", [False, True])
def test_a_run_replaces_the_checkpoints_of_another_family(by_segment, tmp_path, monkeypatch):
    trainer_of(tmp_path, tiny_family("llama", [1, 2, 4]), **SAVED).train()
    if by_segment:
        monkeypatch.setattr("hf_familial.checkpoints.by_segment.SPLIT_FROM", 1)
    trainer = trainer_of(tmp_path, stir(tiny_family("llama", [1, 3, 4]), 5), **SAVED)
    trainer.train()
    loaded = FamilialForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    assert loaded.config.exits == [1, 3, 4]
    for name, weight in trainer.model.state_dict().items():
        assert torch.equal(weight, loaded.state_dict()[name])


@pytest.mark.parametrize(
    "where", ["save_model", "_save_optimizer_and_scheduler", "_save_rng_state"]
)
def test_a_checkpoint_cut_off_is_not_resumed_with_an_older_runs_state(where, tmp_path, monkeypatch):
    trainer_of(tmp_path, tiny_family("llama", [1, 3, 4]), **SAVED).train()

    class Killed(BaseException):
        pass

    def kill(*args, **kwargs):
        raise Killed

    trainer = trainer_of(tmp_path, tiny_family("llama", [1, 3, 4]), **SAVED | {"save_steps": 2})
    monkeypatch.setattr(trainer, where, kill)
    with pytest.raises(Killed):
        trainer.train()
    again = trainer_of(tmp_path, tiny_family("llama", [1, 3, 4]), **SAVED)
    with pytest.raises(FileNotFoundError, match="trainer_state"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_resuming_skips_an_incomplete_checkpoint(tmp_path, caplog):
    """A process that is killed while it saves leaves a checkpoint without a readable state."""
    trainer_of(tmp_path, max_steps=3, save_strategy="steps", save_steps=1).train()
    (tmp_path / "checkpoint-3/trainer_state.json").unlink()
    cut = tmp_path / "checkpoint-2/trainer_state.json"
    cut.write_text(cut.read_text()[:100])
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")
    assert "checkpoint-3 is incomplete" in caplog.text
    resumed = trainer_of(tmp_path, max_steps=2)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 2
    shutil.rmtree(tmp_path / "checkpoint-1")
    assert last_complete_checkpoint(tmp_path) is None
    with pytest.raises(ValueError, match="has only incomplete ones, such as `checkpoint-3`"):
        trainer_of(tmp_path, max_steps=4).train(resume_from_checkpoint=True)
