"""NVIDIA's compilers where they are: on PATH or in pip's packages."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path

from qcompile.errors import UserError

NVCC_HINT = "pip install nvidia-cuda-nvcc nvidia-cuda-cccl"


def find_nvcc() -> str:
    """nvcc on PATH or as pip installs it; UserError where there is none."""
    found = shutil.which("nvcc") or next(installed("nvcc"), None)
    if found is None:
        raise UserError("there is no nvcc, on PATH or from pip", where="CUDA", hint=NVCC_HINT)
    return found


def installed(tool: str) -> Iterator[str]:
    """Where pip's packages of CUDA have ``tool``."""
    spec = importlib.util.find_spec("nvidia")
    for place in (spec.submodule_search_locations or ()) if spec is not None else ():
        yield from map(str, sorted(Path(place).glob(f"*/bin/{tool}"), reverse=True))
