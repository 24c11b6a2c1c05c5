# %% [markdown]
# # Pretrain a family
#
# Train four language models in one run. The model is a small decoder that can stop after 2, 4, 6
# and 8 layers, its *exits*. This takes about a minute on one CPU core and downloads nothing. The
# text is the source code of Python's standard library. `make pretrain` in a clone does the same
# with one command and a larger model.

# %%
import math
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    default_data_collator,
    set_seed,
)

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
# ## Prepare the text
#
# `prepare_data` loads text, trains a tokenizer on it if you name none, and packs the documents
# into blocks of equal length. Without a name of a data set or file it uses the standard library.
# It holds out some files for evaluation.
#
# The blocks have no padding, so every token but the first of a block is a target. `labels` equal
# `input_ids`: the model itself compares each position with the next token.

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
tokens = f"{data.train_tokens:,} tokens to train on, {data.eval_tokens:,} held out"
print(f"{data.name}: {tokens}")
print("columns", data.train.column_names, "of length", len(data.train[0]["input_ids"]))
print(tokenizer.decode(data.eval[0]["input_ids"][:40]))

# %% [markdown]
# ## Build the family
#
# The config of the backbone goes into `text_config`. Any decoder of Transformers can be the
# backbone. `exits` lists the *depths* of the exits, in layers. The last one is always the full
# depth.
#
# Each early exit here has a norm of its own (96 numbers) and shares the output head with all
# others. This is the smallest possible exit. [Families](../concepts/families.md) shows what else
# an exit can have.

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
# One forward pass computes all exits. `loss` is the mean over the exits. The losses are in nats
# per token. Before training, each exit has about the loss of a random guess, which is the
# logarithm of the vocabulary size.

# %%
batch = torch.tensor(data.eval[:4]["input_ids"])
with torch.no_grad():
    output = model(batch, labels=batch)
    shallow = model(batch, exit_idx=0)  # runs 2 of the 8 layers
print("loss of every exit", [round(x, 2) for x in output.exit_losses.tolist()])
print("of a random guess", round(math.log(len(tokenizer)), 2))
print("input", tuple(batch.shape), "-> logits of exit 0", tuple(shallow.logits.shape))

# %% [markdown]
# ## Train
#
# `FamilialTrainer` is the Trainer of Transformers. It adds the loss of every exit to logs and
# evaluations, and its FLOPs include the head of every exit. It never stores the logits of all
# exits at once, so memory does not grow with the number of exits. `FamilialTrainingArguments`
# adds options for the [weights of the exits](../how-to/weights.md). By default all exits have the
# same weight.
#
# The learning rate is high because the model is tiny. Use a tenth of it for a model of 100
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
tokens = args.max_steps * 4 * 128
print(f"{result.metrics['total_flos']:.3g} FLOPs for {tokens:,} tokens")

# %% [markdown]
# Each line is an evaluation on the held-out files, the shallowest exit first. At first all exits
# improve together, because the first things to learn are easy and need few layers. Then the
# shallowest exit improves more slowly, and the curves separate. In the picture the evaluations
# (dots) are above the training losses (lines), because the held-out files are harder.

# %%
tokens_per_step = 4 * 128
history = trainer.state.log_history
plot_losses(history, config.exits, tokens_per_step, Path("losses.png"))

# %% [markdown]
# ![Loss of the four exits over the tokens seen](pretrain_files/losses.png)
#
# ## Compare the members
#
# A *member* is the model that ends at one exit. The table shows the cost and the quality of each.
# `save_members` will write it next to the checkpoint, where `hf-familial describe` and the model
# cards find it.
#
# The loss per token and the perplexity depend on the tokenizer. *Bits per byte* is the loss in
# bits per byte of text, so use it to compare models with different vocabularies.

# %%
rows = member_rows(model, trainer.evaluate(), 128, data.eval_bytes_per_token)
print_members(rows)

# %% [markdown]
# The shallowest member runs a quarter of the layers. The column *eval loss* shows how much
# quality that costs. Every member contains the whole embedding. So the shallowest member has more
# than a quarter of the parameters.
#
# ## Save and load
#
# The checkpoint is an ordinary folder of Transformers, and `AutoModelForCausalLM` loads it. It
# also contains the code of the model, for machines without this package. Training switched the KV
# cache off, so switch it on before you save.

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
# ## Generate
#
# `exit_idx` selects the exit. 0 runs two layers for every token, -1 all eight. After a minute of
# training no member writes working Python. But all have learned to indent, and the deeper ones
# close brackets.

# %% varies
words = AutoTokenizer.from_pretrained("family")
prompt = words("    def __init__(self", return_tensors="pt")
for k, depth in enumerate(family.config.exits):
    set_seed(1)
    ids = family.generate(
        **prompt, exit_idx=k, max_new_tokens=40, do_sample=True, top_p=0.8
    )
    print(f"--- exit {k}, depth {depth}\n{words.decode(ids[0])}\n")

# %% [markdown]
# ## Next
#
# - `exit_weights="linear"` favours the deep exits, `"inverse"` the shallow ones. With
#   `exit_schedule="gradual"` the deeper exits start first. See [exit
#   weights](../how-to/weights.md).
# - With `distillation_weight=1` every early exit also learns the distribution of the deepest
#   exit. A [relay](../relay.md) then accepts more drafts.
# - `num_exit_layers=1` gives each early exit a private layer. The early members become better and
#   slightly larger.
# - `examples/pretrain.py` is this page as a program, for any backbone, any text and several
#   processes.
# - The outputs of the pages on [relays](../relay.md), [hand-off](../handoff.md) and
#   [devices](../device.md) come from the family in the folder `family`.
