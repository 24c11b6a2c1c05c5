# %% [markdown]
# # A small IsoFLOP study, from design to plan
#
# This tutorial answers two questions. How large should a model be for a given amount of compute?
# And how much loss do G exits cost at the same compute? It trains 30 tiny models, fits a scaling
# law to their losses, and plans the next run. An *IsoFLOP* study trains models of several sizes
# on the same budget of FLOPs: small models see many tokens, large models few.
#
# Everything runs in some minutes on two CPU cores. The largest model has 126 thousand parameters.
# The steps are those of a real study. The numbers are not, and the tools say so at the end.

# %%
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

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
from hf_familial.scaling.report import (
    DataSource,
    analyse,
    write_analysis,
    write_report,
)


# %% [markdown]
# ## Design the runs
#
# A design has budgets C in FLOPs, sizes, and granularities G (numbers of exits). G = 1, the
# ordinary model, must be included for comparison. All granularities of a size share one backbone,
# so a family differs from its ordinary model by its exits only.
#
# A *rule* sets the learning rate and the batch size of each run. The rule matters. With bad
# learning rates, the losses show the effect of the learning rates, not of the sizes. `Measured`
# interpolates a table of your own settings. The two rows here are a guess. A real study would
# search for them first. The default, `StepLaw`, is for models from 60 million parameters.

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
print_runs(design)

# %% [markdown]
# No model is trained yet. Read the table first:
#
# - **N** are parameters, **D** training tokens, **exits** the depths of the exits.
# - **D** is smaller for two exits than for one. The second exit costs FLOPs, so fewer tokens fit
#   in the budget. Each run meets its budget within half a per cent.
# - **6ND** is the error of the usual rule C = 6ND. These models are so small that their heads and
#   attention are much of the work. The error grows with the number of exits.
# - The lines below the table show whether a budget has sizes below and above the expected best
#   size. If the lowest loss is at the smallest or largest size, the true minimum may lie outside.
#
# The command `hf-familial sweep plan design.yaml` prints the same table. It also measures your
# machine and estimates the time.
#
# ## Train
#
# `Sweep` trains the runs that are left, and writes one row per run to `runs.jsonl`. You can stop
# it at any time. The next call skips finished runs and continues the others from their
# checkpoints. The command is `hf-familial sweep run design.yaml --out sweep`.

# %%
if __name__ == "__main__":
    executor = LocalExecutor(workers=2, threads=1)
    outcome = Sweep(design, "sweep", executor).run()
records = sorted(outcome.records, key=lambda run: (run.G, run.N_total, run.C_flops))
print(len(records), "runs:", dict(Counter(run.status for run in records)))
for run in records[:3]:
    print(
        f"C = {run.C_flops:.3g}, N = {run.N_total:,}, D = {run.D_tokens:,}, "
        f"G = {run.G}, loss on held-out text {run.eval_loss_mean:.3f}"
    )

# %% [markdown]
# ## Look at the runs
#
# Look at the losses before you fit a law. Each curve is one budget.

# %%
figure = Figure(figsize=(8, 4), layout="constrained")
panels = figure.subplots(1, 2, sharey=True)
colours = dict(zip(design.budgets, ("#7ad151", "#22a884", "#414487"), strict=True))
for axes, exits in zip(panels, (1, 2), strict=True):
    for budget, colour in colours.items():
        rows = [run for run in records if run.G == exits]
        rows = [run for run in rows if abs(run.C_flops / budget - 1) < 0.01]
        sizes = [run.N_total for run in rows]
        losses = [run.eval_loss_mean for run in rows]
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
# Each curve should fall and rise again, and its lowest point should move to the right as the
# budget grows. It does. The curve of the smallest budget only rises: its best size is below the
# smallest size here, as the lines under the table warned.
#
# Curves should also be smooth. A jump between neighbouring points is noise. It comes from the
# seed, and here also from one learning rate for all sizes. A fit cannot show effects that are
# smaller than these jumps.
#
# ## Fit the law
#
# The familial law is Chinchilla's law with a factor for the exits, printed below. gamma is the
# cost of exits: how fast the mean loss above E grows with G at equal N and D. In another form,
# `familial_e_inside`, the factor also multiplies E. `hf-familial compare` compares both.

# %%
law = get_law("familial")
print(law.formula_text)
runs = load_runs("sweep/runs.jsonl", law, ColumnChoice(loss="eval_mean"))
answer = fit(law, runs.data)
analysis = analyse(answer, DataSource.of(runs), draws=200)
print(f"{answer.status}, {answer.data.runs} runs")
for name in answer.free:
    interval = analysis.intervals["delta"][name]
    ends = f"{interval.low:.4g} to {interval.high:.4g}"
    print(f"{name:6}{answer.values[name]:10.4g}   95 %: {ends}")
typical = np.median(np.abs(answer.residuals()))
print(f"typical residual: {typical:.1%} of the loss")

# %% [markdown]
# The tools print notes and warnings about this fit:

# %% varies
for sentence in (*runs.notes, *analysis.warnings):
    print("-", sentence)

# %% [markdown]
# These warnings are the main result. 30 runs of this size cannot separate E from the other terms.
# They also show no effect of G that is larger than their noise. An interval of gamma that
# contains 0 means that you need more runs. It does not mean that exits cost nothing. A real study
# has more budgets, more sizes, several seeds and tuned learning rates.
#
# ## Plan the next run
#
# Use the fitted law to plan a run with four times the largest budget. For a family of two exits,
# `plan` returns the best size, the number of tokens and the loss.
# `HeadFlops` counts the FLOPs of a run: 6ND plus the heads that N does not contain. N counts all
# parameters here, so it contains one head. Widths are about eight times the depth.

# %%
try:
    cost = HeadFlops(vocab=320, heads_in_N=1, width=partial(aspect_width, aspect=8))
    ahead = plan(answer, C=8e11, G=2, flops=cost)
    for name, found in (("N", ahead.N), ("D", ahead.D), ("loss", ahead.loss)):
        ends = f"{found.interval.low:.3g} to {found.interval.high:.3g}"
        print(f"{name:5}{found.value:10.4g} {found.unit}   95 %: {ends}")
    for sentence in ahead.notes:
        print("-", sentence)
except ScalingError as error:
    print(type(error).__name__, error)

# %% [markdown]
# ## Write the report
#
# The report is one HTML page with curves, residuals and intervals. `fit.json` contains the fit
# and its rows.

# %%
write_analysis("fit.json", analysis)
write_report("report.html", analysis)
print([name for name in ("fit.json", "report.html") if Path(name).stat().st_size])

# %% [markdown]
# The commands for fit, plan and report are:
#
# ```text
# hf-familial fit sweep/runs.jsonl --law familial --loss eval_mean --out fit.json
# hf-familial plan fit.json --flops 8e11 --granularity 2
# hf-familial report fit.json --out report.html
# ```
#
# ## Next steps
#
# - Add seeds: `seeds=(0, 1, 2)` for a part of the grid measures the noise.
# - Tune the learning rate for each size, and put the results into `Measured`.
# - Compare laws with `hf-familial compare`. It tests each law on budgets that it did not see.
# - Read [Fit a law and plan a run](../scaling.md) for every interval and option, and
#   [laws](../laws.md) for other laws.
