"""Kernels as a library: compiled here or for another processor, and loaded with ``apache-tvm-ffi`` alone."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tvm

from qcompile.errors import UserError

LINKER_HINT = "install it (`apt install gcc-aarch64-linux-gnu` for ARM), or name another with linker="
# They find nothing to do in kernels that are written out, and take nine tenths of the time.
_SLOW = ["s_tir.CompactBufferAllocation", "tirx.CommonSubexprElim"]


def compiled(kernels: Iterable[Any], target: Any) -> Any:
    """The kernels, each under its symbol, as an executable of TVM."""
    module = tvm.IRModule({str(kernel.attrs["global_symbol"]): kernel for kernel in kernels})
    with tvm.transform.PassContext(opt_level=3, disabled_pass=_SLOW):
        return tvm.compile(module, target=target)


def write_library(kernels: Iterable[Any], target: Any, path: Path, *, linker: str | None = None) -> None:
    """A shared library at ``path``; ``tvm_ffi.load_module(path)[symbol]`` calls a kernel without TVM.

    ``linker``: the C compiler that links it; the machine's own by default.
    """
    if linker is not None and shutil.which(linker) is None:
        raise UserError(f"there is no {linker} to link the kernels with", where="kernels", hint=LINKER_HINT)
    compile_with = tvm.support.cc.cross_compiler(linker) if linker is not None else None
    executable = compiled(kernels, target)
    if compile_with is None:
        executable.export_library(str(path))
    else:
        executable.export_library(str(path), fcompile=compile_with)
