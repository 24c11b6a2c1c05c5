# %% [markdown]
# # Pretrain a family
#
# One training run, four language models. In this tutorial you pretrain a small *family*: a decoder
# with an exit after some of its layers, so that everything below an exit is a language model of
# its own. It takes about a minute on one CPU core and downloads nothing: the text is the source
# code of Python's standard library, and the tokenizer is trained on it.
#
# You will see what a family adds to an ordinary training run: a loss for every exit, a table of
# its members, and a checkpoint that is one model and four at the same time.

# %%
import math
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, default_data_collator, set_seed

import hf_familial as hff
from hf_familial.training import (
    DataArguments,
    member_rows,
    plot_losses,
    prepare_data,
    print_members,
    save_members,
)


# %% [markdown]
# ## Text
#
# `prepare_data` loads a corpus, trains a tokenizer on it if you name none, and packs the documents
# into blocks of equal length. With no corpus named it takes the standard library. Some files are
# held out by a hash of their path, so that no file is on both sides.
#
# Blocks are as long as the model's context here, and every position of a block is a target: there
# is no padding, and `labels` are the `input_ids` (the model shifts them).

# %%
set_seed(0)
data, tokenizer = prepare_data(
    DataArguments(
        vocab_size=512,
        seq_length=128,
        eval_fraction=0.05,
        max_train_bytes=4_000_000,
        max_eval_tokens=32_768,
        cache_dir="cache",
    )
)
print(f"{data.name}: {data.train_tokens:,} tokens to train on, {data.eval_tokens:,} held out")
print("columns", data.train.column_names, "of length", len(data.train[0]["input_ids"]))
print(tokenizer.decode(data.eval[0]["input_ids"][:40]))

# %% [markdown]
# ## The family
#
# Any decoder of transformers can be the backbone: its config goes into `text_config`. `exits`
# lists the *depths* at which the family has exits, in layers. The last is always the full depth,
# so G, the number of exits, counts the whole model too.
#
# An early exit here has a norm of its own (96 numbers, one for each dimension) and shares the
# output head with all others. That is the cheapest exit there is;
# [families](../concepts/families.md) shows what else an exit may have.

# %%
config = hff.FamilialConfig(
    text_config={
        "model_type": "llama",
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    },
    exits=[2, 4, 6, 8],
)
model = hff.FamilialForCausalLM(config)
print(f"{model.num_parameters():,} parameters, exits at depths {config.exits}")

# %% [markdown]
# One forward pass computes every exit, because each depth's hidden state is on the way to the
# next. `loss` is the mean over exits. Before training, every exit knows nothing, and knowing
# nothing costs the logarithm of the vocabulary's size, in nats per token.

# %%
batch = torch.tensor(data.eval[:4]["input_ids"])
with torch.no_grad():
    output = model(batch, labels=batch)
    shallow = model(batch, exit_idx=0)  # runs 2 of the 8 layers
print("loss of every exit", [round(x, 2) for x in output.exit_losses.tolist()])
print("of knowing nothing", round(math.log(len(tokenizer)), 2))
print("input", tuple(batch.shape), "-> logits of exit 0", tuple(shallow.logits.shape))

# %% [markdown]
# ## Training
#
# `FamilialTrainer` is the Trainer of transformers, and everything you know of it holds. What it
# adds: the loss of every exit in the logs and in the evaluations, FLOPs that count every exit's
# head, and a loss that never makes the logits of all exits at once, so that memory does not grow
# with G. `FamilialTrainingArguments` adds how exits share the loss: here they weigh the same, the
# default.
#
# The learning rate is high because the model is tiny; take a tenth of it for a model of 100
# million parameters.

# %%
args = hff.FamilialTrainingArguments(
    output_dir="run",
    max_steps=700,
    per_device_train_batch_size=4,
    per_device_eval_batch_size=32,
    learning_rate=4e-3,
    lr_scheduler_type="cosine",
    warmup_steps=0.05,
    weight_decay=0.1,
    adam_beta2=0.95,
    logging_steps=20,
    eval_strategy="steps",
    eval_steps=175,
    save_strategy="no",
    report_to="none",
    use_cpu=True,
    dataloader_pin_memory=False,
    seed=0,
)
trainer = hff.FamilialTrainer(
    model=model,
    args=args,
    train_dataset=data.train,
    eval_dataset=data.eval,
    processing_class=tokenizer,
    data_collator=default_data_collator,
)
result = trainer.train()
print(f"{result.metrics['total_flos']:.3g} FLOPs for {args.max_steps * 4 * 128:,} tokens")

# %% [markdown]
# The lines are evaluations on held-out files, the shallowest exit first. Look at the picture: the
# curves lie on one another at first, because what there is to learn early (which tokens are
# frequent, what follows an indentation) needs few layers. Then the shallowest exit falls behind,
# and one by one the curves part. Depth pays later, and in longer runs it pays more. The dots lie
# above the lines although no block is seen twice: the files held out happen to be harder.

# %%
tokens_per_step = 4 * 128
plot_losses(trainer.state.log_history, config.exits, tokens_per_step, Path("losses.png"))

# %% [markdown]
# ![Loss of every exit over the tokens seen: four falling curves, the deepest exit
# lowest](pretrain_files/losses.png)
#
# ## The members
#
# A *member* is the model that ends at one exit. This table is what a family is for: one line per
# model you can deploy, with what it costs and how good it is. `save_members` writes it beside the
# checkpoint, where `describe` and the model cards find it.
#
# Perplexity depends on the tokenizer; *bits per byte* does not, so compare by that with models
# that have another vocabulary.

# %%
rows = member_rows(model, trainer.evaluate(), 128, data.eval_bytes_per_token)
print_members(rows)

# %% [markdown]
# Read it from both ends. The shallowest member runs a quarter of the layers; how much loss that
# costs is in the column *eval loss*. The embedding is the same for all members, so small models do
# not shrink as fast as their layers.
#
# ## Save and load
#
# The checkpoint is an ordinary folder of transformers. `AutoModelForCausalLM` loads it (importing
# `hf_familial` has registered the class), and it carries its own code for machines that do not
# have this package. Training switched the cache off, so switch it on again before saving.

# %%
model.config.use_cache = True
trainer.save_model("family")
save_members(rows, Path("family/members.json"))
names = sorted(path.name for path in Path("family").iterdir())
print([name for name in names if not name.endswith(".py")])
print("and", sum(name.endswith(".py") for name in names), "files of code")

# %%
family = AutoModelForCausalLM.from_pretrained("family")
with torch.no_grad():
    again = family(batch, labels=batch).exit_losses
    expected = model.eval()(batch, labels=batch).exit_losses
print(type(family).__name__, "with equal losses:", torch.equal(again, expected))

# %% [markdown]
# ## What they write
#
# `generate` takes `exit_idx`: 0 runs two layers for every token, -1 all eight. After a minute of
# training none of them writes working Python, but look at what each has picked up: indentation,
# keywords, and, deeper, brackets that close.

# %% varies
words = AutoTokenizer.from_pretrained("family")
prompt = words("    def __init__(self", return_tensors="pt")
for k, depth in enumerate(family.config.exits):
    set_seed(1)
    ids = family.generate(**prompt, exit_idx=k, max_new_tokens=40, do_sample=True, top_p=0.8)
    print(f"--- exit {k}, depth {depth}\n{words.decode(ids[0])}\n")

# %% [markdown]
# ## What to try next
#
# - `exit_weights="linear"` in the arguments favours the deep exits, `"inverse"` the shallow ones;
#   `exit_schedule="gradual"` lets the deeper ones join one by one.
# - `distillation_weight=1` lets every early exit learn the deepest exit's distribution too. Drafts
#   are then accepted more often in [relay generation](../relay.md).
# - `num_exit_layers=1` gives each early exit a private layer: better early members, a little
#   larger.
# - `examples/pretrain.py` is this tutorial as a program: any backbone, any corpus, several
#   processes.
# - The family in the folder `family` is used by [relay](../relay.md), [push](push.md) and
#   [device](device.md).
