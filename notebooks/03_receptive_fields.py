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
# # 3. Receptive fields and RF-ResNets
#
# **What it shows.** How many pixels one location of a network sees, in theory and in effect, and the RF-ResNets:
# ResNets whose locations see a small part of the image that you choose.
#
# **How long it takes.** About 20 seconds on two CPU cores, and 15 more where the first notebook has not trained the
# network into `runs/digits` yet.
#
# Two locations can only be redundant *by learning* where they see different pixels. So the size of the receptive field
# belongs beside every number on redundancy.

# %%
import matplotlib.pyplot as plt

import coss_eval as ce
from coss_eval.checkpoints.load import make_model
from coss_eval.receptive_field import draw, field_map, theoretical

data = ce.load_dataset("digits")
networks = {name: make_model(name, stem="cifar", width=8) for name in ("resnet18", "rf29_resnet18")}
# the row of each site: its grid, the pixels between neighbouring locations (jump), the pixels that one sees (rf)
theoretical(networks["rf29_resnet18"], size=32).query("site != ''")[
    ["site", "grid", "jump", "rf", "covered"]
]

# %% [markdown]
# ## In theory
#
# The theory follows one forward pass and asks which pixels a location *can* depend on. An RF-ResNet turns some of the
# 3x3 convolutions into 1x1, and its field stops growing.

# %%
figure, axis = plt.subplots(figsize=(5, 3))
for name, network in networks.items():
    table = theoretical(network, size=32).query("site.str.startswith('stage')", engine="python")
    axis.plot(table["site"], table["rf"], marker="o", label=name)
axis.axhline(32, color="gray", linewidth=0.8)
axis.text(0, 33, "side of the image")
axis.set_ylabel("receptive field in pixels")
axis.legend()
figure.tight_layout()

# %% [markdown]
# ## In effect
#
# A location does not use all it can see: the effective field is where the gradient of the middle location lies (Luo et
# al. 2016). It changes as a network learns.

# %%
settings = {"epochs": 4, "probe_every": 4, "batch_size": 32, "lr": 0.1, "crop_min_scale": 0.8}
trained = ce.train(
    "supervised", data, preset="digits-tiny", out="runs/digits", resume=True, **settings
)
few = data.test.limited(32, seed=0)
kinds = {"trained": trained, "untrained": trained.untrained(seed=0)}
sites = ["stage1", "stage2", "stage3", "prepool"]
figure, axes = plt.subplots(2, 4, figsize=(8, 4.4))
for row, (name, network) in zip(axes, kinds.items(), strict=True):
    for axis, site in zip(row, sites, strict=True):
        seen = field_map(network, few, site=site)
        draw(seen, axis)
        axis.set_title(f"{site}: {seen.size:.0f} px", fontsize=9)
    row[0].set_ylabel(name)
figure.tight_layout()

# %% [markdown]
# The dashed box is the theoretical field, cut at the image's edges; the white line is where the gradient falls to 4.55
# % of its peak, and the size in the title that of the area inside, median over images. `field_map(...).map` is the map
# as an array. On the command line: `coss-eval receptive-field --ckpt model.pth --data path/to/images --out fields`.
#
# ## RF-ResNets side by side
#
# The same depth, the same number of layers, with fields of 9 to 109 pixels.

# %%
names = ["rf9_resnet18", "rf29_resnet18", "resnet18"]
figure, axes = plt.subplots(1, 3, figsize=(7, 2.7))
for axis, name in zip(axes, names, strict=True):
    seen = field_map(make_model(name, stem="cifar", width=16), few)
    draw(seen, axis)
    axis.set_title(f"{name}: {seen.size:.0f} px", fontsize=9)
figure.tight_layout()

# %% [markdown]
# ## What it means for redundancy
#
# Give `measure` the field's size and jump, and it splits the mean cosine of two locations of one image by whether their
# fields overlap. Where they are disjoint, likeness comes from the image or from learning, never from shared pixels.

# %%
for name in ("rf9_resnet18", "resnet18"):
    network = make_model(name, stem="cifar", width=16)
    field = theoretical(network, size=32).query("site == 'stage2'").iloc[0]
    table = ce.redundancy.measure(
        network, few, site="stage2", receptive_field=(int(field["rf"]), int(field["jump"]))
    ).set_index("metric")["value"]
    likeness = {kind: float(table[f"within_{kind}"]) for kind in ("overlapping", "disjoint")}
    print(
        f"{name}, fields of {field['rf']:.0f} px at stage2:",
        {k: round(v, 3) for k, v in likeness.items()},
    )

# %% [markdown]
# Both networks are untrained: this is the baseline that a trained one must be set against. Next: [4. comparing
# networks](04_comparing_networks.ipynb).
