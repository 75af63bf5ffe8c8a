"""Digits, a small network with random weights, and the cache directory of a test."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from probes_models import make_model

from coss_eval.data.dataset import Dataset
from coss_eval.data.open import load_dataset
from coss_eval.models.model import Model


@pytest.fixture(scope="session")
def digits() -> Dataset:
    return load_dataset("digits")


@pytest.fixture
def model() -> Model:
    return make_model()


@pytest.fixture
def cache_folder() -> Path:
    """The directory that tests/conftest.py has set for this test."""
    return Path(os.environ["COSS_CACHE_DIR"])
