"""Matrix products on a GPU: which kernels there are for a shape, their source, and how many blocks they take."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

FOLDER = Path(__file__).parent
FEW = 8  # rows: up to so many, each is a product of its own; beyond, tensor cores
_FAMILIES = {"int8": "integer", "w4": "nbits"}
_THREADS = {"int8": (128, 256), "w4": (128, 128)}
_TILES = {"int8": (128, 128), "w4": (32, 128)}
_ROWS_COLUMNS = 8  # of a block of the kernels for few rows
_TYPES = {"int8": "int8_t", "uint8": "uint8_t", "float32": "float"}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel of a product: a block has ``rows`` x ``columns`` of the result; ``few``: it is for few rows."""

    name: str
    threads: int
    rows: int
    columns: int
    few: bool


@dataclasses.dataclass(frozen=True)
class Product:
    """x (m, k) of type ``x`` times a matrix (k, n) of int8 or of codes of 4 bits in groups of ``group`` rows.

    k, n: 0 where they are arguments, as m is; then there is a batch of products
    """

    kind: Literal["int8", "w4"]
    x: str
    k: int = 0
    n: int = 0
    group: int = 0

    @property
    def name(self) -> str:
        shape = f"_{self.k}x{self.n}" if self.k else ""
        return f"{self.kind}_{self.x}{shape}" + (f"_g{self.group}" if self.kind == "w4" else "")

    @property
    def kernels(self) -> tuple[Kernel, Kernel]:
        """For few rows, and for many."""
        few, many = _THREADS[self.kind]
        return (
            Kernel(f"{self.name}_rows", few, 1, _ROWS_COLUMNS, True),
            Kernel(f"{self.name}_gemm", many, *_TILES[self.kind], False),
        )

    @property
    def source(self) -> str:
        """Both kernels in CUDA C; ``library`` must come before."""
        sizes, given = ("int m, int n, int k", "m, n, k") if not self.k else ("int m", f"m, {self.n}, {self.k}")
        if self.kind == "int8":
            operands, names = "const int8_t *__restrict__ w, int32_t *__restrict__ y", "w, y"
        else:
            operands = (
                "const uint4 *__restrict__ codes, const float *__restrict__ scale, const uint8_t *__restrict__ zero, "
                "float *__restrict__ y"
            )
            names, given = "codes, scale, zero, y", f"{given}, {self.group}"
        return "".join(
            f'extern "C" __global__ void __launch_bounds__({kernel.threads}) {kernel.name}('
            f"const {_TYPES[self.x]} *__restrict__ x, {operands}, {sizes}) {{ "
            f"{_FAMILIES[self.kind]}::{'rows' if kernel.few else 'gemm'}(x, {names}, {given}); }}\n"
            for kernel in self.kernels
        )


def library(products: list[Product]) -> str:
    """The functions that the kernels of ``products`` call, in CUDA C; nothing for no products."""
    families = sorted({_FAMILIES[product.kind] for product in products})
    parts = [(FOLDER / f"{name}.cuh").read_text(encoding="utf-8") for name in ("warp", *families)] if products else []
    return "".join(part.replace("#pragma once\n", "").replace('#include "warp.cuh"\n', "") for part in parts)
