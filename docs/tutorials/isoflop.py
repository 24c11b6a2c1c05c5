# %% [markdown]
# # An IsoFLOP study, from design to law
#
# How large should a model be for the compute you have, and what does a family of G exits cost on
# top? An *IsoFLOP* study answers by measuring: for each of several budgets it trains models of
# several sizes, each just as long as the budget pays for. Small ones see much text, large ones
# little; somewhere in between the loss is least. A *scaling law* fitted to all of it says where
# the best size lies for budgets that nobody has tried.
#
# This tutorial goes all the way: design, runs, law, plan. It is a toy. The largest model has a
# hundred thousand parameters and the largest run costs a fifth of a tera-FLOP, so the whole takes
# some minutes on two CPU cores. The steps are those of a real study; the numbers are not, and at
# the end you will see how the tools say so themselves.

# %%
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console

import hf_familial as hff
from hf_familial.isoflop import (
    BackboneTemplate,
    LocalExecutor,
    Measured,
    MeasuredRow,
    Sweep,
    print_runs,
)
from hf_familial.scaling import (
    ColumnChoice,
    HeadFlops,
    ScalingError,
    fit,
    get_law,
    load_runs,
    plan,
)
from hf_familial.scaling.flop_models import aspect_width
from hf_familial.scaling.report import DataSource, analyse, write_analysis, write_report


# %% [markdown]
# ## Design
#
# A design is a grid: budgets C in FLOPs, sizes, and granularities G, the number of exits. G = 1,
# the dense model, must be among them, or there would be nothing to compare with. All granularities
# of a size share one backbone, so a family differs from its dense twin by its exits alone.
#
# Learning rate and batch follow from a *rule*. It matters more than anything else in a study: with
# badly tuned rates you measure the rates. `Measured` interpolates a table of your own settings;
# the two rows here are a guess (one rate for all, batches that grow with the tokens), which a real
# study would replace by a search. `StepLaw`, the default, holds from 60 million parameters
# upwards.

# %%
design = hff.IsoFlopDesign(
    budgets=[1.25e10, 5e10, 2e11],
    sizes=["8x2", "16x2", "24x2", "32x3", "48x4"],  # width x depth
    granularities=[1, 2],
    vocab_size=320,
    seq_length=64,
    backbone=BackboneTemplate(head_dim=8, multiple=8),
    rule=Measured(
        [
            MeasuredRow(N=1e4, D=1e4, lr=8e-3, batch_tokens=128),
            MeasuredRow(N=1e4, D=4e6, lr=8e-3, batch_tokens=4096),
        ]
    ),
    data="stdlib",
    counting="total",
    training={
        "max_train_bytes": 12_000_000,
        "max_eval_tokens": 16_384,
        "use_cpu": True,
        "eval_steps": 0.5,
    },
)
Path("design.yaml").write_text(design.to_yaml())
print_runs(design, console=Console(width=150))

# %% [markdown]
# Nothing has run yet; this is what *would* run. Read the table before you spend anything:
#
# - **FLOPs** are counted operation by operation, every exit and every head. Each run meets its
#   budget within half a percent; a run that cannot is refused, with a budget that would fit.
# - **6ND** is the error of the usual rule of thumb, C = 6ND. For models this small, whose head and
#   attention are much of the work, it is far off; and the more exits, the further.
# - Compare G = 1 and G = 2 of a size: the second has fewer tokens. That is how a second exit is
#   paid for.
# - The lines below the table say whether the sizes *bracket* the expected optimum: whether there
#   are smaller and larger ones. A minimum at the edge of the sizes is not measured.
#
# On the command line: `hf-familial sweep plan design.yaml`, which also measures this machine and
# tells the time.
#
# ## Run
#
# `Sweep` does what is left of a design and writes one row per run to `runs.jsonl`. It may be
# stopped at any time, or killed: runs that ended are skipped, interrupted ones go on from their
# checkpoint. On the command line: `hf-familial sweep run design.yaml --out sweep`.

# %%
if __name__ == "__main__":
    outcome = Sweep(design, "sweep", LocalExecutor(workers=2, threads=1)).run()
records = sorted(outcome.records, key=lambda run: (run.G, run.N_total, run.C_flops))
print(len(records), "runs:", dict(Counter(run.status for run in records)))
for run in records[:3]:
    print(
        f"C = {run.C_flops:.3g}, N = {run.N_total:,}, D = {run.D_tokens:,}, G = {run.G}, "
        f"loss on held-out text {run.eval_loss_mean:.3f}"
    )

# %% [markdown]
# ## Look
#
# Before any fit, look at the runs. Each curve is one budget.

# %%
figure = Figure(figsize=(8, 4), layout="constrained")
panels = figure.subplots(1, 2, sharey=True)
for axes, exits in zip(panels, (1, 2), strict=True):
    for budget, colour in zip(
        design.budgets, ("#7ad151", "#22a884", "#414487"), strict=True
    ):
        curve = [
            r for r in records if r.G == exits and abs(r.C_flops / budget - 1) < 0.01
        ]
        sizes, losses = [r.N_total for r in curve], [r.eval_loss_mean for r in curve]
        axes.plot(sizes, losses, "o-", color=colour, label=f"{budget:.3g} FLOPs")
    axes.set(xscale="log", xlabel="parameters N", title=f"G = {exits}")
    axes.spines[["top", "right"]].set_visible(False)
panels[0].set_ylabel("held-out loss, nats per token, mean over exits")
panels[1].legend(frameon=False)
figure.savefig("isoflop.png", dpi=130)

# %% [markdown]
# ![Held-out loss against size, a curve per budget, for one exit and for
# two](isoflop_files/isoflop.png)
#
# What to look for: does each curve fall and rise again? Does the lowest point move to the right as
# the budget grows? It does; but at the smallest budget the curve only rises, so its optimum lies
# below the smallest size, as the lines under the table had warned.
#
# Are the curves smooth? Where neighbouring points jump, that is noise: of the seed, and here above
# all of one learning rate for every size. Any statement finer than these jumps is not in the data,
# whatever a fit says.
#
# ## Fit
#
# The familial law is Chinchilla's with a factor for the exits, printed below. Its question is
# gamma: by how much does the mean loss above E grow when G does, at equal N and D? (Whether E
# stands outside the factor or inside is not known; `familial_e_inside` is the other form, and
# `hf-familial compare` judges between them.)

# %%
law = get_law("familial")
print(law.formula_text)
reading = load_runs("sweep/runs.jsonl", law, ColumnChoice(loss="eval_mean"))
answer = fit(law, reading.data)
analysis = analyse(answer, DataSource.of(reading), draws=200)
print(f"{answer.status}, {answer.data.runs} runs")
for name in answer.free:
    interval = analysis.intervals["delta"][name]
    print(
        f"{name:6}{answer.values[name]:10.4g}   95 %: {interval.low:.4g} to {interval.high:.4g}"
    )
print(f"typical residual: {np.median(np.abs(answer.residuals())):.1%} of the loss")

# %% [markdown]
# And here is what the tools themselves think of it:

# %% varies
for sentence in (*reading.notes, *analysis.warnings):
    print("-", sentence)

# %% [markdown]
# Take these seriously: they are the result. Runs this small and this few cannot tell E, the loss
# that no model goes below, from the terms above it, and they do not show an effect of G that is
# larger than their own noise: an interval of gamma that holds 0 says that more runs are needed,
# not that exits are free. A study that answers has more budgets, more sizes, several seeds and
# tuned rates.
#
# ## Plan
#
# With a law in hand, ask for a budget four times the largest one measured: how large, how many
# tokens, what loss, for a family of two exits? `HeadFlops` says what a run costs: 6ND and the
# heads that N does not count. N counts all parameters here, so one head is in it already, and
# widths are about eight times the depth.

# %%
try:
    cost = HeadFlops(vocab=320, heads_in_N=1, width=partial(aspect_width, aspect=8))
    ahead = plan(answer, C=8e11, G=2, flops=cost)
    for name, found in (("N", ahead.N), ("D", ahead.D), ("loss", ahead.loss)):
        low, high = found.interval.low, found.interval.high
        print(
            f"{name:5}{found.value:10.4g} {found.unit}   95 %: {low:.3g} to {high:.3g}"
        )
    for sentence in ahead.notes:
        print("-", sentence)
except ScalingError as error:
    print(type(error).__name__, error)

# %% [markdown]
# ## The report
#
# One page of HTML with everything: curves, residuals, clouds of the bootstrap, profiles.
# `fit.json` keeps the fit whole, rows included.

# %%
write_analysis("fit.json", analysis)
write_report("report.html", analysis)
print(
    *(
        path.name
        for path in map(Path, ("fit.json", "report.html"))
        if path.stat().st_size
    )
)

# %% [markdown]
# On the command line the second half of this page is three lines:
#
# ```text
# hf-familial fit sweep/runs.jsonl --law familial --loss eval_mean --bootstrap 1000 --out fit.json
# hf-familial plan fit.json --flops 8e11 --granularity 2
# hf-familial report fit.json --out report.html
# ```
#
# ## What to try next
#
# - More seeds: `seeds=(0, 1, 2)` on a part of the grid measures the noise that everything else is
#   to be compared with.
# - Rates tuned for each size, and the result as rows of `Measured`.
# - `hf-familial compare` fits several laws to the same runs and judges each on budgets it has not
#   seen.
# - [Fitting scaling laws](../scaling.md) explains every interval and warning; [laws](../laws.md)
#   lists the forms there are.
