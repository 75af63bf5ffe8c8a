"""The flags that commands share, by what they are about; each group opens what it names."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from cyclopts import Parameter

from coss_eval.checkpoints.options import LoadOptions
from coss_eval.cli.app import DATA, MODEL, RUN, TASK
from coss_eval.errors import UsageError
from coss_eval.models.choices import Stem
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
    label: Words = ()
    'Checkpoint files that are runs of one method: "CO-BYOL (ours)=runs/co-*/model.safetensors"; repeat it for others.'
    untrained: int = 0
    "Number of untrained networks of the first checkpoint's architecture to add."
    options: Annotated[LoadOptions, Parameter(name="*")] = field(default_factory=LoadOptions)

    def geometry(self) -> Geometry:
        """How image files become pixels where no model says so."""
        from coss_eval.data.batches import Geometry

        options = self.options
        given = {"size": options.img_size, "crop_pct": options.crop_pct, "interpolation": options.interpolation}
        return Geometry(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]

    def make(self) -> Model:
        """An untrained network, where no checkpoint is needed."""
        from coss_eval.checkpoints.load import make_model

        options = self.options
        if options.arch is None:
            raise UsageError("no model given: add --ckpt FILE, or --arch NAME for an untrained network")
        stem, width = options.stem or "imagenet", options.width or 64
        return make_model(options.arch, stem=stem, width=width, img_size=options.img_size, pooling=options.pooling)

    def load(self) -> list[Model]:
        from coss_eval.checkpoints.load import load

        method = self._labelled()
        sources = list(dict.fromkeys([*self.ckpt, *method]))
        if not sources:
            raise UsageError("no model given: add --ckpt FILE (or torchvision:resnet50); repeat it for several")
        models = [load(source, self.options) for source in sources]
        for place, source in enumerate(sources):
            if source in method:  # whatever the file says of itself
                models[place] = replace(models[place], group=method[source], seed=None)
        return [*models, *(models[0].untrained(seed) for seed in range(self.untrained))]

    def _labelled(self) -> dict[str, str]:
        """The method of each file that --label names."""
        from coss_eval.reports.groups import given

        found: dict[str, str] = {}
        for name, patterns in given(self.label).items():
            for pattern in patterns:
                files = sorted(glob(str(Path(pattern).expanduser())))
                if not files:
                    raise UsageError(f"--label {name}={pattern} matches no file; give the checkpoints of that method")
                found |= dict.fromkeys(files, name)
        return found


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
    image_column: str | None = None
    "Column of a parquet file or a table that has the images (or their file names), where its name is unusual."
    label_column: str | None = None
    "Column that has the labels."
    holdout: float | None = None
    "Share of each class to take as the test split (0.2), where the images are not split."

    def open(self, clean: str | None = None) -> Dataset:
        from coss_eval.data.open import load_dataset, read_classes

        chosen = None if self.classes is None else read_classes(self.classes)
        return load_dataset(
            self.data,
            root=self.data_root,
            skip_bad_images=self.skip_bad_images,
            classes=chosen,
            clean=clean,
            exif=self.exif,
            image_column=self.image_column,
            label_column=self.label_column,
            holdout=self.holdout,
        )


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
class PassFlags:
    """How images go through networks, and where the results go."""

    out: Path | None = None
    "Results folder [default: named after the data and the networks]."
    limit: int | None = None
    "Number of test images to use (seeded, balanced over classes); every table is marked with it."
    batch_size: int = 256
    "Images per forward pass; it never changes a number."
    device: str = "auto"
    "auto, cpu, cuda, cuda:1, ..."
    seed: int = 0
    "Seed of all that is drawn: --limit's images, perturbations."
    quiet: bool = False
    "Print the last lines only."


@Parameter(name="*", group=RUN)
@dataclass(kw_only=True)
class RunFlags(PassFlags):
    """How to run cells; the same command goes on where it stopped."""

    device: str = "auto"
    "auto, cpu, cuda, cuda:1, ...; several, as cuda:0,1,2,3, get a process each, and these share the cells."
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


@Parameter(name="*", group=TASK)
@dataclass(kw_only=True)
class TrainFlags:
    """What of a preset to change; None leaves it as it is."""

    arch: str | None = None
    "Architecture: resnet18, an RF-ResNet preset, timm:NAME, package.module:factory."
    stem: Stem | None = None
    "ResNet stem; the last two are solo-learn's and lightly's own variants of the 3x3 one."
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
