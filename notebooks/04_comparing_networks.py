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
# # 4. Comparing networks, and neural recordings
#
# **What it shows.** How alike the layers of several networks are (CKA, RSA), with intervals, and how to set a network
# beside recordings of the same images, with a noise ceiling.
#
# **How long it takes.** About 20 seconds on two CPU cores, and 15 more where the first notebook has not trained the
# network into `runs/digits` yet.

# %%
import matplotlib.pyplot as plt
import numpy as np

import coss_eval as ce
from coss_eval.similarity import Recordings, against_recordings, cka, noise_ceiling, procrustes, rsa

data = ce.load_dataset("digits")
settings = {"epochs": 4, "probe_every": 4, "batch_size": 32, "lr": 0.1, "crop_min_scale": 0.8}
trained = ce.train(
    "supervised", data, preset="digits-tiny", out="runs/digits", resume=True, **settings
)
untrained = trained.untrained(seed=0)

# %% [markdown]
# ## Every layer against every layer
#
# `similarities` takes any number of networks, reads the images once, and compares all sites. Linear CKA is 1 where one
# representation is the other up to rotation and scale, and, debiased, about 0 where they are unrelated, whatever their
# number of units. RSA compares which images are far apart: Spearman's correlation of all pairs' dissimilarities.

# %%
found = ce.similarities([trained, untrained], data, sites=["stage1", "stage2", "stage3", "global"])
found.plot("cka")

# %%
found.plot("rsa")

# %% [markdown]
# Each value has its 95 % interval over images. `found.write(folder)` writes tables, figures and a page; on the command
# line it is `coss-eval similarity`.

# %%
table = found.table()
table[(table["site_a"] == "global") & (table["site_b"] == "global")].round(3)

# %% [markdown]
# ## Plain arrays
#
# Whatever tool your features are from: arrays of images x units will do. Images x locations x units, and images x
# repeats x units, are averaged over the middle. The images must be the same, in one order.

# %%
images = data.test.limited(200, seed=0)
layers = ["stage1", "stage2", "stage3", "global"]
features = {
    name: ce.extract(network, images, sites=layers).values
    for name, network in (("trained", trained), ("untrained", untrained))
}
a, b = features["trained"]["global"], features["untrained"]["global"]
print(f"CKA {cka(a, b):.2f}   RSA {rsa(a, b):.2f}   Procrustes {procrustes(a, b):.2f}")

# %% [markdown]
# ## A neural array
#
# Recordings are images x repeats x units: each image was shown several times. Here they are made up: 40 "neurons", each
# a random mixture of the trained network's stage 3, with three times as much noise in one repeat as signal. Put your
# array in the place of `recordings`; its rows must be in the order of the images.

# %%
draws = np.random.default_rng(0)
signal = features["trained"]["stage3"].numpy()
signal = (signal - signal.mean(0)) @ draws.normal(size=(signal.shape[1], 40))
signal = signal / signal.std()
recordings = signal[:, None] + 3 * draws.normal(size=(len(signal), 8, 40))
print(recordings.shape)
noise_ceiling(recordings)

# %% [markdown]
# Even a perfect model cannot reach 1, as the recordings hold noise. The repeats are cut into two halves at random, and
# the halves compared; Spearman and Brown's formula makes of that the reliability of all repeats together, and its
# square root is the ceiling: what a model without fault reaches.

# %%
figure, axis = plt.subplots(figsize=(5.5, 3.2))
for name, sites in features.items():
    against = [against_recordings(sites[layer], recordings) for layer in layers]
    value = np.array([one.value for one in against])
    error = [value - [one.low for one in against], [one.high for one in against] - value]
    axis.errorbar(layers, value, error, marker="o", capsize=3, label=name)
axis.axhline(against[0].ceiling, color="gray", linestyle="--", label="noise ceiling")
axis.set_ylim(0, 1.02)
axis.set_ylabel("CKA with the recordings")
axis.legend()
figure.tight_layout()

# %% [markdown]
# `similarities` takes recordings, too, beside any number of networks: `Recordings` says by the images' ids (or file
# keys) whose rows they are, and the column `ceiling` has the noise ceiling of every pair. On the command line it is
# `coss-eval similarity --recordings V4=v4.npz`.

# %%
v4 = Recordings("V4", recordings, images.ids, repeats=True)
beside = ce.similarities(
    [trained, untrained], data, sites=layers, measures=["cka", "rsa"], recordings=v4
)
beside.plot("rsa")

# %%
rows = beside.table()
rows = rows[rows["site_b"] == "recordings"]
rows.assign(share=rows["value"] / rows["ceiling"])[
    ["measure", "model_a", "site_a", "value", "ceiling", "share"]
].round(3)

# %% [markdown]
# The layer that the recordings were made of comes nearest to the ceiling, and not all the way, as 40 mixtures do not
# hold all of its units. Next: [5. from training to a paper's figures](05_paper_figures.ipynb).
