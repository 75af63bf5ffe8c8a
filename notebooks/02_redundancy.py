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
# # 2. Exploring redundancy
#
# **What it shows.** How much the local representations of one image repeat each other: as maps over the image, with a
# slider to choose the location, over distance, and in the spectrum; each beside the same network untrained.
#
# **How long it takes.** About 40 seconds on two CPU cores, and 15 more where the first notebook has not trained the
# network into `runs/digits` yet.
#
# A convolutional network gives one vector for each location of a grid, and then pools them. If these vectors are alike,
# losing some of them costs little: they are *redundant*. The network is trained for a moment on digits, which show how
# the tool works and rank nothing.

# %%
import matplotlib.pyplot as plt

import coss_eval as ce
from coss_eval.redundancy import heatmap, heatmaps, location_means

data = ce.load_dataset("digits")
settings = {"epochs": 4, "probe_every": 4, "batch_size": 32, "lr": 0.1, "crop_min_scale": 0.8}
trained = ce.train(
    "supervised", data, preset="digits-tiny", out="runs/digits", resume=True, **settings
)
networks = {"trained": trained, "untrained": trained.untrained(seed=0)}
images = next(iter(data.test.batches(trained.preprocessing.geometry, batch_size=200))).images
SITE = "stage3"  # where we look: a grid of 8 x 8 locations; the network's sites:
list(trained.backbone.sites)

# %% [markdown]
# ## Maps: which locations say what the others say?
#
# No labels are needed. Each square is one location, and its colour the cosine between its vector and the mean of the
# image's *other* locations. The mean of each place over many images is taken off first (`centre`); otherwise padding
# and ReLU alone make all cosines high.

# %%
centre = {name: location_means(network, [images], site=SITE) for name, network in networks.items()}
maps = {
    name: heatmaps(network, images, site=SITE, centre=centre[name])
    for name, network in networks.items()
}
figure, axes = plt.subplots(3, 6, figsize=(9, 4.6), layout="constrained")
for column in range(5):
    axes[0, column].imshow(images[column].permute(1, 2, 0).numpy())
    for row, name in enumerate(networks, start=1):
        drawn = axes[row, column].imshow(maps[name][column].numpy(), vmin=-1, vmax=1, cmap="RdBu_r")
for row, name in enumerate(networks, start=1):
    axes[row, 5].imshow(maps[name].mean(0).numpy(), vmin=-1, vmax=1, cmap="RdBu_r")
    axes[row, 0].set_ylabel(name)
axes[1, 5].set_title("mean of 200", fontsize=9)
for axis in axes.flat:
    axis.set_xticks([])
    axis.set_yticks([])
axes[0, 5].set_axis_off()
figure.colorbar(drawn, ax=axes[1:], label="cosine with the others")
plt.show()

# %% [markdown]
# ## One location against all others
#
# Move the sliders (they need the package `ipywidgets`; without it the cell draws one choice). The cross marks the
# chosen location; warm squares are alike to it.


# %%
def show(image: int = 0, row: int = 4, column: int = 4) -> None:
    _, axes = plt.subplots(1, 3, figsize=(7.5, 2.6))
    axes[0].imshow(images[image].permute(1, 2, 0).numpy())
    for axis, (name, network) in zip(axes[1:], networks.items(), strict=True):
        found = heatmap(network, images[image], of=(row, column), site=SITE, centre=centre[name])
        axis.imshow(found.numpy(), vmin=-1, vmax=1, cmap="RdBu_r")
        axis.plot(column, row, "kx")
        axis.set_title(name)
    for axis in axes:
        axis.set_axis_off()
    plt.show()


try:
    from ipywidgets import interact
except ImportError:
    show()
else:
    interact(show, image=(0, 19), row=(0, 7), column=(0, 7))

# %% [markdown]
# ## Against another image, and for a class
#
# A map may also compare with the mean of *another* image, or, where there is a classifier, show what each location
# alone gives to a class's logit; the map's mean is the logit, where the classifier is linear on the mean of the
# locations.

# %%
classifier = ce.fit_classifier(trained, data)
figure, axes = plt.subplots(2, 4, figsize=(7, 3.6))
for row, image in zip(axes, (images[0], images[4]), strict=True):
    alike = heatmap(trained, image, of=images[1], site=SITE, centre=centre["trained"])
    row[0].imshow(image.permute(1, 2, 0).numpy())
    row[1].imshow(alike.numpy(), vmin=-1, vmax=1, cmap="RdBu_r")
    for axis, label in zip(row[2:], (4, 2), strict=True):
        evidence = heatmap(classifier, image, label=label)
        axis.imshow(evidence.numpy(), vmin=-10, vmax=10, cmap="PuOr")
        axis.set_title(f"{data.classes[label]}: logit {float(evidence.mean()):.1f}", fontsize=9)
    row[1].set_title("like the second image", fontsize=9)
for axis in axes.flat:
    axis.set_axis_off()
figure.tight_layout()

# %% [markdown]
# On the command line, `coss-eval heatmaps --of another` (or `evidence`, or `3,4`) draws a page of them for several
# networks, with the mean map over many images.
#
# ## Numbers
#
# `measure` streams over the images and gives one row a metric, with its interval over images. `within` is the mean
# cosine of two locations of one image, `between` that of two images, and `normalised` is what `within` adds to
# `between`, from 0 to 1. Rows that end in `per_position` have the mean of each place taken off.

# %%
tables = {
    name: ce.redundancy.measure(network, [images], site=SITE) for name, network in networks.items()
}
values = {name: table.set_index("metric")["value"] for name, table in tables.items()}
shown = ["within", "between", "normalised", "within_per_position", "normalised_per_position"]
values["trained"].to_frame("trained").assign(untrained=values["untrained"]).loc[shown].round(3)

# %% [markdown]
# ## How many locations are enough?
#
# The classifier reads the mean of all locations. Give it the mean of only k of them, drawn at random for each image: if
# few keep the accuracy, each says what the others say. `vote_agreement` is the share of pairs of locations that name
# the same class when each is read alone; `locations_for_90` the fewest that keep 90 % of the accuracy. This is the task
# `redundancy` with `probe=True` (`coss-eval redundancy --probe`), whose numbers go into a results folder.

# %%
reading = ce.tasks.task_class("redundancy")(probe=True)
probed = ce.evaluate(
    list(networks.values()), data, tasks=[reading], out="runs/02/results", limit=200, quiet=True
)
rows = probed.table()
# without the untrained control, which stands beside every network
own = rows[rows["weights"] == "trained"]
kept = {
    name: own[(own["metric"] == "kept_accuracy") & (own["model"] == networks[name].name)]
    for name in networks
}
figure, axis = plt.subplots(figsize=(5, 3))
for name, line in kept.items():
    line = line.sort_values("keep")
    axis.plot(line["keep"], line["value"], marker="o", label=name)
    axis.fill_between(line["keep"], line["low"], line["high"], alpha=0.2)
axis.set_xscale("log", base=2)
axis.set_xlabel("locations kept")
axis.set_ylabel("accuracy")
axis.legend()
figure.tight_layout()

# %%
votes = ["vote_agreement", "locations_for_90"]
own[own["metric"].isin(votes)][["model", "metric", "value", "low", "high"]].round(3)

# %% [markdown]
# ## Over distance
#
# Neighbouring locations see overlapping pixels, and so are alike in any network. What is still shared far apart was
# made by the network.

# %%
figure, axis = plt.subplots(figsize=(5, 3))
for name, table in tables.items():
    line = table[table["metric"].str.startswith("within_per_position_at_distance_")]
    distance = line["metric"].str.rpartition("_")[2].astype(int)
    axis.plot(distance, line["value"], marker="o", label=name)
    axis.fill_between(distance, line["low"], line["high"], alpha=0.2)
axis.axhline(0, color="gray", linewidth=0.8)
axis.set_xlabel("distance on the grid, in locations")
axis.set_ylabel("mean cosine")
axis.legend()
figure.tight_layout()

# %% [markdown]
# ## Over sites, and the spectrum
#
# The effective rank counts how many directions a covariance really uses: `between` images (what the pooled
# representation keeps) and `within` an image (what pooling throws away).

# %%
sites = ["stage2", "stage3", "stage4"]
wanted = {
    "normalised_per_position": "redundancy",
    "effective_rank_between": "rank between images",
    "effective_rank_within": "rank within an image",
}
figure, axes = plt.subplots(1, 3, figsize=(9, 2.8))
for name, network in networks.items():
    by_site = [
        ce.redundancy.measure(network, [images], site=site).set_index("metric")["value"]
        for site in sites
    ]
    for axis, (metric, title) in zip(axes, wanted.items(), strict=True):
        axis.plot(sites, [values[metric] for values in by_site], marker="o", label=name)
        axis.set_title(title)
axes[0].legend()
figure.tight_layout()

# %% [markdown]
# Deeper sites have more overlap between what locations see. How much a location sees is the subject of [3. receptive
# fields](03_receptive_fields.ipynb).
