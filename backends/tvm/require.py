"""TVM where it is needed, refused in words a user can act on."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType
from typing import TYPE_CHECKING

from qcompile.errors import UserError

if TYPE_CHECKING:
    import onnx_ir as ir

INSTALL = "pip install 'qcompile-nn[tvm]'"


def is_installed() -> bool:
    """Whether there is a TVM to import; it is not imported."""
    return importlib.util.find_spec("tvm") is not None


def check_installed() -> None:
    """UserError where there is no TVM; it is not imported."""
    if not is_installed():
        raise UserError("this target needs TVM, which is not installed", hint=INSTALL)


def require_tvm() -> ModuleType:
    """The module ``tvm``; UserError where it is absent or does not load."""
    check_installed()
    try:
        return importlib.import_module("tvm")
    except Exception as error:  # a library that does not load raises what it likes
        raise UserError(f"TVM is installed but does not load: {error}", hint=INSTALL) from error


def require_translation(model: ir.Model) -> int:
    """Sort ``model`` and see that TVM is here and has a translation for every operator; 0, the number of rewrites."""
    require_tvm()
    from qcompile.backends.tvm.translate import check

    model.graph.sort()
    check(model)
    return 0
