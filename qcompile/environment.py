"""What the environment must offer, asked for where it is needed and refused in words a user can act on."""

from __future__ import annotations

import importlib
import importlib.metadata
from types import ModuleType

from qcompile.errors import UserError

_RUNTIMES = ("onnxruntime", "onnxruntime-gpu")


def require_onnxruntime() -> ModuleType:
    """The ``onnxruntime`` module, imported at the first call.

    Raises UserError where it is absent, where its files are damaged, and where the CPU and the GPU
    distribution are both installed: they write the same files, so the later one has broken the other.
    """
    installed = [name for name in _RUNTIMES if _is_installed(name)]
    if len(installed) > 1:
        raise UserError(
            "onnxruntime and onnxruntime-gpu are both installed, and overwrite each other's files",
            where="the Python environment",
            hint="pip uninstall -y onnxruntime onnxruntime-gpu, then pip install one of them",
        )
    try:
        module = importlib.import_module("onnxruntime")
    except ImportError as error:
        raise _unusable(installed, str(error)) from error
    if not hasattr(module, "InferenceSession"):
        # Left-over folders of an uninstalled distribution import as an empty namespace package.
        raise _unusable(installed, "it has no InferenceSession")
    return module


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _unusable(installed: list[str], why: str) -> UserError:
    if not installed:
        return UserError(
            "ONNX Runtime is not installed; qcompile needs it to run and verify models",
            where="the Python environment",
            hint="pip install 'qcompile-nn[cpu]' (or 'qcompile-nn[gpu]' on a machine with CUDA)",
        )
    return UserError(
        f"{installed[0]} is installed but cannot be used: {why}",
        where="the Python environment",
        hint=f"pip install --force-reinstall --no-deps {installed[0]}",
    )
