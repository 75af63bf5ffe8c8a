# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 5. From training to a paper's figures
#
# **What it shows.** Two methods trained with several seeds, measured in one folder, compared over seeds, and written as
# figures and LaTeX tables.
#
# **How long it takes.** About a minute on two CPU cores; it trains four networks. Results go to `runs/05`.
#
# Two checkpoints are not two methods: the same method with another seed gives other numbers. A claim about methods
# needs several seeds of each, and its interval is over seeds. Two seeds, as here, are the fewest that give any, and
# digits rank nothing.

# %%
from dataclasses import replace

import matplotlib.pyplot as plt

import coss_eval as ce

data = ce.load_dataset("digits")
METHODS = ("byol", "co-byol")  # CO- adds the local term to any method
SEEDS = (0, 1)
settings = {"preset": "digits-tiny", "epochs": 1, "width": 8, "batch_size": 32, "probe_every": 1}

# %% [markdown]
# ## Train
#
# Each run has a folder of its own. With `resume=True`, a second call goes on where the first stopped, and returns the
# finished network at once. Larger plans (grids, several machines) are files for `coss-eval sweep`.

# %%
networks = []
for method in METHODS:
    for seed in SEEDS:
        folder = f"runs/05/{method}-{seed}"
        network = ce.train(method, data, seed=seed, out=folder, resume=True, quiet=True, **settings)
        networks.append(replace(network, name=f"{method} seed {seed}"))
[network.name for network in networks]

# %% [markdown]
# ## Measure
#
# All networks into one results folder: the same images, corruptions and draws for each.

# %%
CORRUPTIONS = ("fog", "gaussian_noise", "contrast")
corruptions = ce.tasks.task_class("corruptions")(names=CORRUPTIONS, severities=(1, 3, 5))
run = ce.evaluate(networks, data, tasks=[corruptions], out="runs/05/results", limit=200, quiet=True)
frame = run.table()
corrupted = frame[frame["metric"].eq("accuracy") & frame["corruption"].isin(CORRUPTIONS)]
# one number a run: the mean over corruptions and severities
by_run = corrupted.groupby("checkpoint")["value"].mean()
by_run.round(3)

# %% [markdown]
# ## Compare methods over seeds
#
# `contrast` gives a difference of means with an interval over seeds (Satterthwaite's degrees of freedom). With two
# seeds it is wide, and says so.

# %%
scores = {method: [by_run[f"{method} seed {seed}"] for seed in SEEDS] for method in METHODS}
difference = ce.statistics.contrast([(1, scores["co-byol"]), (-1, scores["byol"])])
print(f"CO-BYOL - BYOL: {100 * difference.difference:+.1f} points, 95 % {100 * difference.low:+.1f} to "
      f"{100 * difference.high:+.1f}, over {len(SEEDS)} seeds each")  # fmt: skip

# %% [markdown]
# ## A figure for a paper
#
# One line a method, its mean over seeds, and each seed as a dot.

# %%
figure, axes = plt.subplots(1, 3, figsize=(7, 2.4), sharey=True)
for axis, (name, rows) in zip(axes, corrupted.groupby("corruption"), strict=True):
    for method in METHODS:
        mine = rows[rows["checkpoint"].str.startswith(f"{method} ")]
        mean = 100 * mine.groupby("severity")["value"].mean()
        (line,) = axis.plot(mean.index, mean, label=method)
        axis.plot(mine["severity"], 100 * mine["value"], "o", color=line.get_color(), markersize=3)
    axis.set_title(name)
    axis.set_xlabel("severity")
axes[0].set_ylabel("accuracy in %")
axes[0].legend()
figure.tight_layout()
figure.savefig("runs/05/corruptions.pdf")

# %% [markdown]
# ## Everything else at once
#
# `report` writes a page, every table as CSV and LaTeX, and every figure as PDF and PNG. What each number depends on
# (the weights' hash, the images' fingerprint, versions, seeds) stands in `run.json` beside them.

# %%
paths = run.report()
print(*sorted({path.suffix for path in paths}), len(paths), "files")
print(next(path for path in paths if path.suffix == ".tex").read_text()[:600])

# %% [markdown]
# Two finished folders are compared image by image with `ce.compare(a, b)`. Next: [6. your own
# parts](06_your_own.ipynb).
