"""`coss-eval verify`: self-checks that always run, and published numbers where their data and weights are given."""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from coss_eval import attacks
from coss_eval.checkpoints.load import load_model, make_model
from coss_eval.corruptions import NAMES, corrupt
from coss_eval.corruptions.names import BENCHMARK
from coss_eval.corruptions.score import mce
from coss_eval.data.benchmark import Benchmark
from coss_eval.data.dataset import Dataset
from coss_eval.data.open import load_dataset
from coss_eval.errors import CossError, UsageError, unknown_name
from coss_eval.models import zoo
from coss_eval.models.choices import Interpolation
from coss_eval.models.classifier import Classifier
from coss_eval.models.model import Model
from coss_eval.probes import knn, predict
from coss_eval.probes.features import extract_known
from coss_eval.probes.fit import known_classifier
from coss_eval.runtime.device import Compute, resolve_device
from coss_eval.runtime.live import say
from coss_eval.statistics import wilson
from coss_eval.store import Cell, Measurement, Store


@dataclass(frozen=True)
class Checked:
    """One check: what was expected, what came, and whether they agree (None: not run)."""

    name: str
    ok: bool | None
    detail: str


By = Literal["own head", "kNN", "linear probe", "mCE"]


@dataclass(frozen=True)
class Published:
    """A number in percent that others published for weights that can be had, and where it stands.

    ``weights``: the name that --ckpt NAME=FILE gives the file. ``by``: how it was made. ``tolerance``: in points, how
    far another decoder, other versions or, for probes, another optimiser may lead. ``interpolation``: that of the
    source's evaluation, which files of a backbone alone do not say.
    """

    weights: str
    network: str
    by: By
    value: float
    source: str
    tolerance: float = 0.2
    interpolation: Interpolation = "bilinear"

    @property
    def title(self) -> str:
        score = f"mCE {self.value:g}" if self.by == "mCE" else f"{self.by} {self.value:g} %"
        return f"{self.network}: {score}"


_DINO, _MOCO = "github.com/facebookresearch/dino, README", "github.com/facebookresearch/moco-v3, CONFIG.md"
NAMED = {"resnet50": "torchvision:resnet50:IMAGENET1K_V1"}  # found by name, where no file is given
PUBLISHED = (
    Published("resnet50", "supervised ResNet-50 V1", "own head", 76.13, "torchvision's table of weights"),
    Published("resnet50", "supervised ResNet-50 V1", "mCE", 76.7, "Hendrycks & Dietterich 2019", 0.5),
    Published("dino-resnet50", "DINO ResNet-50", "kNN", 67.5, _DINO, interpolation="bicubic"),
    Published("dino-resnet50", "DINO ResNet-50", "linear probe", 75.3, _DINO, 1.0, "bicubic"),
    Published("dino-vits16", "DINO ViT-S/16", "kNN", 74.5, _DINO, interpolation="bicubic"),
    Published("dino-vits8", "DINO ViT-S/8", "kNN", 78.3, _DINO, interpolation="bicubic"),
    Published("dino-vitb16", "DINO ViT-B/16", "kNN", 76.1, _DINO, interpolation="bicubic"),
    Published("dino-vitb8", "DINO ViT-B/8", "kNN", 77.4, _DINO, interpolation="bicubic"),
    Published("mocov3-linear-100ep", "MoCo v3 ResNet-50, 100 epochs", "own head", 68.9, _MOCO),
    Published("mocov3-linear-300ep", "MoCo v3 ResNet-50, 300 epochs", "own head", 72.8, _MOCO),
    Published("mocov3-linear-1000ep", "MoCo v3 ResNet-50, 1000 epochs", "own head", 74.6, _MOCO),
    # not its ViT-S: a file with a linear classifier does not say that it has 12 heads; others of that width have 6
    Published("mocov3-linear-vit-b-300ep", "MoCo v3 ViT-B", "own head", 76.7, _MOCO),
    Published("byol-resnet50", "BYOL ResNet-50", "linear probe", 74.3, "Grill et al. 2020, table 1", 1.0, "bicubic"),
)


def verify(
    *,
    imagenet: Path | None = None,
    imagenet_c: Path | None = None,
    ckpt: Sequence[str] = (),
    device: str = "auto",
) -> int:
    """Run all checks, print a line each; exit code 1 if one disagrees."""
    given = _files(ckpt)
    findings = [_guarded(name, run) for name, run in SELF_CHECKS.items()]
    findings += list(_published(given, imagenet, imagenet_c, device))
    for finding in findings:
        mark = {True: "ok  ", False: "FAIL", None: "skip"}[finding.ok]
        say(f"{mark}  {finding.name:<52}{finding.detail}")
    return 0 if all(finding.ok is not False for finding in findings) else 1


def _files(texts: Sequence[str]) -> dict[str, Path]:
    """The files of NAME=FILE; UsageError for a name that no published number has."""
    found: dict[str, Path] = {}
    names = list(dict.fromkeys(row.weights for row in PUBLISHED))
    for text in texts:
        name, equals, file = text.partition("=")
        if not equals:
            raise UsageError(f"--ckpt takes NAME=FILE here, got {text!r}; the names: {', '.join(names)}")
        if name not in names:
            raise unknown_name("published network", name, names)
        found[name] = Path(file).expanduser()
    return found


def _guarded(name: str, run: Callable[[], tuple[bool, str]]) -> Checked:
    try:
        ok, detail = run()
    except (CossError, RuntimeError) as error:
        ok, detail = False, str(error).splitlines()[0]
    return Checked(name, ok, detail)


def _images(count: int = 8, side: int = 32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 4, 4, generator=generator)
    images = nn.functional.interpolate(coarse, (side, side), mode="bilinear").mul(255).to(torch.uint8)
    return images, torch.arange(count)


def _classifier() -> Classifier:
    model = make_model("resnet18", stem="cifar", width=16, classes=[str(i) for i in range(10)])
    assert model.head is not None
    return Classifier(model.backbone, model.head, model.preprocessing).eval()


def _hostile_pickle() -> tuple[bool, str]:
    class Hostile:
        def __init__(self, victim: Path) -> None:
            self.victim = victim

        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (self.victim,)

    with tempfile.TemporaryDirectory() as folder:
        victim, file = Path(folder) / "it-ran", Path(folder) / "hostile.pth"
        file.write_bytes(pickle.dumps({"state_dict": Hostile(victim)}))
        try:
            load_model(file)
        except CossError:
            return not victim.exists(), "a pickle that would run code ran nothing"
        return False, "a hostile pickle was accepted as a checkpoint"


def _corruptions_by_batch() -> tuple[bool, str]:
    images, ids = _images()
    differing = [
        name
        for name in NAMES
        if not torch.equal(
            corrupt(images, name, 3, ids),
            torch.cat([corrupt(images[i : i + 1], name, 3, ids[i : i + 1]) for i in range(len(ids))]),
        )
    ]
    return not differing, ", ".join(
        differing
    ) or f"{len(NAMES)} corruptions are the same for batches of 1 and {len(ids)}"


def _pgd_is_fgsm() -> tuple[bool, str]:
    classifier, (images, ids) = _classifier(), _images()
    pixels, eps = images.float() / 255, 2 / 255
    labels = classifier(pixels).argmax(1)
    pgd = attacks.pgd(classifier, pixels, labels, eps, ids, steps=1, step_size=eps, random_start=False)
    fgsm = attacks.fgsm(classifier, pixels, labels, eps)
    equal = torch.equal(pgd.adversarial(0), fgsm.adversarial(0))
    inside = (pgd.adversarial(0) - pixels).abs().max().item() <= eps + 1e-6
    return equal and inside, "PGD with one step of eps equals FGSM, and stays inside the ball"


def _wrapped_network() -> tuple[bool, str]:
    from torchvision.models import resnet18

    with torch.random.fork_rng(devices=[]):
        network = resnet18(num_classes=5).eval()
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = network(pixels)
        backbone, head = zoo.wrap(network)
        if head is None:
            return False, "the head was lost"
        error = (head(backbone(pixels)) - expected).abs().max().item()
    return error < 1e-5, f"largest difference {error:.1e}"


def _store_round_trip() -> tuple[bool, str]:
    with tempfile.TemporaryDirectory() as folder:
        store, cell = Store(Path(folder)), Cell("verify", {"seed": 0})
        key = store.key({}, cell)
        record = {"protocol": {}, "cell": cell, "model": "none", "measurements": [Measurement("accuracy", 0.5, 2)]}
        store.write(key, record | {"notes": [], "seconds": 0.0}, {})
        found = store.read(key)
    return found is not None and found["measurements"][0]["value"] == 0.5, "a cell reads back as it was written"


SELF_CHECKS: dict[str, Callable[[], tuple[bool, str]]] = {
    "untrusted checkpoints run no code": _hostile_pickle,
    "corruptions do not depend on the batch": _corruptions_by_batch,
    "one step of PGD is FGSM": _pgd_is_fgsm,
    "a wrapped network gives its own logits": _wrapped_network,
    "the store reads what it wrote": _store_round_trip,
}


def _published(
    given: Mapping[str, Path], imagenet: Path | None, imagenet_c: Path | None, device: str
) -> Iterator[Checked]:
    """A line for each published number: measured where its weights and images are given, else what would be needed."""
    models: dict[str, Model] = {}
    for row in PUBLISHED:
        folder = imagenet_c if row.by == "mCE" else imagenet
        needed = [] if folder is not None else ["--imagenet-c FOLDER" if row.by == "mCE" else "--imagenet FOLDER"]
        if row.weights not in given and row.weights not in NAMED:
            needed.append(f"--ckpt {row.weights}=FILE")
        if needed or folder is None:
            yield Checked(row.title, None, f"give {' and '.join(needed)} ({row.source})")
            continue
        yield _guarded(row.title, partial(_agrees, row, models, given, load_dataset(folder), device))


def _agrees(
    row: Published, models: dict[str, Model], given: Mapping[str, Path], data: Dataset, device: str
) -> tuple[bool, str]:
    if row.weights not in models:
        models[row.weights] = _loaded(row, given.get(row.weights))
    return check_published(row, models[row.weights], data, device)


def _loaded(row: Published, file: Path | None) -> Model:
    if row.weights in NAMED:
        return load_model(NAMED[row.weights], weights=None if file is None else str(file))
    assert file is not None  # asked for before
    return load_model(file, interpolation=row.interpolation)


def check_published(row: Published, model: Model, data: Dataset, device: str = "auto") -> tuple[bool, str]:
    """Whether the model's number on these images is the published one, and both of them in words."""
    compute = Compute(resolve_device(device))
    if row.by == "mCE":
        value, n = _mean_corruption_error(model, data, compute), len(data.test)
        found = f"{value:.1f}"
    else:
        right = _verdicts(row.by, model, data, compute)
        correct, n = int(right.sum()), len(right)
        value, (low, high) = 100 * correct / n, wilson(correct, n)
        found = f"{value:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"
    return abs(value - row.value) <= row.tolerance, f"{found}, n={n}, tolerance {row.tolerance:g} ({row.source})"


def _verdicts(by: By, model: Model, data: Dataset, compute: Compute) -> Tensor:
    """Whether each test image (N,) is classified rightly, in the way that the published number was made."""
    if by == "own head":
        classifier = known_classifier(model, data, compute, head="own" if model.classes is None else "auto")
        if classifier.fitted:
            raise UsageError(f"it is of a file with its classifier, which this one has not for these classes: {model}")
    elif by == "linear probe":
        classifier = known_classifier(model, data, compute, head="probe")
    else:
        return _knn_verdicts(model, data, compute)
    found = predict(classifier, data.test.batches(model.preprocessing.geometry), compute.device)
    return found.logits.argmax(1) == found.labels


def _knn_verdicts(model: Model, data: Dataset, compute: Compute) -> Tensor:
    """Of 20 neighbours at temperature 0.07, as in DINO's eval_knn.py."""
    if data.train is None:
        raise UsageError(f"{data.name} has no train/ folder, in which the neighbours are sought")
    train, test = (extract_known(model, split, compute) for split in (data.train, data.test))
    near, far = train.values["global"], test.values["global"]
    votes = knn.predict(near, train.labels, far, num_classes=len(data.classes), device=compute.device)
    return votes.argmax(1) == test.labels


def _mean_corruption_error(model: Model, data: Dataset, compute: Compute) -> float:
    """The published files are 224 px already: they are read as they are, not resized again."""
    if not isinstance(data, Benchmark):
        raise UsageError(f"{data.name} holds no ImageNet-C; expected gaussian_noise/1/n01440764/ and so on")
    classifier = known_classifier(model, data, compute)
    errors: dict[tuple[str, int], float] = {}
    for name in BENCHMARK:
        for severity in range(1, 6):
            images = data.condition(name, severity)
            found = predict(classifier, images.batches(model.preprocessing.geometry), compute.device)
            errors[name, severity] = 1 - float((found.logits.argmax(1) == found.labels).double().mean())
    return 100 * mce(errors, dataset="imagenet", side=224, table="imagenet")
