"""The flags that commands share, by what they are about; each group opens what it names."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from cyclopts import Parameter

from coss_eval.cli.app import DATA, MODEL, RUN, TASK
from coss_eval.errors import UsageError
from coss_eval.tasks.flags import Words

if TYPE_CHECKING:
    from coss_eval.data.batches import Geometry
    from coss_eval.data.dataset import Dataset
    from coss_eval.models.model import Model

T = TypeVar("T")
OfTask = Annotated[T, Parameter(group=TASK)]
OfModel = Annotated[T, Parameter(group=MODEL)]
OfData = Annotated[T, Parameter(group=DATA)]
OfRun = Annotated[T, Parameter(group=RUN)]
Chosen = OfTask[Words]


@Parameter(name="*", group=MODEL)
@dataclass(kw_only=True)
class ModelFlags:
    """Which network, and how its file is to be read where it does not say so itself."""

    ckpt: Words = ()
    "Checkpoint file, torchvision:NAME, timm:NAME or pixels:SIDE (no network); several stand side by side."
    untrained: int = 0
    "Number of untrained networks of the first checkpoint's architecture to add."
    arch: str | None = None
    "Architecture (resnet50, timm:..., package.module:factory); inferred from the file where it can be."
    stem: Literal["imagenet", "cifar", "solo-cifar", "lightly-cifar"] | None = None
    "ResNet stem; the last two are solo-learn's and lightly's own variants of the 3x3 one."
    width: int | None = None
    "Planes of a ResNet's first stage."
    pooling: Literal["own", "mean"] = "own"
    "Global representation of a ViT: the network's own (class token), or the mean of its patch tokens."
    local: str | None = None
    "Module whose output is the map before pooling (layer4), where the network is not to be taken apart by itself."
    global_: Annotated[str | None, Parameter(name="--global")] = None
    "Module whose output is the global representation."
    weights: str | None = None
    "Branch of the file (student, teacher, online, target), or the weights of a named model."
    mean: tuple[float, float, float] | None = None
    "Normalisation mean of pixels in [0, 1]."
    std: tuple[float, float, float] | None = None
    "Normalisation standard deviation."
    img_size: int | None = None
    "Side the network needs; images of another size are resized inside the classifier."
    crop_pct: float | None = None
    "Share of the shorter side that the centre crop keeps, for files of varying size."
    interpolation: Literal["bilinear", "bicubic"] | None = None
    "Resizing of image files."
    head: Literal["auto", "own", "probe"] = "auto"
    "The checkpoint's own head, a linear probe, or (auto) the own head where its class names match the dataset's."
    allow_partial: bool = False
    "Accept a checkpoint that leaves parts of the backbone at random."

    def geometry(self) -> Geometry:
        """How image files become pixels where no model says so."""
        from coss_eval.data.batches import Geometry

        given = {"size": self.img_size, "crop_pct": self.crop_pct, "interpolation": self.interpolation}
        return Geometry(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]

    def make(self) -> Model:
        """An untrained network, where no checkpoint is needed."""
        from coss_eval.checkpoints.load import make_model

        if self.arch is None:
            raise UsageError("no model given: add --ckpt FILE, or --arch NAME for an untrained network")
        stem, width = self.stem or "imagenet", self.width or 64
        return make_model(self.arch, stem=stem, width=width, img_size=self.img_size, pooling=self.pooling)

    def load(self) -> list[Model]:
        from coss_eval.checkpoints.load import load_model

        if not self.ckpt:
            raise UsageError("no model given: add --ckpt FILE (or torchvision:resnet50); repeat it for several")
        own = ("ckpt", "untrained")
        options = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in own}
        models = [load_model(source, **options) for source in self.ckpt]
        return [*models, *(models[0].untrained(seed) for seed in range(self.untrained))]


@Parameter(name="*", group=DATA)
@dataclass(kw_only=True)
class DataFlags:
    """Which images."""

    data: str = "digits"
    "A name (see coss-eval list), a folder of class folders, or a folder with train.parquet and val.parquet."
    data_root: Path | None = None
    "Where named datasets lie [env: COSS_DATA_ROOT]."
    skip_bad_images: bool = False
    "Leave out files that cannot be decoded (they are counted and named) instead of stopping."
    exif: bool = False
    "Turn photographs as their EXIF orientation says; without it they are read as stored, as torchvision does."
    classes: Path | None = None
    "Text file with a class name on each line: use the images of these classes only."

    def open(self, clean: str | None = None) -> Dataset:
        from coss_eval.data.open import load_dataset, read_classes

        chosen = None if self.classes is None else read_classes(self.classes)
        skip, root = self.skip_bad_images, self.data_root
        return load_dataset(self.data, root=root, skip_bad_images=skip, classes=chosen, clean=clean, exif=self.exif)


@Parameter(name="*", group=DATA)
@dataclass(kw_only=True)
class CorruptionDataFlags(DataFlags):
    """Which images; a ready-made corruption benchmark (a folder or CIFAR-10-C's arrays) is read as it is."""

    clean: str | None = None
    "With a ready-made benchmark as --data: the dataset it was made from, for the probe and the clean accuracy."

    def open(self, clean: str | None = None) -> Dataset:
        return super().open(clean or self.clean)


@Parameter(name="*", group=TASK)
@dataclass(kw_only=True)
class CopyFlags:
    """A corrupted copy of the images, in place of an evaluation."""

    write: Path | None = None
    "Evaluate nothing: write a corrupted copy of the test images into this folder; the same call goes on."
    layout: Literal["npy", "folders"] | None = None
    "Of the copy: npy as CIFAR-10-C, or folders of PNG files [default: npy for sets of one small size]."


@Parameter(name="*", group=RUN)
@dataclass(kw_only=True)
class RunFlags:
    """How to run, and where the numbers go."""

    out: Path | None = None
    "Results folder; the same command goes on where it stopped [default: results/DATA-MODEL]."
    limit: int | None = None
    "Number of test images to use (seeded, balanced over classes); every table is marked with it."
    batch_size: int = 256
    "Images per forward pass; it never changes a number."
    device: str = "auto"
    "auto, cpu, cuda, cuda:1, ..."
    seed: int = 0
    "Seed of all perturbations."
    overwrite: bool = False
    "Compute cells again that are already stored."
    no_cache: bool = False
    "Do not read or write cached features and probes."
    allow_batch_dependent: bool = False
    "Measure networks whose outputs for an image depend on its batch; the batch size is then kept with the numbers."
    budget_hours: float | None = None
    "Begin no new cell after this number of hours."
    baseline: str | None = None
    "Name of the model that the report's differences refer to [default: the first]."
    dry_run: bool = False
    "Print the plan and stop."
    quiet: bool = False
    "Print the last lines only."


@Parameter(name="*", group=TASK)
@dataclass(kw_only=True)
class TrainFlags:
    """What of a preset to change; None leaves it as it is."""

    arch: str | None = None
    "Architecture: resnet18, an RF-ResNet preset, timm:NAME, package.module:factory."
    stem: Literal["imagenet", "cifar"] | None = None
    "ResNet stem."
    width: int | None = None
    "Planes of a ResNet's first stage."
    epochs: int | None = None
    "Passes over the training images."
    batch_size: int | None = None
    "Images per step."
    lr: float | None = None
    "Peak learning rate for a batch of 256."
    seed: int | None = None
    "Seed of weights, order and views."

    def given(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
