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
# # One checkpoint, from its score to its reasons
#
# Everything here runs offline in about two minutes on a laptop's CPU. The network is trained for a moment on
# scikit-learn's digits so that the notebook needs no files; put `ce.load_model("model.pth")` and
# `ce.load_dataset("path/to/dataset")` in its place. Digits rank nothing.

# %%
import matplotlib.pyplot as plt
import torch

import coss_eval as ce
from coss_eval import attacks, redundancy
from coss_eval.corruptions import corrupt
from coss_eval.internal import corrupted
from coss_eval.models.classifier import to_float
from coss_eval.receptive_field.theoretical import by_site
from coss_eval.tasks.attacks.task import Attacks
from coss_eval.tasks.corruptions.task import Corruptions
from coss_eval.tasks.probe.task import Probe

OUT = "runs/notebook"
data = ce.load_dataset("digits")
model = ce.train("co-byol", data, preset="digits-tiny", out=f"{OUT}/co-byol", resume=True)
untrained = model.untrained(seed=0)

# %% [markdown]
# ## Numbers with their intervals
#
# `evaluate` computes what is missing in the folder and nothing twice. Beside the checkpoint stands the same network
# with random weights: only what lies above it was learned. On digits, where pixels nearly decide, so short a training
# adds nothing to clean accuracy; `results/cifar10-jpeg-ssl-laptop` shows the same comparison on photographs.

# %%
SHOWN = ("fog", "jpeg_compression", "gaussian_noise")
tasks = [Probe(), Corruptions(names=SHOWN), Attacks((("pgd", "linf"),), images=100)]
run = ce.evaluate([model, untrained], data, tasks=tasks, out=f"{OUT}/results", limit=200)
frame = run.table()
frame[frame["metric"] == "top1"][["checkpoint", "labels", "value", "low", "high", "n", "limit"]]

# %%
accuracy = frame[frame["metric"] == "accuracy"].pivot_table("value", ["checkpoint", "corruption"], "severity")
accuracy.round(3)

# %% [markdown]
# `run.report()` writes the same as `report.html`, with figures, CSV and LaTeX tables, paired tests and provenance.
#
# ## What the network saw
#
# Corruptions and attacks act on the stored pixels; normalisation lives inside the classifier. Every draw belongs to the
# image's id, so these are the very pixels that were scored above.

# %%
batch = next(iter(data.test.batches(model.preprocessing.geometry, batch_size=64)))
fig, axes = plt.subplots(3, 6, figsize=(9, 4.8))
for row, name in zip(axes, SHOWN, strict=True):
    for severity, axis in enumerate(row):
        images = corrupt(batch.images[:1], name, severity, batch.ids[:1]) if severity else batch.images[:1]
        axis.imshow(images[0].permute(1, 2, 0).numpy())
        axis.set_axis_off()
        axis.set_title(f"{name.split('_')[0]} {severity}" if severity else "clean", fontsize=9)
fig.tight_layout()

# %% [markdown]
# ## Attacks through the probe
#
# `fit_classifier` is what `evaluate` used: the checkpoint's own head where its class names match, else a linear probe
# whose strength was chosen on held-out training images. A rising list of eps is one sweep.

# %%
classifier = ce.fit_classifier(model, data)
pixels = to_float(batch.images)
result = attacks.pgd(classifier, pixels, batch.labels, tuple(e / 255 for e in (1, 2, 4, 8)), batch.ids, steps=20)
for eps, share in zip(result.eps, result.robust_accuracy, strict=True):
    print(f"eps {255 * eps:.0f}/255: {100 * float(share):.1f} % of {len(pixels)} stand")
for flag in attacks.masking_flags(classifier, pixels, batch.labels, batch.ids, result):
    print(flag)

# %% [markdown]
# ## Damage inside
#
# Any network under any code of yours, damaged at a site for as long as the block lasts.

# %%
with torch.inference_mode():
    for level in (0.0, 0.3, 0.6, 0.9):
        with corrupted(classifier, "prepool", "location", level, batch.ids):
            right = (classifier(pixels).argmax(1) == batch.labels).float().mean()
        print(f"{100 * level:.0f} % of locations masked before pooling: {100 * right:.1f} % right")

# %% [markdown]
# ## How much of the image a location sees, and how alike locations are

# %%
batches = [classifier.normalise(pixels)]
by_site(model.backbone, pixels.shape[-1], batches)

# %%
rows = {}
for name, network in (("trained", model), ("untrained", untrained)):
    rows[name] = redundancy.measure(network.backbone, batches).set_index("metric")["value"]
rows["trained"].to_frame("trained").assign(untrained=rows["untrained"]).round(3)
