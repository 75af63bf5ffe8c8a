"""The image corruptions of ImageNet-C, and yours, seeded image by image. Importing the package imports no torch.

``corruption`` and ``register`` add one of yours under a name; see coss_eval.corruptions.registry.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from coss_eval.corruptions.names import BENCHMARK as BENCHMARK
from coss_eval.corruptions.names import NAMES as NAMES
from coss_eval.corruptions.names import VALIDATION as VALIDATION
from coss_eval.corruptions.registry import corruption as corruption
from coss_eval.corruptions.registry import register as register

if TYPE_CHECKING:
    from coss_eval.corruptions.engine import corrupt as corrupt
    from coss_eval.corruptions.engine import resolve_table as resolve_table

__all__ = ["BENCHMARK", "NAMES", "VALIDATION", "corrupt", "corruption", "register", "resolve_table"]


def __getattr__(name: str) -> Any:
    if name in ("corrupt", "resolve_table"):
        from coss_eval.corruptions import engine

        return getattr(engine, name)
    raise AttributeError(f"module 'coss_eval.corruptions' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
