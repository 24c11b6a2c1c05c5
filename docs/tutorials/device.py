# %% [markdown]
# # Which member for my device?
#
# A family has several members; a device has so much memory and so much patience. This tutorial
# goes from one to the other: describe the family, state the limits, let the deepest member that
# fits be chosen, and load it, in either of two ways. None of it reads weights until the last step,
# so it works just as fast for a family of billions of parameters, on the Hub too.
#
# It uses the family that [the first tutorial](pretrain.md) left in the folder `family`.

# %%
from pathlib import Path

import torch
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_familial as hff
from hf_familial.cli.members import print_family


# %% [markdown]
# ## Describe
#
# `describe` reads `config.json`, the headers of the weight files and the recorded losses; then it
# runs the family without weights or data and counts every operation of the host's own code. On the
# command line this is `hf-familial describe family --context 512`.

# %%
found = hff.describe("family", context=512)
print_family(found)

# %% [markdown]
# What the columns mean for a device:
#
# - **params**: what must be in memory, times bytes per number (*fp32*, *bf16*). *no emb.* leaves
#   out the embedding and the output head, which all members have alike: the smaller the model, the
#   more of it they are.
# - **prefill**, **decode**: FLOPs per token for reading the context, and for one more token after
#   it. Divide what your device can do per second by *decode* for an upper bound of its tokens per
#   second; memory usually keeps it well below.
# - **KV/tok**, **cache**: what each token of text adds to the memory, and the whole after 512.
#   Long contexts can weigh more than the weights. Twice the depth, twice the cache.
# - **loss**: what it buys.
#
# ## The limits
#
# State what the device has. `memory` is in bytes, for weights and the cache of one text of
# `context` tokens; `flops_per_token` bounds one decoding step. Here is a made-up device with room
# for four million bytes.

# %%
choice = hff.choose_exit("family", memory=4_000_000, context=512, dtype="float32")
print(choice)
print(f"\nthe deepest that fits: exit {choice.exit_idx}, depth {choice.depth}")

# %% [markdown]
# Every exit gets its verdict and its reason. The same device in half precision, where both weights
# and cache take half, holds more:

# %%
half = hff.choose_exit("family", memory=4_000_000, context=512, dtype="bfloat16")
print(f"bfloat16: exit {half.exit_idx}, depth {half.depth}")
slow = hff.choose_exit("family", flops_per_token=1_500_000, context=512)
print(f"at most 1.5 MFLOPs per token: exit {slow.exit_idx}, depth {slow.depth}")
try:
    hff.choose_exit("family", memory=500_000, context=512)
except hff.NoExitFitsError as error:
    print("500 kB:", str(error).split(": ")[0])

# %% [markdown]
# A choice that cannot be made is an error, not the smallest member: you would find out on the
# device.
#
# ## The trade-off as a picture

# %%
figure = Figure(figsize=(7, 3.6), layout="constrained")
axes = figure.add_subplot()
for context, marker in ((128, "o"), (512, "s")):
    rows = hff.describe("family", context=context).exits
    need = [(row.weight_bytes["float32"] + row.cache_bytes) / 1e6 for row in rows]
    axes.plot(need, [row.eval_loss for row in rows], marker + "-", label=f"{context} tokens")
for row, x in zip(rows, need, strict=True):
    axes.annotate(f"depth {row.depth}", (x, row.eval_loss), (6, 4), textcoords="offset points")
axes.axvline(4, color="grey", linestyle=":", label="the device")
axes.set(xlabel="memory: weights and cache in float32, MB", ylabel="loss, nats per token")
axes.spines[["top", "right"]].set_visible(False)
axes.legend(frameon=False)
figure.savefig("members.png", dpi=130)

# %% [markdown]
# ![Loss of each member against its memory, for two lengths of context](device_files/members.png)
#
# Left and down is better. The curve is flat where depth buys little: there a smaller member costs
# almost nothing in quality, and it may be the right one even if a larger one fits.
#
# ## Load it: the short way
#
# `max_exit` makes `from_pretrained` read only what the exit needs. The result is still a family,
# of the exits up to there: it can relay among them.

# %%
small = hff.FamilialForCausalLM.from_pretrained("family", max_exit=choice.exit_idx)
print(f"exits {small.config.exits}, {small.num_parameters():,} parameters")

# %% [markdown]
# ## Load it: the plain way
#
# For a device that should not know of families, export the member. It is an ordinary model of its
# host's class, for stock transformers and for every tool that reads such models ([GGUF, for
# one](../how-to/gguf.md)).

# %%
report = hff.export_exit("family", choice.exit_idx, "device", dtype="bfloat16")
print(f"{report.architecture}, {report.depth} layers, {report.nbytes:,} bytes of {report.dtype}")
member = AutoModelForCausalLM.from_pretrained("device")
print(type(member).__name__, "from", *sorted(path.name for path in Path("device").iterdir()))

# %% [markdown]
# Do the two agree? In float32 they are equal bit for bit. Rounded to bfloat16, compare what
# counts, the most probable token at every position:

# %%
tokenizer = AutoTokenizer.from_pretrained("device")
ids = tokenizer("def read(path):\n    with open(path) as file:\n", return_tensors="pt")["input_ids"]
with torch.no_grad():
    ours = small.eval()(ids).logits.argmax(-1)
    theirs = member.float().eval()(ids).logits.argmax(-1)
print(f"{(ours == theirs).float().mean().item():.0%} of {ids.shape[1]} positions alike")

# %% [markdown]
# ## What to try next
#
# - `hf-familial describe me/family --context 2048 --memory 2GB` does all of this for a repository
#   on the Hub, without downloading weights.
# - A device that may grow: `export_exit(..., format="familial")` keeps the exits up to the chosen
#   one; a text begun there can be [handed over](../handoff.md) to a deeper member elsewhere.
# - Between two members that both fit, [relay generation](../relay.md) uses both: the shallow one
#   drafts.
