# %% [markdown]
# # Relay generation, token by token
#
# A family can stop early. It can also go *deeper later*: a shallow exit runs first, and the layers
# above it take over from where it left off, in the same cache, computing nothing twice. That is a
# relay. This tutorial builds one by hand, so that you see every draft and every verdict, and then
# hands the work to `relay_generate`.
#
# It uses the family that [the first tutorial](pretrain.md) left in the folder `family`: 8 layers,
# exits at depths 2, 4, 6 and 8.

# %%
import torch
from matplotlib.figure import Figure
from transformers import AutoTokenizer

import hf_familial as hff
from hf_familial.evaluation import plot_trade_offs
from hf_familial.training import DataArguments, prepare_data


# %%
model = hff.FamilialForCausalLM.from_pretrained("family").eval()
tokenizer = AutoTokenizer.from_pretrained("family")
prompt = tokenizer("        return self.", return_tensors="pt")
prompt_length = prompt["input_ids"].shape[1]
NEW, DRAFTS = 40, 4

plain = model.generate(**prompt, max_new_tokens=NEW, do_sample=False)
print(tokenizer.decode(plain[0]))

# %% [markdown]
# This is what the deepest exit writes when it always takes its most probable token. Everything
# below must arrive at exactly this text.
#
# ## By hand
#
# `RelayCache` holds keys and values, and the *taps* of positions that have not gone deeper yet:
# the hidden states at an exit, of shape (batch, positions, hidden). Such positions are *pending*.
# Six of its methods are all that a relay needs:
#
# | method | what it does |
# |---|---|
# | `feed(input_ids=...)` | runs new tokens through the first segment, up to exit 0 |
# | `catch_up(k)` | runs all pending positions up to exit k, in one pass |
# | `logits(k, last=n)` | reads exit k at the last n positions |
# | `crop(n)` | forgets the last n positions, however deep they got |
# | `pending(k)` | how many positions have not reached exit k |
# | `commit()` | says that the positions so far are certain: nothing before them will be cropped |
#
# A round of *self-speculation* drafts four tokens at exit 0, one after the other, each a pass of 2
# layers. Then the 6 layers above run once, over all pending positions together. At every one of
# them the deepest exit now says what it would have written. Drafts are kept up to the first one
# where it says something else, and there its own token goes in. So a round yields at least one
# token, at most five.


# %%
def relay_by_hand(model, input_ids, new_tokens):
    """Greedy self-speculation; also what was drafted and accepted in each round."""
    cache = hff.RelayCache(model, exits=[0, -1], rollback=True)
    text, rounds, pending = input_ids, [], input_ids
    while text.shape[1] < input_ids.shape[1] + new_tokens:
        drafts = []
        for _ in range(DRAFTS):
            cache.feed(input_ids=pending)
            pending = cache.logits(0)[:, -1:].argmax(-1)  # shape (1, 1)
            drafts.append(pending)
        cache.feed(input_ids=pending)
        waiting = cache.pending(-1)
        cache.catch_up(-1)
        verdicts = cache.logits(-1, last=DRAFTS + 1).argmax(-1)  # shape (1, DRAFTS + 1)
        drafted = torch.cat(drafts, 1)
        right = (drafted == verdicts[:, :DRAFTS])[0].tolist()
        accepted = right.index(False) if False in right else DRAFTS
        pending = verdicts[:, accepted : accepted + 1]
        text = torch.cat((text, drafted[:, :accepted], pending), 1)
        cache.crop(DRAFTS - accepted)
        cache.commit()
        rounds.append((drafted[0].tolist(), accepted, pending.item(), waiting))
    return text, rounds


with torch.no_grad():
    text, rounds = relay_by_hand(model, prompt["input_ids"], NEW)
same = torch.equal(text[:, : plain.shape[1]], plain)
print("the same text as plain generation:", same)

# %% [markdown]
# Now look at it. Each line is a round: the drafts of exit 0, those accepted marked `+` and those
# rejected `-`, then the token that the deepest exit added. *waiting* is the number of positions
# that the one deep pass ran: in the first round the prompt is among them.

# %%
print("waiting  drafted at exit 0                                       written by exit 3")
for drafted, accepted, own, waiting in rounds:
    marks = ["+" if i < accepted else "-" for i in range(DRAFTS)]
    words = [mark + repr(tokenizer.decode([d])) for mark, d in zip(marks, drafted, strict=True)]
    print(f"{waiting:7}  {'  '.join(words):54}  {tokenizer.decode([own])!r}")
kept = sum(accepted for _, accepted, _, _ in rounds)
print(f"{kept} of {DRAFTS * len(rounds)} drafts accepted; {len(rounds)} deep passes, not {NEW}")

# %% [markdown]
# Two things are worth a second look. A draft after a rejected one is lost even if it happens to be
# right, because it was made for another text. And a rejected round is not wasted: the deepest
# exit's own token is in hand, so the relay never writes fewer tokens per deep pass than plain
# decoding does.
#
# ## `relay_generate`
#
# The same, with everything that `generate` has: sampling, batches, processors, stop strings,
# streamers. `relay_stats` tells what happened; `token_exits`, of shape (batch, new), says which
# exit each token came from.

# %%
asked = {**prompt, "max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True}
relay = hff.SpeculativeRelay(draft_exit=0, draft_length=DRAFTS)
speculative = model.relay_generate(**asked, relay=relay)
stats = speculative.relay_stats
print("the same text:", torch.equal(speculative.sequences, plain))
print("exit of every token:", *stats.token_exits[0].tolist())
print(
    f"{stats.accepted} of {stats.drafted} drafts accepted in {stats.rounds} rounds, "
    f"{stats.tokens_per_round:.2f} tokens per round"
)
print(f"layer passes {stats.layer_passes}, plain {stats.plain_layer_passes}")

# %% [markdown]
# (The counts are a little lower than by hand: the last round drafts no more than the text needs.)
#
# A layer pass is one layer over one position. Speculation does **not** save those: rejected drafts
# are extra. What it saves is *turns*. Plain decoding reads all eight layers' weights from memory
# for every single token; the relay reads the upper six once per round, for five positions. Where
# reading weights is what takes the time, as in decoding it mostly is, that wins. Where a pass over
# five positions costs five times one over a single position, it does not.
#
# With `draft_length="auto"`, the default, the relay measures both on your machine, how often
# drafts are accepted and what passes cost, drafts as far as it pays, and stops drafting where it
# does not pay. The text is the same in any case; only the rounds differ.

# %%
automatic = model.relay_generate(**asked, relay=hff.SpeculativeRelay(draft_exit=0))
print("the same text:", torch.equal(automatic.sequences, plain))

# %% [markdown]
# ## Leaving early: `ConfidenceRelay`
#
# If the text may differ a little, a token can leave at the first exit that is sure of it. Nothing
# checks it. Layers above a token that has left run later, if a deeper token needs their keys and
# values: then exactly as if they had run at once, so a deep token always sees a deep past.
#
# How sure is sure enough? `calibrate` answers from text: you name the share of tokens that shall
# be as the deepest exit has them, and it finds a threshold for each exit. Here on held-out blocks
# of the training corpus.

# %%
data, _ = prepare_data(
    DataArguments(
        tokenizer_name="family",
        seq_length=128,
        eval_fraction=0.05,
        max_train_bytes=100_000,
        max_eval_tokens=8_192,
        cache_dir="cache",
    )
)
calibration = hff.calibrate(model, data.eval, target=0.95)
chosen = calibration.chosen
print("thresholds", {k: round(x, 2) for k, x in chosen.thresholds.items()})
print(f"agreement {chosen.agreement:.3f}, {chosen.layers_per_token:.2f} layers per token of 8")
plot_trade_offs(calibration, "trade_off.png")

# %% [markdown]
# ![Agreement with the deepest exit against layers per token](relay_files/trade_off.png)
#
# Each point of the curve is a set of thresholds: to the left fewer layers, upwards more agreement.
# Take the point that your use can bear.

# %%
early = model.relay_generate(**asked, relay=calibration.relay)
stats = early.relay_stats
same = (early.sequences == plain)[0, prompt_length:].float().mean().item()
print("exit of every token:", *stats.token_exits[0].tolist())
print(f"{same:.0%} of the tokens are where plain generation has them")
print(f"layer passes {stats.layer_passes}, plain {stats.plain_layer_passes}")

# %% [markdown]
# Once one token differs, all after it may, so the share at the same place can fall far below the
# agreement of single tokens. And note the layer passes: a single deep token makes all the pending
# positions below it catch up. Leaving early saves *waiting* for the token that leaves; it saves
# *work* only for positions that no deep token ever comes after.
#
# ## Handing over: `HandoffRelay`
#
# The shallow member answers until a rule says "too hard", then the deep one writes on, for good.
# `after` counts tokens; `below` hands over when the mean confidence of the last `window` tokens
# falls under a number. The deep member begins with a complete past: at the hand-over all pending
# positions catch up in one pass. This is also what happens between two machines; see
# [hand-over](../handover.md).

# %%
handed = model.relay_generate(**asked, relay=hff.HandoffRelay(from_exit=0, to_exit=-1, after=12))
stats = handed.relay_stats
print("exit of every token:", *stats.token_exits[0].tolist())
print(f"layer passes {stats.layer_passes}, plain {stats.plain_layer_passes}")

# %% [markdown]
# ## All three in one picture


# %%
def draw(outputs, path):
    """Every token in its box, coloured by the exit that it came from."""
    colours = {0: "#fde725", 1: "#7ad151", 2: "#4ac3c0", 3: "#d9d9e6"}
    figure = Figure(figsize=(9, 1.2 * len(outputs)), layout="constrained")
    for row, (name, output) in enumerate(outputs.items()):
        axes = figure.add_subplot(len(outputs), 1, row + 1)
        x, y, ids = 0, 0, output.sequences[0, prompt_length:].tolist()
        for token, exit_idx in zip(ids, output.relay_stats.token_exits[0].tolist(), strict=True):
            word = tokenizer.decode([token]).replace("\n", "↵").replace(" ", "·")
            if x + len(word) > 108:
                x, y = 0, y - 1
            box = {"facecolor": colours[exit_idx], "edgecolor": "white", "pad": 2}
            axes.text(x, y, word, family="monospace", fontsize=9, va="center", bbox=box)
            x += len(word) + 1
        axes.set(xlim=(-1, 116), ylim=(-1.8, 0.8))
        axes.set_title(name, loc="left", fontsize=10)
        axes.axis("off")
    for k, colour in colours.items():
        figure.axes[0].scatter([], [], c=colour, marker="s", label=f"exit {k}")
    figure.legend(loc="outside upper right", ncols=4, frameon=False)
    figure.savefig(path, dpi=130)


relays = {
    "SpeculativeRelay: the deepest exit's text": speculative,
    "ConfidenceRelay: a token leaves where it is sure": early,
    "HandoffRelay: shallow first, then deep": handed,
}
draw(relays, "tokens.png")

# %% [markdown]
# ![The tokens of the three relays, coloured by the exit each came from](relay_files/tokens.png)
#
# ## What wins, and what does not
#
# - **Speculation** wins where a shallow exit often agrees with the deepest one and reading weights
#   is the bottleneck: batch 1, a large model. It gives the same text, so there is nothing to lose
#   but time; and where it would lose time, `"auto"` stops it after about a dozen drafts. In a batch
#   all rows keep as many drafts as the least lucky row, so the gain shrinks.
# - **Leaving early** has easy tokens there sooner, for a known loss of quality; the whole text
#   takes about as long. It is the policy to calibrate, never to guess.
# - **Handing over** wins where the beginning is easy or a device is slow, and where what comes
#   after must be as good as it gets.
# - **None of them** wins on a model whose shallow exits are poor. The share of accepted drafts is
#   the figure to look at first: `hff.evaluate_exits(...)` calls it *agreement*.
#
# Measured times, with how they were measured, are in [relay generation](../relay.md#measured).
#
# ## What to try next
#
# - `draft_exit=(0, 1)`: a chain, in which exit 1 checks exit 0's drafts before the deepest checks
#   both.
# - `do_sample=True`: the text then follows the deepest exit's distribution exactly.
# - Pretrain with `distillation_weight=1` and compare the accepted drafts.
# - `python examples/relay_generate.py --model family` shows the coloured text in your terminal.
