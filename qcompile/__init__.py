"""qcompile: compiles float transformers into low-bit programs, and proves what every step did.

``qcompile.compile(model, recipe=...)`` returns a ``CompiledModel``. Importing this package loads neither
torch nor onnxruntime: the two names below are resolved at their first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qcompile.driver import CompiledModel, compile

__version__ = "0.1.0"
__all__ = ["CompiledModel", "__version__", "compile"]

_IN_DRIVER = ("CompiledModel", "compile")


def __getattr__(name: str) -> Any:
    if name in _IN_DRIVER:
        return getattr(importlib.import_module("qcompile.driver"), name)
    raise AttributeError(f"module 'qcompile' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *_IN_DRIVER})
