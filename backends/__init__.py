"""Where programs run: one module a backend, found by name and imported only when asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from qcompile.errors import unknown_name

if TYPE_CHECKING:
    from qcompile.backends.base import Backend

# name -> "module:class". A string table, so that naming the targets imports none of their runtimes.
TARGETS: dict[str, str] = {
    "cpu": "qcompile.backends.onnxruntime_cpu:OnnxRuntimeCpu",
}


def by_name(name: str) -> Backend:
    """The backend of target ``name``; UserError with the nearest names when there is none."""
    if name not in TARGETS:
        raise unknown_name("target", name, TARGETS)
    module, _, attribute = TARGETS[name].partition(":")
    backend: Backend = getattr(importlib.import_module(module), attribute)()
    return backend
