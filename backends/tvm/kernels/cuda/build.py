"""Compiles the CUDA kernels for a shape, and reads what the compiler made of them. No GPU is needed."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Literal

from qcompile.errors import UserError

FOLDER = Path(__file__).parent
ARCHITECTURES = ("sm_80", "sm_90")
Format = Literal["ptx", "cubin", "fatbin"]
NVCC_HINT = "install the CUDA toolkit (Debian and Ubuntu: `apt install nvidia-cuda-toolkit`)"
DISASSEMBLER_HINT = "pip install nvidia-cuda-nvdisasm"
_USED = re.compile(r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) "
                   r"registers(?:.*?(\d+) bytes smem)?", re.DOTALL)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Shape:
    """Macros of a source: ``group`` for nbits.cu, ``rows`` for int8_rows."""

    k: int
    n: int
    group: int = 128
    rows: int = 1

    def macros(self) -> list[str]:
        return [f"-DK={self.k}", f"-DN={self.n}", f"-DGROUP={self.group}", f"-DROWS={self.rows}"]


@dataclasses.dataclass(frozen=True)
class Resources:
    """What one thread or block of a kernel takes, and the bytes that did not fit its registers."""

    registers: int
    shared: int
    spilled: int


def source(name: str) -> str:
    """The text of ``integer`` or ``nbits``."""
    return (FOLDER / f"{name}.cu").read_text(encoding="utf-8")


def find_nvcc() -> str:
    found = shutil.which("nvcc")
    if found is None:
        raise UserError("the CUDA kernels need nvcc, and there is none", where="kernels", hint=NVCC_HINT)
    return found


def compiler_version() -> str:
    """How nvcc names itself."""
    told = subprocess.run([find_nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release ([\d.]+)", told)
    return f"nvcc {found[1]}" if found else "nvcc"


def compile_source(name: str, shape: Shape, architecture: str, format_: Format) -> tuple[bytes, str]:
    """The compiled kernels of ``name``, and what ptxas said about them."""
    if name == "nbits" and (shape.group % 32 or shape.k % shape.group or shape.k % 128):
        hint = "fill K up to a multiple of 128, and take groups of 32, 64 or 128"
        raise UserError(f"{shape.k} rows in groups of {shape.group} have no kernel", hint=hint)
    with tempfile.TemporaryDirectory(prefix="qcompile-") as folder:
        path = Path(folder) / f"kernels.{format_}"
        command = [find_nvcc(), "-O3", "-std=c++17", f"-arch={architecture}", f"-{format_}", "-Xptxas", "-v"]
        command += [*shape.macros(), "-o", str(path), str(FOLDER / f"{name}.cu")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or ["no reason given"]
            raise UserError(f"nvcc cannot compile {name}.cu: {lines[0][:300]}", where="kernels", hint=NVCC_HINT)
        return path.read_bytes(), done.stderr + done.stdout


def resources(said: str) -> dict[str, Resources]:
    """By kernel, from what ptxas said."""
    return {
        found[1]: Resources(int(found[4]), int(found[5] or 0), int(found[2]) + int(found[3]))
        for found in _USED.finditer(said)
    }


def machine_code(cubin: bytes) -> dict[str, list[str]]:
    """The instructions of each kernel, without operands; UserError where there is no disassembler."""
    tool = shutil.which("nvdisasm")
    if tool is None:
        raise UserError("there is no nvdisasm to read machine code with", where="kernels", hint=DISASSEMBLER_HINT)
    with tempfile.TemporaryDirectory(prefix="qcompile-") as folder:
        path = Path(folder) / "kernels.cubin"
        path.write_bytes(cubin)
        text = subprocess.run([tool, "-c", str(path)], capture_output=True, text=True, check=True).stdout
    parts = re.split(r"\.section\s+\.text\.(\w+)", text)
    pairs = zip(parts[1::2], parts[2::2], strict=True)
    line = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?\w+ )?([A-Z][\w.]*)", re.MULTILINE)
    return {name: line.findall(body) for name, body in pairs}


def ptx_instructions(ptx: str) -> dict[str, list[str]]:
    """The same of PTX."""
    parts = re.split(r"\.entry (\w+)\(", ptx)
    pairs = zip(parts[1::2], parts[2::2], strict=True)
    line = re.compile(r"^\s*(?:@!?%\w+\s+)?\{?\s*([a-z][\w:.]*)", re.MULTILINE)
    return {name: line.findall(body) for name, body in pairs}
