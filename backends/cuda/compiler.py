"""nvcc on a program's source, in a folder of its own: PTX, machine code, and what it said of them. No GPU is needed."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from qcompile.backends.cuda.toolkit import NVCC_HINT, find_nvcc
from qcompile.errors import UserError

if TYPE_CHECKING:
    from qcompile.backends.tvm.kernels.cuda.build import Resources

SOURCE, PTX, CUBIN = "program.cu", "program.ptx", "program.cubin"
# Products and sums stay apart, as everywhere else: a fused one would round once where ONNX rounds twice.
OPTIONS = ("-O3", "-std=c++17", "-fmad=false", "-Xptxas", "-v")
COUNTED = {"dp4a": "dp4a.", "tensor cores": "mma.", "16-byte loads": "ld.global.nc.v4"}


def compile_source(source: str, architecture: str, folder: Path) -> dict[str, Resources]:
    """Write ``program.cu``, ``program.ptx`` and ``program.cubin`` into ``folder``; what each kernel takes."""
    from qcompile.backends.tvm.kernels.cuda import build

    nvcc, said = find_nvcc(), ""
    with tempfile.TemporaryDirectory(prefix="qcompile-") as scratch:
        place = Path(scratch)
        (place / SOURCE).write_text(source, encoding="utf-8")
        for name, made_of in ((PTX, SOURCE), (CUBIN, PTX)):
            command = [nvcc, *OPTIONS, f"-arch={architecture}", f"-{name.rpartition('.')[2]}", "-o", name, made_of]
            done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, check=False)
            said = done.stderr + done.stdout
            if done.returncode:
                lines = [one for one in said.splitlines() if "error" in one or "fatal" in one] or ["no reason given"]
                raise UserError(f"nvcc cannot compile {made_of}: {lines[0][:300]}", hint=NVCC_HINT)
        for name in (SOURCE, PTX, CUBIN):
            shutil.copyfile(place / name, folder / name)
    return build.resources(said)


def counted(ptx: str) -> dict[str, int]:
    """How often the instructions of ``COUNTED`` occur in ``ptx``."""
    from qcompile.backends.tvm.kernels.cuda import build

    every = [one for found in build.ptx_instructions(ptx).values() for one in found]
    return {name: sum(one.startswith(start) for one in every) for name, start in COUNTED.items()}
