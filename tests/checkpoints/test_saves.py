"""A checkpoint that is saved where another lies: it replaces it, and no kill makes a mixture."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from threading import Thread

import pytest
from kills import FORMS, families, what_loads
from reference import logits, token_ids
from transformers import modeling_utils

from hf_familial import FamilialForCausalLM, FamilialModel
from hf_familial.checkpoints import by_segment as checkpoints
from hf_familial.checkpoints.by_segment import ASIDE
from hf_familial.hub import export_exit


def kill(folder, forms, seed=0, step=1):
    """Run the killer in a process of its own: it forks."""
    command = [sys.executable, Path(__file__).with_name("kills.py"), folder, ",".join(forms)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*command, str(seed), str(step)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("forms", "step"),
    [
        (("segments", "segments", "file"), 14),
        (("file", "small", "segments"), 18),
        (("shards", "file", "shards"), 10),
    ],
    ids=["segments", "file", "shards"],
)
def test_a_killed_save_leaves_the_old_the_new_or_nothing(forms, step, tmp_path):
    found = kill(tmp_path, forms, step=step)
    assert found["killed"] >= 3
    assert found["found"]["old"] >= 2, "the older one did not last until the new one was whole"


@pytest.mark.slow
@pytest.mark.parametrize("old", FORMS)
@pytest.mark.parametrize("new", FORMS)
def test_killed_before_every_call_it_leaves_no_mixture(old, new, tmp_path):
    last = list(FORMS)[(list(FORMS).index(old) + list(FORMS).index(new)) % len(FORMS)]
    found = kill(tmp_path, (old, new, last), seed=1, step=9)
    assert found["killed"] > 5


@pytest.fixture(scope="module")
def made():
    return families()


@pytest.mark.parametrize(
    ("first", "then"), [pair for pair in itertools.permutations(FORMS, 2) if pair[1] != "variant"]
)
def test_another_family_in_another_form_replaces_the_first(first, then, made, tmp_path):
    made["old"].save_pretrained(tmp_path, **FORMS[first])
    made["last"].save_pretrained(tmp_path, **FORMS[then])
    assert what_loads(tmp_path, made) == "last"
    assert what_loads(tmp_path, made, variant="fp16") == "refused"
    files = set(os.listdir(tmp_path))
    made["last"].save_pretrained(tmp_path / "alone", **FORMS[then])
    assert files == set(os.listdir(tmp_path / "alone"))


@pytest.mark.parametrize("then", ["file", "segments", "variant"])
def test_what_an_older_version_left_half_done_is_not_taken_for_the_new(then, made, tmp_path):
    """Files of segments without an index, as a killed save by segment once left them."""
    made["last"].save_pretrained(tmp_path, by_segment=True)
    for i, path in enumerate(sorted(tmp_path.glob("model-*.safetensors"))):
        path.rename(tmp_path / f"model.segment{i:05d}.safetensors")
    (tmp_path / "model.safetensors.index.segment00002.json").write_text("{}")
    made["new"].save_pretrained(tmp_path, **FORMS[then])
    assert what_loads(tmp_path, made, variant=FORMS[then].get("variant")) == "new"
    assert not list(tmp_path.glob("*.segment*"))


def test_variants_of_one_family_lie_side_by_side(made, tmp_path):
    family = made["new"]
    family.save_pretrained(tmp_path)
    family.save_pretrained(tmp_path, variant="fp16")
    family.save_pretrained(tmp_path, variant="big", max_shard_size="30KB")
    family.save_pretrained(tmp_path, by_segment=True)
    for variant in (None, "fp16", "big"):
        assert what_loads(tmp_path, made, variant=variant) == "new"
    # weights of a family of another config would not fit this one's
    made["old"].save_pretrained(tmp_path, variant="fp16")
    assert what_loads(tmp_path, made, variant="fp16") == "old"
    for variant in (None, "big"):
        assert what_loads(tmp_path, made, variant=variant) == "refused"


def test_what_is_no_part_of_a_checkpoint_stays(made, tmp_path):
    mine = ("tokenizer.json", "notes.py", "trainer_state.json", "model.txt", "models.safetensors")
    for name in mine:
        (tmp_path / name).write_text("mine")
    (tmp_path / ASIDE).mkdir()  # of a save that was killed
    made["old"].save_pretrained(tmp_path, by_segment=True)
    made["new"].save_pretrained(tmp_path)
    assert all((tmp_path / name).read_text() == "mine" for name in mine)
    assert not (tmp_path / ASIDE).exists()


def test_an_older_save_lends_neither_its_code_nor_its_adapter_nor_its_losses(made, tmp_path):
    made["old"].save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "members.json").write_text("[]")
    made["new"].model.save_pretrained(tmp_path)
    left = set(os.listdir(tmp_path))
    assert "modeling_base.py" in left
    assert left.isdisjoint({"modeling_familial.py", "adapter_config.json", "members.json"})
    assert "generation_config.json" not in left
    loaded = FamilialModel.from_pretrained(tmp_path)
    assert loaded.config.exits == made["new"].config.exits


def test_a_save_that_fails_leaves_the_older_checkpoint(made, tmp_path, monkeypatch):
    made["old"].save_pretrained(tmp_path, by_segment=True)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    for form in FORMS.values():
        with pytest.raises(OSError, match="No space left"):
            made["new"].save_pretrained(tmp_path, **form)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_link_in_the_folder_is_replaced_and_its_target_is_not_written(made, tmp_path):
    """As in the client's cache, whose snapshots are links to shared files."""
    made["old"].save_pretrained(tmp_path / "blobs")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "blobs").iterdir():
        (tmp_path / "folder" / path.name).symlink_to(path)
    made["new"].save_pretrained(tmp_path / "folder")
    assert what_loads(tmp_path / "blobs", made) == "old"
    assert what_loads(tmp_path / "folder", made) == "new"


def test_arguments_by_position_and_a_process_that_does_not_write(made, tmp_path):
    family = made["new"]
    family.save_pretrained(tmp_path / "one", True, made["new"].state_dict(), False, "30KB")
    assert what_loads(tmp_path / "one", made) == "new"
    assert len(list((tmp_path / "one").glob("model-*.safetensors"))) > 1
    made["old"].save_pretrained(tmp_path / "one")
    family.save_pretrained(tmp_path / "one", is_main_process=False)
    assert what_loads(tmp_path / "one", made) == "old"
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="file"):
        family.save_pretrained(tmp_path / "file")


def test_an_export_replaces_a_family_of_another_form(made, tmp_path):
    made["last"].save_pretrained(tmp_path / "last", by_segment=True)
    for source in (tmp_path / "last", made["last"]):
        made["old"].save_pretrained(tmp_path / "out")
        options = {"format": "familial", "by_segment": True, "overwrite": True}
        export_exit(source, 1, tmp_path / "out", **options)
        loaded = FamilialForCausalLM.from_pretrained(tmp_path / "out")
        right = logits(made["last"], token_ids(), exit_idx=1)
        assert logits(loaded, token_ids()).equal(right)


@pytest.mark.parametrize("then", ["segments", "file"])
def test_while_a_checkpoint_is_replaced_its_folder_has_a_config(then, made, tmp_path, monkeypatch):
    """A folder of weights without a config is taken for a model of default sizes, 28 GB of it."""
    made["old"].save_pretrained(tmp_path, by_segment=True)
    seen = []

    def watched(call):
        def watch(*args, **kwargs):
            call(*args, **kwargs)
            seen.append((tmp_path / "config.json").exists())

        return watch

    for name in ("unlink", "replace"):
        monkeypatch.setattr(os, name, watched(getattr(os, name)))
    made["new"].save_pretrained(tmp_path, **FORMS[then])
    assert len(seen) > 3
    assert all(seen)


@pytest.mark.skipif(checkpoints.fcntl is None, reason="needs locks of files")
@pytest.mark.parametrize("form", ["segments", "shards"])
def test_saves_to_one_folder_at_one_time_take_turns(form, made, tmp_path, monkeypatch):
    """Another save begins while the first writes its weights: it ends last, so its family stays."""
    save, others = modeling_utils.safe_save_file, []

    def meanwhile(*args, **kwargs):
        if not others:
            others.append(Thread(target=made["new"].save_pretrained, args=(tmp_path,)))
            others[0].start()
            others[0].join(0.5)  # long enough to end, if nothing holds it up
        return save(*args, **kwargs)

    monkeypatch.setattr(modeling_utils, "safe_save_file", meanwhile)
    made["old"].save_pretrained(tmp_path, **FORMS[form])
    others[0].join()
    assert what_loads(tmp_path, made) == "new"
    assert not (tmp_path / ASIDE).exists()
