"""`coss-eval verify`: self-checks that always run, and published numbers where their data and weights are given."""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from coss_eval import attacks
from coss_eval.checkpoints.load import load_model, make_model
from coss_eval.corruptions import NAMES, corrupt
from coss_eval.corruptions.names import BENCHMARK
from coss_eval.corruptions.score import mce
from coss_eval.data.batches import Batch
from coss_eval.data.benchmark import Benchmark
from coss_eval.data.open import load_dataset
from coss_eval.errors import CossError, UsageError
from coss_eval.models import zoo
from coss_eval.models.classifier import Classifier
from coss_eval.models.model import Model
from coss_eval.probes import predict, resolve_device
from coss_eval.runtime.live import say
from coss_eval.statistics import wilson
from coss_eval.store import Cell, Measurement, Store


@dataclass(frozen=True)
class Checked:
    """One check: what was expected, what came, and whether they agree (None: not run)."""

    name: str
    ok: bool | None
    detail: str


def verify(
    *,
    imagenet: Path | None = None,
    imagenet_c: Path | None = None,
    resnet50: Path | None = None,
    device: str = "auto",
) -> int:
    """Run all checks, print a line each; exit code 1 if one disagrees."""
    findings = [_guarded(name, run) for name, run in SELF_CHECKS.items()]
    findings += list(_anchors(imagenet, imagenet_c, resnet50, device))
    for finding in findings:
        mark = {True: "ok  ", False: "FAIL", None: "skip"}[finding.ok]
        say(f"{mark}  {finding.name:<44}{finding.detail}")
    return 0 if all(finding.ok is not False for finding in findings) else 1


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


def _anchors(imagenet: Path | None, imagenet_c: Path | None, resnet50: Path | None, device: str) -> Iterator[Checked]:
    """Published numbers of torchvision's ResNet-50 (V1 weights)."""
    top1, robust = "ResNet-50 V1, ImageNet: top-1 76.1 %", "ResNet-50 V1, ImageNet-C: mCE 76.7"
    if imagenet is None:
        yield Checked(top1, None, "give --imagenet FOLDER (holding val/) to run it")
    if imagenet_c is None:
        yield Checked(robust, None, "give --imagenet-c FOLDER to run it")
    if imagenet is None and imagenet_c is None:
        return
    model = load_model("torchvision:resnet50", weights=str(resnet50 or "IMAGENET1K_V1"))
    if imagenet is not None:
        yield _guarded(top1, lambda: _clean_top1(model, imagenet, device))
    if imagenet_c is not None:
        yield _guarded(robust, lambda: _mean_corruption_error(model, imagenet_c, device))


def _clean_top1(model: Model, folder: Path, device: str) -> tuple[bool, str]:
    test = load_dataset(folder).test
    correct, n = _correct(model, test.batches(model.preprocessing.geometry), device)
    low, high = wilson(correct, n)
    return abs(correct / n - 0.7613) < 0.002, f"{correct / n:.2%} [{low:.2%}, {high:.2%}], n={n}, tolerance 0.2 points"


def _mean_corruption_error(model: Model, folder: Path, device: str) -> tuple[bool, str]:
    """The published files are 224 px already: they are read as they are, not resized again."""
    benchmark = load_dataset(folder)
    if not isinstance(benchmark, Benchmark):
        raise UsageError(f"{folder} holds no ImageNet-C; expected gaussian_noise/1/n01440764/ and so on")
    errors: dict[tuple[str, int], float] = {}
    for name in BENCHMARK:
        for severity in range(1, 6):
            images = benchmark.condition(name, severity)
            correct, n = _correct(model, images.batches(model.preprocessing.geometry), device)
            errors[name, severity] = 1 - correct / n
    value = 100 * mce(errors, dataset="imagenet", side=224, table="imagenet")
    return abs(value - 76.7) < 0.5, f"{value:.1f}, tolerance 0.5"


def _correct(model: Model, batches: Iterable[Batch], device: str) -> tuple[int, int]:
    if model.head is None:
        raise UsageError("these weights have no head")
    target = resolve_device(device)
    classifier = Classifier(model.backbone, model.head, model.preprocessing).to(target).eval()
    found = predict(classifier, batches, target)
    return int((found.logits.argmax(1) == found.labels).sum()), len(found.labels)
