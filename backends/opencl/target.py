"""The target ``opencl``: a folder that a machine with an OpenCL platform runs.

needs:    TVM; no OpenCL
ensures:  what ``backends/gpu`` does; the folder needs an OpenCL 1.2 platform and nothing of TVM
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

from qcompile.backends.base import Program, open_program
from qcompile.backends.gpu.target import STAND_IN, GpuTarget
from qcompile.backends.opencl import driver
from qcompile.pipeline import Arrays

# A product and a sum stay apart, as everywhere else: a fused one would round once where ONNX rounds twice.
HEAD = "#pragma OPENCL FP_CONTRACT OFF\n"


@dataclasses.dataclass(frozen=True)
class OpenCl(GpuTarget):
    """OpenCL C, compiled by the platform when the program is opened."""

    name: ClassVar[str] = "opencl"
    description: ClassVar[str] = "a folder for OpenCL 1.2 devices: source, a plan of launches"

    def write_source(self, source: str, folder: Path) -> None:
        bytewise = source.replace("__global bool*", "__global uchar*")  # OpenCL leaves the size of a bool open
        (folder / driver.SOURCE).write_text(HEAD + bytewise, encoding="utf-8")

    def open(self, folder: Path) -> Program:
        """The program itself where there is a device, else the same translation for this processor."""
        device = driver.present()
        self.held["device"] = device
        return open_program(folder) if device else super().open(folder)

    def facts(self, folder: Path, feeds: Iterable[Arrays]) -> dict[str, Any]:
        device, source = self.held["device"], driver.SOURCE
        run = [f"{source} and its plan on {device}: the report's figures are theirs"] if device else [STAND_IN]
        not_run = [] if device else [f"{source}, for want of an OpenCL platform: {driver.INSTALL}"]
        return self.shipped(folder, source) | {"run": run, "not_run": not_run}
