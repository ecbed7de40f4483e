"""Compiles the CUDA kernels of a product, and reads what the compiler made of them. No GPU is needed."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Literal

from qcompile.backends.cuda.toolkit import NVCC_HINT, find_nvcc, installed
from qcompile.backends.tvm.kernels.cuda.products import Product, library
from qcompile.errors import UserError

ARCHITECTURES = ("sm_80", "sm_90")
Format = Literal["ptx", "cubin", "fatbin"]
DISASSEMBLER_HINT = "pip install nvidia-cuda-nvdisasm"
_USED = re.compile(r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) "
                   r"registers(?:[^\n]*?(\d+) bytes smem)?", re.DOTALL)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Resources:
    """What one thread or block of a kernel takes, and the bytes that did not fit its registers."""

    registers: int
    shared: int
    spilled: int


def compiler_version() -> str:
    """How nvcc names itself."""
    told = subprocess.run([find_nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release ([\d.]+)", told)
    return f"nvcc {found[1]}" if found else "nvcc"


def compile_product(product: Product, architecture: str, format_: Format) -> tuple[bytes, str]:
    """The compiled kernels of ``product``, and what ptxas said about them."""
    check(product)
    with tempfile.TemporaryDirectory(prefix="qcompile-") as folder:
        path = Path(folder) / f"kernels.{format_}"
        text = Path(folder) / "kernels.cu"
        text.write_text(library([product]) + product.source, encoding="utf-8")
        command = [find_nvcc(), "-O3", "-std=c++17", f"-arch={architecture}", f"-{format_}", "-Xptxas", "-v"]
        done = subprocess.run(
            [*command, "-o", str(path), str(text)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or ["no reason given"]
            raise UserError(f"nvcc cannot compile {product.name}: {lines[0][:300]}", where="CUDA", hint=NVCC_HINT)
        return path.read_bytes(), done.stderr + done.stdout


def check(product: Product) -> None:
    """UserError where there is no kernel for the shape of ``product``."""
    step = 16 if product.kind == "int8" else 32
    if product.k % step:
        hint = f"fill K up to a multiple of {step}"
        raise UserError(f"{product.k} rows of {product.kind} have no kernel", hint=hint)
    if product.kind == "w4" and product.group != product.k and (product.group % 32 or product.group < 32):
        hint = "take groups of a multiple of 32 rows, or whole columns"
        raise UserError(f"{product.k} rows in groups of {product.group} have no kernel", hint=hint)


def resources(said: str) -> dict[str, Resources]:
    """By kernel, from what ptxas said."""
    return {
        found[1]: Resources(int(found[4]), int(found[5] or 0), int(found[2]) + int(found[3]))
        for found in _USED.finditer(said)
    }


def machine_code(cubin: bytes) -> dict[str, list[str]]:
    """The instructions of each kernel, without operands; UserError where there is no disassembler."""
    tool = shutil.which("nvdisasm") or next(installed("nvdisasm"), None)
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
