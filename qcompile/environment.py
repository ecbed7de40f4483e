"""What the environment must offer, asked for where it is needed and refused or told in words a user can act on."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from qcompile.errors import UserError
from qcompile.progress import warn

CPUINFO = Path("/proc/cpuinfo")
_RUNTIMES = ("onnxruntime", "onnxruntime-gpu")
_VNNI = {"avx512_vnni", "avx_vnni"}


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


def warn_of_saturation(kernels: Iterable[Mapping[str, Any]]) -> None:
    """Say so where the program's 8-bit kernels (``backends.base.Kernel``) may give wrong sums on this machine."""
    if any(k["low_bit"] and k["kernel"] != "MatMulNBits" for k in kernels) and lacks_vnni():
        warn(
            "this processor has no VNNI, so ONNX Runtime's int8 kernels may saturate here and outputs differ; "
            "set the session option session.x64quantprecision to 1 (see Targets in the README)"
        )


def lacks_vnni() -> bool:
    """Whether this is an x86 processor without VNNI; False where nothing is known of the processor.

    There ONNX Runtime multiplies uint8 by int8 with VPMADDUBSW, which adds two products in 16 bits and saturates.
    """
    try:
        lines = CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), None)  # x86 alone
    return flags is not None and _VNNI.isdisjoint(flags)


def require_torch() -> None:
    """Raises UserError where torch is absent; nothing is imported."""
    if not _is_installed("torch"):
        raise UserError(
            "torch is not installed, and passes that learn need it",
            where="the Python environment",
            hint="pip install 'qcompile-nn[torch]'",
        )
