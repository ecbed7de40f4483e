"""The target ``webgpu``: a program as WGSL and its plan; nothing in the folder runs it.

needs:    TVM; no 64-bit numbers but indices, so no integer-only program
ensures:  what ``backends/gpu`` does. A shader binds the tensors of a launch from 0 on, in order, and behind them one
          uniform buffer of 32-bit numbers: those of the launch, then the number of its blocks less one. Inputs and
          outputs of int64 are int32
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import onnx_ir as ir

from qcompile.backends.gpu.target import STAND_IN, GpuTarget
from qcompile.backends.tvm.program import FILE
from qcompile.backends.webgpu import narrow, wgsl
from qcompile.errors import UserError
from qcompile.pipeline import Arrays

SHADERS = "shaders"
UNRUN = f"{SHADERS}/: source only, neither compiled nor run here: no browser, no GPU"
_WIDE = {"bool": "int32", "int8": "int32", "uint8": "uint32"}


@dataclasses.dataclass(frozen=True)
class WebGpu(GpuTarget):
    """WGSL, a shader a kernel."""

    name: ClassVar[str] = "webgpu"
    description: ClassVar[str] = "a folder for browsers' GPUs: WGSL and a plan of launches; source only"

    def package(self, model: ir.Model, folder: Path) -> None:
        narrowed = model.clone()
        narrow.narrow(narrowed)
        super().package(narrowed, folder)
        self.held["model"] = model

    def write_source(self, source: str, folder: Path) -> None:
        from qcompile.backends.gpu import package

        described = json.loads((folder / FILE).read_text(encoding="utf-8"))
        (folder / SHADERS).mkdir()
        for kernel in wgsl.kernels(source):
            calls = [launch for launch in described["launches"] if launch["kernel"] == kernel.name]
            kernel = wgsl.merged(kernel, _bound_once(described, calls))
            packed = [place for place in kernel.bytewise if _is_given(described, calls, place)]
            text = wgsl.written(kernel, packed)
            (folder / SHADERS / f"{wgsl.name_of(kernel.name)}.wgsl").write_text(text, encoding="utf-8")
        for launch in described["launches"]:
            launch["kernel"] = wgsl.name_of(launch["kernel"])
        for number, slot in enumerate(described["slots"]):
            if not _bytes_given(described, number):
                slot["dtype"] = _WIDE.get(slot["dtype"], slot["dtype"])
        package.save(described, folder)

    def facts(self, folder: Path, feeds: Iterable[Arrays]) -> dict[str, Any]:
        shaders = sorted(f"{SHADERS}/{path.name}" for path in (folder / SHADERS).iterdir())
        return self.shipped(folder, *shaders) | {"run": [STAND_IN], "not_run": [UNRUN]}


def _bound_once(described: Mapping[str, Any], calls: Sequence[dict[str, Any]]) -> dict[int, int]:
    """Takes out of ``calls`` what they pass twice; the places of both, by the second."""
    found: dict[int, int] = {}
    first = [_memory(described, one) for kind, one in calls[0]["arguments"] if kind == "tensor"]
    for place, held in enumerate(first):
        if first.index(held) < place:
            found[place] = first.index(held)
    for launch in calls:
        launch["arguments"] = [one for place, one in enumerate(launch["arguments"]) if place not in found]
    return found


def _memory(described: Mapping[str, Any], number: int) -> int:
    """The tensor whose memory tensor ``number`` is."""
    while described["slots"][number]["place"] == "view":
        number = described["slots"][number]["source"]
    return number


def _is_given(described: Mapping[str, Any], calls: Iterable[Mapping[str, Any]], place: int) -> bool:
    """Whether the tensor at ``place`` is bytes of the file or an input, which nothing writes."""
    given = {_bytes_given(described, launch["arguments"][place][1]) for launch in calls}
    if len(given) > 1:
        what = "a kernel reads bytes of the parameters in one place and bytes that the program writes in another"
        raise UserError(f"webgpu: {what}", hint="--target opencl or metal runs this program")
    return given == {True}


def _bytes_given(described: Mapping[str, Any], number: int) -> bool:
    return bool(described["slots"][_memory(described, number)]["place"] != "temporary")
