"""The target ``cuda``: a folder that a machine with an NVIDIA GPU runs.

rewrite:  what the chosen runtime wants: ``native`` (TVM and nvcc, the driver alone runs it), ``ort`` (ONNX Runtime)
needs:    no GPU
ensures:  see the routes
"""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar, Literal

from qcompile.backends.base import Routed, spelled
from qcompile.backends.cuda.native import Native
from qcompile.backends.cuda.ort import Ort
from qcompile.pipeline import Target


@dataclasses.dataclass(frozen=True)
class Cuda(Routed):
    """Options:

    arch: of the GPU: sm_80 for Ampere and Ada (A100, RTX 30 and 40), sm_90 for Hopper (H100, H200)
    runtime: tvm makes machine code that needs CUDA's driver alone; onnxruntime a float16 model for its CUDA provider
    """

    name: ClassVar[str] = "cuda"
    arch: Literal["sm_80", "sm_90"] = "sm_80"
    runtime: Literal["tvm", "onnxruntime"] = "tvm"

    @functools.cached_property
    def route(self) -> Native | Ort:
        return Native(self.arch) if self.runtime == "tvm" else Ort()

    @property
    def target(self) -> Target:
        return Target(
            name=spelled(self), backend=self.runtime, description=self.route.description, kernels=self.route.kernels
        )
