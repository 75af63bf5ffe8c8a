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
# # 6. Your own data, network, corruption and task
#
# **What it shows.** How to put your own parts into coss-eval from a notebook: images in arrays, a network in PyTorch, a
# corruption, and a task, which is anything that you want measured, in the same tables and reports.
#
# **How long it takes.** About 20 seconds on two CPU cores. Results go to `runs/06`.

# %%
import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn

import coss_eval as ce
from coss_eval.tasks.task import Result, Task

# %% [markdown]
# ## Data: arrays
#
# Images are uint8, or floats in [0, 1]; also torch and Hugging Face datasets, folders and files will do. Here: bright
# squares, discs and crosses on noise.

# %%
draws = np.random.default_rng(0)
CLASSES = ["square", "disc", "cross"]


def picture(label: int) -> np.ndarray:
    rows, columns = np.mgrid[:32, :32] - draws.integers(11, 21, size=2)[:, None, None]
    shapes = (
        (abs(rows) < 6) & (abs(columns) < 6),
        rows**2 + columns**2 < 42,
        ((abs(rows) < 2) | (abs(columns) < 2)) & (abs(rows) < 8) & (abs(columns) < 8),
    )
    return draws.integers(0, 120, size=(32, 32, 3)) + 90 * shapes[label][..., None]


labels = draws.integers(0, 3, size=700)
images = np.stack([picture(label) for label in labels]).astype(np.uint8)
data = ce.as_dataset(
    (images[:500], labels[:500]), (images[500:], labels[500:]), name="shapes", classes=CLASSES
)

# %% [markdown]
# ## Network: any module
#
# It takes normalised pixels (B, 3, H, W); `mean` and `std` say how they are normalised. `head="own"` says that its
# outputs are the dataset's classes; otherwise a linear probe is fitted on what it gives. Training it is up to you.

# %%
torch.manual_seed(0)
network = nn.Sequential(
    nn.Conv2d(3, 16, 5, stride=2, padding=2), nn.BatchNorm2d(16), nn.ReLU(),
    nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
    nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 3),
)  # fmt: skip
pixels = (torch.from_numpy(images[:500]).permute(0, 3, 1, 2) / 255 - 0.5) / 0.25
optimizer = torch.optim.Adam(network.parameters(), 0.01)
for _ in range(40):
    loss = nn.functional.cross_entropy(network(pixels), torch.from_numpy(labels[:500]))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
model = ce.as_model(network, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), head="own", name="mine")
model

# %% [markdown]
# ## Corruption: one function
#
# It gets a batch of images uint8 (B, 3, H, W), the setting with one of five severities, and random draws that belong to
# each image. Registered, it stands beside the package's own.


# %%
@ce.corruptions.corruption("stripes", severities=(2, 3, 4, 6, 8))
def stripes(images, setting, draws):
    """Black columns, every sixteenth pixel, of a width that grows with the severity."""
    (width,) = setting.parameters
    kept = torch.arange(images.shape[-1], device=images.device) % 16 >= width
    return images * kept


ids = data.test.ids[:1]
figure, axes = plt.subplots(1, 6, figsize=(9, 1.8))
for severity, axis in enumerate(axes):
    image = torch.from_numpy(images[500:501]).permute(0, 3, 1, 2)
    shown = (
        ce.corruptions.corrupt(image, "stripes", severity, torch.as_tensor(ids))
        if severity
        else image
    )
    axis.imshow(shown[0].permute(1, 2, 0).numpy())
    axis.set_title(f"severity {severity}" if severity else CLASSES[labels[500]], fontsize=9)
    axis.set_axis_off()
figure.tight_layout()

# %% [markdown]
# ## Task: what you want measured
#
# A task says what its cells are (what is computed and stored at once) and measures one cell. This one asks how far the
# accuracy holds when the image is turned.


# %%
class Turned(Task):
    """Accuracy on images turned by quarters."""

    name = "turned"

    def cells(self, subject, seed):
        return [ce.store.Cell(self.name, {"degrees": 90 * turns}) for turns in range(4)]

    def measure(self, cell, subject):
        turns = cell.params["degrees"] // 90
        ids, right = [], []
        for batch in subject.batches():
            logits = subject.classifier(batch.images.rot90(turns, (2, 3)).float() / 255)
            ids += batch.ids.tolist()
            right += (logits.argmax(1) == batch.labels).tolist()
        return Result.of_verdicts("accuracy", np.array(ids), [(dict(cell.params), np.array(right))])


# %% [markdown]
# ## All of it at once

# %%
corruptions = ce.tasks.task_class("corruptions")(names=("fog", "stripes"))
run = ce.evaluate(model, data, tasks=[corruptions, Turned()], out="runs/06/results", quiet=True)
frame = run.table()
frame[frame["task"] == "turned"][["task", "degrees", "value", "low", "high", "n"]].round(3)

# %%
mine = frame[frame["corruption"].isin(["fog", "stripes"]) & frame["metric"].eq("accuracy")]
figure, axis = plt.subplots(figsize=(5, 3))
for name, rows in mine.groupby("corruption"):
    rows = rows.sort_values("severity")
    axis.plot(rows["severity"], 100 * rows["value"], marker="o", label=name)
    axis.fill_between(rows["severity"], 100 * rows["low"], 100 * rows["high"], alpha=0.2)
axis.axhline(100 / 3, color="gray", linestyle="--", label="chance")
axis.set_xlabel("severity")
axis.set_ylabel("accuracy in %")
axis.legend()
figure.tight_layout()

# %% [markdown]
# In a file of their own, say `mine.py`, the same parts are reached from the command line: `coss-eval evaluate --ckpt
# model.pth --arch mine:network --tasks mine:Turned --data folder`, and `coss-eval corruptions --names fog
# mine:stripes`.
