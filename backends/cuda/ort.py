"""The target ``cuda`` through ONNX Runtime's CUDA provider: float16, MatMulNBits, int8 in MatMulInteger.

rewrite:  weight-only linears -> MatMulNBits, static linears -> MatMulInteger, the project's functions -> operators
needs:    no GPU; onnxruntime-gpu where it runs
ensures:  names, types and axes of inputs and outputs stay; what the provider would leave to the CPU is told by node
"""

from __future__ import annotations

import dataclasses
import platform
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import onnx_ir as ir

from qcompile.backends import onnxruntime_cpu
from qcompile.backends.base import Kernel, Program, open_program
from qcompile.backends.cuda import half, int8, provider
from qcompile.backends.ort import attention, floats, inspection, tables, weight_only
from qcompile.backends.ort.linear import is_product
from qcompile.backends.ort.names import name_products
from qcompile.environment import require_onnxruntime
from qcompile.pipeline import Arrays, Context

MODEL = "model.onnx"


@dataclasses.dataclass(frozen=True)
class Ort:
    """The route of ``model.onnx`` in float16."""

    description: ClassVar[str] = "ONNX Runtime on NVIDIA GPUs: float16 and the low-bit kernels of its CUDA provider"
    kernels: ClassVar[tuple[str, ...]] = ("MatMulNBits", "MatMulInteger")

    def lower(self, model: ir.Model, ctx: Context) -> int:
        require_onnxruntime()
        model.graph.sort()
        onnxruntime_cpu.raise_opset(model)
        grown: dict[int, ir.Value] = {}
        counts = {
            "attentions": attention.rewrite(model, ctx.workspace, ctx.ledger, chunks=False),
            "static linears": int8.rewrite_static(model, ctx.workspace, ctx.ledger),
            "weight-only linears": weight_only.rewrite(model, ctx.workspace, ctx.ledger, 1, grown),
            "tables": tables.rewrite(model, ctx.workspace, ctx.ledger, grown),
            "float operators": floats.rewrite(model),
        }
        onnxruntime_cpu.tidy(model, ctx.workspace, ())
        counts["casts"] = half.rewrite(model, ctx.workspace)
        name_products(model)
        ctx.ledger.current.facts["lowered"] = counts
        return sum(counts.values())

    def kernels_of(self, model: Path) -> list[Kernel]:
        return [inspection.described(node, {str(node.name): node}) for node in ir.load(model).graph if is_product(node)]

    def package(self, model: ir.Model, folder: Path) -> None:
        onnxruntime_cpu.OnnxRuntimeCpu().package(model, folder)

    def open(self, folder: Path) -> Program:
        return open_program(folder)

    def facts(self, folder: Path, feeds: Iterable[Arrays]) -> dict[str, Any]:
        model = _typed(folder / MODEL)
        left = provider.fallbacks(model)
        kinds = Counter(f"{one.operator}: {one.reason}" for one in left)
        version = require_onnxruntime().__version__
        ship = sorted(path.name for path in folder.glob(f"{MODEL}*"))
        return {
            "ship": ship,
            "bytes": sum((folder / name).stat().st_size for name in ship),
            "run": [f"{MODEL} by the CPU provider of ONNX Runtime {version} on {platform.machine()}: the report's "
                    "figures are its, and it has other kernels of float16"],
            "not_run": [
                "the CUDA provider, for want of a GPU",
                f"{len(left)} of {len(model.graph)} nodes would fall back to the CPU by the provider's published list",
                *(f"{count} of them {what}" for what, count in sorted(kinds.items())),
            ],
            "fallbacks": [dataclasses.asdict(one) for one in left],
        }  # fmt: skip


def _typed(path: Path) -> ir.Model:
    """The program with the types of its values."""
    from onnx_ir.passes import common

    model = ir.load(path)
    common.ShapeInferencePass()(model)
    return model
