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
# # 1. A first look
#
# **What it shows.** What coss-eval says of one network: how well its representation tells classes apart, and how much
# of that survives corrupted images, attacks, and damage inside the network.
#
# **How long it takes.** About half a minute on two CPU cores. Nothing is downloaded; results go to `runs/01`, and the
# network, which the next notebooks use again, to `runs/digits`.
#
# The network is a small ResNet, trained for a moment on scikit-learn's handwritten digits so that the notebook needs no
# files. Digits show how the tool works and rank nothing. For your own network and images, put
# `ce.load_model("model.pth")` and `ce.load_dataset("path/to/images")` in the next cell.

# %%
import matplotlib.pyplot as plt

import coss_eval as ce
from coss_eval.corruptions import corrupt
from coss_eval.models.classifier import to_float

data = ce.load_dataset("digits")
settings = {"epochs": 4, "probe_every": 4, "batch_size": 32, "lr": 0.1, "crop_min_scale": 0.8}
model = ce.train(
    "supervised", data, preset="digits-tiny", out="runs/digits", resume=True, **settings
)
untrained = model.untrained(seed=0)

# %% [markdown]
# ## Measure
#
# `evaluate` measures a network, or several, and keeps each number in a folder; calling it again computes only what is
# missing there. Tasks are names, or classes with options of their own; here the options keep it short. Beside the
# network stands the same architecture with random weights: only what lies above it was learned. (On digits, where
# pixels nearly decide, that is little.)

# %%
corruptions = ce.tasks.task_class("corruptions")(
    names=("fog", "gaussian_noise"), severities=(1, 3, 5)
)
attacks = ce.tasks.task_class("attacks")((("pgd", "linf"),), images=50, steps=5)
run = ce.evaluate(
    [model, untrained], data, tasks=[corruptions, attacks], out="runs/01/results", limit=100
)
frame = run.table()
frame[frame["metric"] == "accuracy"][
    ["checkpoint", "corruption", "severity", "value", "low", "high", "n"]
].head()

# %% [markdown]
# One row is one number, with its 95 % interval and the count of images that it stands on. The table is a pandas
# DataFrame, so a figure is a few lines:

# %%
accuracy = frame[
    frame["metric"].eq("accuracy") & frame["corruption"].isin(["fog", "gaussian_noise"])
]
figure, axes = plt.subplots(1, 2, figsize=(8, 3), sharey=True)
for axis, (name, rows) in zip(axes, accuracy.groupby("corruption"), strict=True):
    for checkpoint, line in rows.sort_values("severity").groupby("checkpoint"):
        axis.plot(line["severity"], 100 * line["value"], marker="o", label=checkpoint)
        axis.fill_between(line["severity"], 100 * line["low"], 100 * line["high"], alpha=0.2)
    axis.set_title(name)
    axis.set_xlabel("severity")
axes[0].set_ylabel("accuracy in %")
axes[0].legend()
figure.tight_layout()

# %% [markdown]
# `run.report()` writes a page with all figures, tables (CSV and LaTeX) and where every number came from.
#
# ## What the network saw
#
# Each random draw belongs to the image, so these are the very pixels that were scored above.

# %%
batch = next(iter(data.test.batches(model.preprocessing.geometry, batch_size=50)))
figure, axes = plt.subplots(2, 6, figsize=(9, 3.2))
for row, name in zip(axes, ("fog", "gaussian_noise"), strict=True):
    for severity, axis in enumerate(row):
        image = (
            corrupt(batch.images[:1], name, severity, batch.ids[:1])
            if severity
            else batch.images[:1]
        )
        axis.imshow(image[0].permute(1, 2, 0).numpy())
        axis.set_axis_off()
        axis.set_title(f"{name}, {severity}" if severity else "clean", fontsize=8)
figure.tight_layout()

# %% [markdown]
# ## Attack it
#
# A classifier takes pixels in [0, 1] to logits: the network's own head where its classes have the dataset's names, else
# a linear probe. PGD looks for the most harmful change of at most `eps` at each pixel.

# %%
classifier = ce.fit_classifier(model, data)
pixels = to_float(batch.images)
result = ce.attacks.pgd(
    classifier, pixels, batch.labels, (1 / 255, 4 / 255, 8 / 255), batch.ids, steps=5
)
for eps, share in zip(result.eps, result.robust_accuracy, strict=True):
    print(
        f"eps {255 * eps:.0f}/255: {100 * float(share):.0f} % of {len(pixels)} images are still classified right"
    )

# %% [markdown]
# ## Damage it inside
#
# `corrupted` damages any network at a named place for as long as the block lasts. Here a share of the locations of the
# last map, before pooling, is set to zero. A network whose locations all tell the same survives that.

# %%
for level in (0.0, 0.3, 0.6, 0.9):
    with ce.internal.corrupted(classifier, "prepool", "location", level, batch.ids):
        right = (classifier(pixels).argmax(1) == batch.labels).float().mean()
    print(f"{100 * level:.0f} % of the locations masked: {100 * float(right):.0f} % right")

# %% [markdown]
# Next: [2. exploring redundancy](02_redundancy.ipynb), on why networks survive such damage.
