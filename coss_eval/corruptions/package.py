"""Where the installed imagecorruptions package lies, found without importing it: its import fails on today's stack."""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from pathlib import Path

from coss_eval.errors import CossError


@lru_cache(maxsize=1)
def package_folder() -> Path:
    """The folder of imagecorruptions (1.1.2): corruptions.py is its source, frost/ holds its textures."""
    spec = importlib.util.find_spec("imagecorruptions")
    if spec is None or not spec.submodule_search_locations:
        raise CossError(
            "frost and the reference backend need the imagecorruptions package: pip install imagecorruptions"
        )
    return Path(spec.submodule_search_locations[0])
