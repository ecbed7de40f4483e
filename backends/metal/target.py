"""The target ``metal``: the source of a program and its plan; nothing here compiles or runs Metal.

needs:    TVM
ensures:  what ``backends/gpu`` does. A kernel takes its tensors as buffers from 0 on, in the order of the launch, and
          behind them one buffer with its numbers, 8 bytes each
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

from qcompile.backends.gpu.target import STAND_IN, GpuTarget
from qcompile.backends.tvm.program import FILE
from qcompile.errors import UserError
from qcompile.pipeline import Arrays

SOURCE = "program.metal"
LARGEST = 31  # buffers that a kernel may take
HEAD = "#include <metal_stdlib>\nusing namespace metal;\n\nunion __TVMArgUnion {\n int v_int[2];\n};\n"
UNRUN = (
    f"{SOURCE}: source only, neither compiled nor run: no Apple machine. Compile it with `xcrun -sdk macosx metal "
    "-fno-fast-math -ffp-contract=off`"
)


@dataclasses.dataclass(frozen=True)
class Metal(GpuTarget):
    """Metal source, for an app to compile."""

    name: ClassVar[str] = "metal"
    description: ClassVar[str] = "a folder for Apple's GPUs: Metal source and a plan of launches; source only"

    def write_source(self, source: str, folder: Path) -> None:
        _check(json.loads((folder / FILE).read_text(encoding="utf-8"))["launches"])
        (folder / SOURCE).write_text(joined(source), encoding="utf-8")

    def facts(self, folder: Path, feeds: Iterable[Arrays]) -> dict[str, Any]:
        return self.shipped(folder, SOURCE) | {"run": [STAND_IN], "not_run": [UNRUN]}


def joined(source: str) -> str:
    """Kernels that each have a head of their own, as one file with one head."""
    return HEAD + re.sub(r"\n{3,}", "\n\n", source.replace(HEAD, ""))


def _check(launches: Iterable[dict[str, Any]]) -> None:
    """UserError for a kernel that takes more buffers than Metal gives it."""
    for launch in launches:
        kinds = [kind for kind, _ in launch["arguments"]]
        if kinds.count("tensor") + (set(kinds) != {"tensor"}) > LARGEST:
            what = f"kernel '{launch['kernel']}' reads and writes more than Metal's {LARGEST} buffers"
            raise UserError(what, hint="--target opencl or cpu runs every program")
