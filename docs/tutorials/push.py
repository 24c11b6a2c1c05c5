# %% [markdown]
# # Push members to the Hub
#
# A family trains once and goes out in two forms: as *members*, each an ordinary checkpoint of the
# host's own class that stock transformers loads, and as *the family*, one checkpoint with all its
# exits. This tutorial writes both, reads them back the way a stranger would, and pushes them.
#
# It uses the family that [the first tutorial](pretrain.md) left in the folder `family`. So that it
# runs without network or account, it pushes to a stand-in for the Hub: a small server from this
# project's tests that speaks what the Hub's client asks of one. **With the real Hub**, leave out
# every `endpoint=` and `token=` below, and log in once: `hf auth login`.
#
# The stand-in is the module `hub_server` in the folder `tests/hub` of a clone of this project; to
# type in what follows, start Python with that folder on its path:
#
# ```text
# PYTHONPATH=<clone>/tests/hub python
# ```

# %%
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import torch
from hub_server import WRITE, Hub  # tests/hub/hub_server.py, the stand-in
from huggingface_hub import constants

import hf_familial as hff


constants.HF_HUB_OFFLINE = False  # the stand-in counts as network
constants.HF_HUB_DISABLE_XET = True  # and has no Xet storage

# %% [markdown]
# ## One member as a folder
#
# Before anything goes anywhere, look at what a member is. `export_exit` copies its tensors from
# the family's files, byte for byte and under the names that the host's class gives them. No model
# is built for it, so it needs a few MiB of memory whatever the size of the family.

# %%
report = hff.export_exit("family", 1, "member")
print(f"{report.architecture} of {report.depth} layers, {report.nbytes:,} bytes of {report.dtype}")
print(*sorted(path.name for path in Path("member").iterdir()))

# %% [markdown]
# A plain Llama of four layers: `config.json` says nothing of exits. And it is *the same model*: in
# a process in which this package cannot even be imported, its logits equal those of the family's
# exit to the last bit.

# %%
STRANGER = """
import sys
sys.modules["hf_familial"] = None  # any import of it fails
import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("member")
with torch.no_grad():
    torch.save(model(torch.arange(64)[None]).logits, "stranger.pt")
print(type(model).__name__, "with", model.config.num_hidden_layers, "layers")
"""
done = subprocess.run([sys.executable, "-c", STRANGER], capture_output=True, text=True, check=True)
print(done.stdout.strip())

family = hff.FamilialForCausalLM.from_pretrained("family").eval()
with torch.no_grad():
    logits = family(torch.arange(64)[None], exit_idx=1).logits
print("shape", tuple(logits.shape), "equal:", torch.equal(logits, torch.load("stranger.pt")))

# %% [markdown]
# ## Push every member
#
# `push_exits_to_hub` makes one repository per member, `<repo>-depth<depth>`, each by a single
# commit: whoever looks sees a whole member or none. It exports to a temporary folder, one at a
# time.

# %%
hub, running = Hub(), ExitStack()
running.enter_context(hub.running())
to = {"endpoint": hub.url, "token": WRITE}

report = hff.push_exits_to_hub("family", "me/small-python", **to)
for row in report.pushed:
    print(f"exit {row.exit_idx} -> {row.place.repo_id}: {', '.join(row.uploaded)}")
print("collection:", report.collection.rsplit("-", 1)[0])

# %% [markdown]
# Doing it again costs almost nothing: the Hub's files are compared by hash first, and where all
# are equal there is no commit and no upload. So a push that was cut off is continued by repeating
# it.

# %%
again = hff.push_exits_to_hub("family", "me/small-python", **to)
print("changed:", [row.changed for row in again.pushed])

# %% [markdown]
# ## The card
#
# Each repository gets a model card. The table of all members is in every one of them, so that
# whoever finds one member sees the others; the losses come from the `members.json` that the first
# tutorial saved. What stands between the two marks is written anew by each push, all around it
# stays yours.

# %%
print(hub.repos["me/small-python-depth4"].files()["README.md"].decode())

# %% [markdown]
# Licence, language and datasets are for you to fill in: nobody else knows them. A push never
# removes what you wrote.
#
# ## Push the family
#
# For relay, or for devices that choose their member when they start, push the family itself. It
# carries its code, for `trust_remote_code=True`, and its weights lie in one file per segment, so
# that a client that wants exit k downloads only what lies below it.

# %%
pushed = hff.push_family_to_hub("family", "me/small-python", **to).pushed[0]
weights = [name for name in pushed.uploaded if "safetensors" in name]
print(f"{len(pushed.uploaded)} files in one commit, among them", *weights, sep="\n  ")

# %% [markdown]
# Read it back in another process, with an empty cache. Only the exit asked for is fetched, which
# takes this package; without it, `trust_remote_code=True` loads the family whole.

# %%
READER = """
from pathlib import Path
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("me/small-python", trust_remote_code=True, max_exit=0)
print(type(model).__name__, "with exits at", model.config.exits)
fetched = Path("stranger").rglob("*.safetensors")
print("weights fetched:", *sorted(path.name for path in fetched))
plain = AutoModelForCausalLM.from_pretrained("me/small-python-depth2")
print(type(plain).__name__, "with", plain.config.num_hidden_layers, "layers")
"""
stranger = {
    "HF_ENDPOINT": hub.url,
    "HF_HOME": "stranger",
    "HF_HUB_OFFLINE": "0",
    "HF_HUB_DISABLE_XET": "1",
}
done = subprocess.run(
    [sys.executable, "-c", READER], env=os.environ | stranger, capture_output=True, text=True
)
print(done.stdout.strip() if done.returncode == 0 else done.stderr)

# %% [markdown]
# ## From the command line
#
# The same without Python, after `hf auth login`:
#
# ```text
# hf-familial export family member --exit 1
# hf-familial push family me/small-python --family
# hf-familial push family me/small-python --exits 0,-1 --private
# hf-familial push family me/small-python --layout revisions
# ```
#
# With `--layout revisions` members are branches of one repository, `depth2`, `depth4` and so on,
# read by `from_pretrained("me/small-python", revision="depth4")`.
#
# ## What to try next
#
# - `dtype="bfloat16"` in any of these calls halves the files.
# - `base_model="user/name"` names the decoder that a family was made of; cards then link to it.
# - [Members on the Hub](../hub.md) has every option, and what happens when the Hub fails half-way.
# - [Which member for my device?](device.md) goes on from here.
