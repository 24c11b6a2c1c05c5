"""Saves that are killed at one call after another, and what loads afterwards.

python kills.py FOLDER FORMS SEED STEP: tells how many were killed, and how often what loaded.
"""

import builtins
import json
import os
import random
import shutil
import sys
from functools import partial
from pathlib import Path

import torch
from reference import stir, tiny_family
from transformers import modeling_utils
from transformers.utils import logging

from hf_familial import FamilialForCausalLM


# what a save asks of the system, by the module that asks
CALLS = [(builtins, "open"), (os, "unlink"), (os, "rename"), (os, "replace"), (os, "mkdir")]
CALLS += [(shutil, "copyfile"), (modeling_utils, "safe_save_file")]

FORMS = {
    "file": {"by_segment": False},
    "shards": {"by_segment": False, "max_shard_size": "30KB"},
    "segments": {"by_segment": True},
    "small": {"by_segment": True, "max_shard_size": "20KB"},
    "variant": {"variant": "fp16"},
}
DEAD = 99


def families():
    """Families of one size, which could be taken for each other, and one of others."""
    made = {
        "old": tiny_family("llama", [1, 2, 4]),
        "new": tiny_family("llama", [1, 3, 4]),
        "last": tiny_family("llama", [1, 2, 3, 4], num_exit_layers=1, exit_head="own"),
    }
    for seed, family in enumerate(made.values()):
        stir(family, seed)
        with torch.no_grad():
            family.lm_head.weight.add_(0.01 * seed)
    return made


def killed_at(at, half, save):
    """Do it in a process that ends before call number `at`; whether it came that far.

    With `half`, a file of weights that is being written then is left half.
    """
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == DEAD
    count = [0]

    def wrap(original, name):
        def call(*args, **kwargs):
            if name == "open" and not set("wxa") & set("".join(map(str, args[1:2]))):
                return original(*args, **kwargs)
            count[0] += 1
            if count[0] == at:
                if half and name == "safe_save_file":
                    original(*args, **kwargs)
                    os.truncate(args[1], os.path.getsize(args[1]) // 2)
                os._exit(DEAD)
            return original(*args, **kwargs)

        return call

    for module, name in CALLS:
        setattr(module, name, wrap(getattr(module, name), name))
    try:
        save()
    except BaseException:
        os._exit(1)
    os._exit(0)


def what_loads(folder, made, **options):
    """The name of the family that a folder holds, or the word for a refusal."""
    try:
        loaded, info = FamilialForCausalLM.from_pretrained(
            folder, output_loading_info=True, **options
        )
    except (OSError, ValueError):
        return "refused"
    weights = loaded.state_dict()
    for name, family in made.items():
        right = family.state_dict()
        if loaded.config.exits == family.config.exits and weights.keys() == right.keys():
            if not any(info.values()) and all(torch.equal(weights[n], right[n]) for n in right):
                return name
    return "mixture"


def run(home, forms, seed, step):
    """An old family lies there, a new one's save is killed, a last one is saved."""
    made, chance = families(), random.Random(seed)
    old, new, last = (FORMS[form] for form in forms)
    where = [{n: form[n] for n in form.keys() & {"variant"}} for form in (old, new, last)]
    made["old"].save_pretrained(home / "kept", **old)
    found, killed, at = {}, 0, 1 + chance.randrange(step)
    while True:
        folder = home / "folder"
        shutil.copytree(home / "kept", folder)
        half = chance.random() < 0.5
        dead = killed_at(at, half, partial(made["new"].save_pretrained, folder, **new))
        # however one asks for it
        names = [what_loads(folder, made, **options) for options in where[:2]]
        assert {"mixture", "last"}.isdisjoint(names), (at, names)
        assert dead or names[1] == "new", names
        found[names[0]] = found.get(names[0], 0) + 1
        made["last"].save_pretrained(folder, **last)
        names = [what_loads(folder, made, **options) for options in where]
        assert set(names) <= {"last", "refused"}, (at, names)
        assert names[2] == "last", (at, names)
        shutil.rmtree(folder)
        if not dead:
            return {"killed": killed, "found": found}
        killed, at = killed + 1, at + 1 + chance.randrange(2 * step - 1)


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    path, asked, number, stride = sys.argv[1:]
    print(json.dumps(run(Path(path), asked.split(","), int(number), int(stride))))
