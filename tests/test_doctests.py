"""The examples in docstrings run and say what they say; the public surface has some."""

from __future__ import annotations

import doctest
import importlib
import inspect
from pathlib import Path

import pytest

import coss_eval as ce
from coss_eval import attacks, corruptions, internal, receptive_field, redundancy, similarity
from coss_eval.corruptions.registry import CORRUPTIONS

PACKAGE = Path(ce.__file__).parent
# by their text, so that nothing is imported to find them
WITH_EXAMPLES = sorted(path for path in PACKAGE.rglob("*.py") if ">>> " in path.read_text())
PUBLIC = [
    *(ce.load_dataset, ce.load_model, ce.fit_classifier, ce.extract, ce.evaluate, ce.train),
    *(ce.similarities, ce.write_features),
    *(corruptions.corrupt, corruptions.register, attacks.fgsm, attacks.pgd, internal.corrupted),
    *(redundancy.measure, redundancy.heatmap, receptive_field.theoretical, receptive_field.effective),
    *(similarity.cka, similarity.rsa, similarity.procrustes),
]


@pytest.mark.filterwarnings("ignore::coss_eval.errors.CossWarning")
@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_examples_say_what_comes(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    registered = dict(CORRUPTIONS)
    name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    done = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    CORRUPTIONS.clear()
    CORRUPTIONS.update(registered)
    assert done.attempted > 0
    assert done.failed == 0


@pytest.mark.parametrize("function", PUBLIC, ids=lambda function: function.__name__)
def test_the_public_surface_has_examples(function: object) -> None:
    assert ">>> " in (inspect.getdoc(function) or "")
