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
    "llvm": "qcompile.backends.tvm.backend:TvmLlvm",
    "cuda": "qcompile.backends.cuda.target:Cuda",
    "opencl": "qcompile.backends.opencl.target:OpenCl",
    "metal": "qcompile.backends.metal.target:Metal",
    "webgpu": "qcompile.backends.webgpu.target:WebGpu",
    "android": "qcompile.backends.mobile.targets:Android",
    "ios": "qcompile.backends.mobile.targets:Ios",
}


def by_name(name: str) -> Backend:
    """The backend of target ``name``, which may have options as a pass does: ``cpu{accuracy_level=4}``.

    UserError with the nearest names when there is none.
    """
    from qcompile.pipeline import split_passes, typed_options

    plain, options = next(iter(split_passes(name)), (name, {}))
    if plain not in TARGETS:
        raise unknown_name("target", plain, TARGETS)
    module, _, attribute = TARGETS[plain].partition(":")
    found = getattr(importlib.import_module(module), attribute)
    backend: Backend = found(**typed_options(found, options)) if options else found()
    return backend


def missing(name: str) -> str:
    """What this machine lacks to run programs of target ``name``, and how to get it; empty where nothing. No import."""
    from ctypes.util import find_library
    from importlib.util import find_spec

    from qcompile.backends.tvm.require import INSTALL, is_installed

    if ".mobile." in TARGETS[name]:
        return "a phone: see README.md in its folder"
    if ".cuda." in TARGETS[name]:
        return "" if find_library("cuda") else "no driver of an NVIDIA GPU; it compiles here where nvcc is"
    if ".opencl." in TARGETS[name]:
        return "" if find_library("OpenCL") else "no OpenCL; it compiles here where TVM is"
    if any(part in TARGETS[name] for part in (".metal.", ".webgpu.")):
        return "it writes source, which nothing here compiles or runs"
    if ".tvm." in TARGETS[name]:
        return "" if is_installed() else f"tvm is not installed: {INSTALL}"
    return "" if find_spec("onnxruntime") else "onnxruntime is not installed: pip install 'qcompile-nn[cpu]'"
