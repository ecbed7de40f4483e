"""ONNX Runtime on CPU: integer matmul kernels, float islands in the spellings that it runs fastest.

rewrite:  static linears -> MatMulIntegerToFloat, attention -> Attention-23, token tensors -> matrices
needs:    the canonical form; quantisation as ``graph/qdq.py`` writes it
ensures:  the function of the IR, up to float rounding; names, types and axes of inputs and outputs stay
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import ClassVar, Literal

import onnx_ir as ir
from onnx_ir.passes import common

from qcompile.backends.base import Kernel, spelled
from qcompile.backends.ort import (
    attention,
    cache,
    flatten,
    floats,
    inspection,
    linear,
    per_token,
    tables,
    weight_only,
)
from qcompile.backends.ort.names import name_products
from qcompile.backends.ort.native import build, chains
from qcompile.backends.ort.weight_only import Level
from qcompile.graph.functions import DOMAIN
from qcompile.graph.inline import inline
from qcompile.graph.integer import BODIES
from qcompile.graph.workspace import Workspace
from qcompile.pipeline import Context, Target
from qcompile.progress import warn

OPSET = 23  # Attention, RMSNormalization
IR_VERSION = 11
EXTERNAL_BYTES = 64 * 2**20  # a larger program keeps its tensors in model.onnx.data


@dataclasses.dataclass(frozen=True)
class OnnxRuntimeCpu:
    """The CPU execution provider of ONNX Runtime. Options:

    accuracy_level: of weight-only linears: 1 multiplies floats, 4 rounds their inputs to 8 bits, block by block
    kernels: 1 compiles fused kernels of the integer operators into a library beside the program
    """

    name: ClassVar[str] = "cpu"
    accuracy_level: Level = 1
    kernels: Literal[0, 1] = 0

    @property
    def target(self) -> Target:
        return Target(
            name=spelled(self),
            backend="onnxruntime",
            description="ONNX Runtime, CPU (x86-64 and arm64)",
            kernels=("MatMulIntegerToFloat", "QGemm", "MatMulNBits"),
        )

    def lower(self, model: ir.Model, ctx: Context) -> int:
        model.graph.sort()
        raise_opset(model)
        grown: dict[int, ir.Value] = {}
        caches = cache.rewrite(model, ctx.workspace, ctx.ledger)
        counts = {
            "caches": len(caches),
            "attentions": attention.rewrite(model, ctx.workspace, ctx.ledger, caches),
            "nodes in rank 2": flatten.rewrite(model, ctx.workspace),
            "static linears": linear.rewrite_static(model, ctx.workspace, ctx.ledger),
            "per-token linears": per_token.rewrite(model, ctx.workspace, ctx.ledger, grown),
            "weight-only linears": weight_only.rewrite(model, ctx.workspace, ctx.ledger, self.accuracy_level, grown),
            "tables": tables.rewrite(model, ctx.workspace, ctx.ledger, grown),
            "float operators": floats.rewrite(model),
        }
        facts = ctx.ledger.current.facts
        if self.kernels:
            facts["kernels compiler"] = build.compiler_version()
            counts["chains"] = chains.rewrite(model, ctx.workspace)
            if not any(node.domain == DOMAIN and node.op_type in BODIES for node in model.graph):
                warn("kernels=1 changed nothing: only int_only writes operators that have kernels")
        tidy(model, ctx.workspace, BODIES if self.kernels else ())
        name_products(model)
        facts["lowered"] = counts
        return sum(counts.values())

    def kernels_of(self, model: Path) -> list[Kernel]:
        return inspection.kernels(model)

    def package(self, model: ir.Model, folder: Path) -> None:
        model.ir_version = IR_VERSION
        initializers = model.graph.initializers
        held = {name: value.const_value for name, value in initializers.items() if value.const_value is not None}
        path = folder / "model.onnx"
        if model.functions:
            build.write_library(folder)
        if sum(tensor.nbytes for tensor in held.values()) > EXTERNAL_BYTES:
            ir.save(model, path, external_data="model.onnx.data")
            return
        try:
            ir.external_data.load_to_model(model)
            ir.save(model, path)
        finally:
            for name, tensor in held.items():
                initializers[name].const_value = tensor


def raise_opset(model: ir.Model) -> None:
    """Declare the operator sets that the lowering writes."""
    if model.opset_imports.get("", 0) < OPSET:
        model.opset_imports[""] = OPSET
        model.graph.opset_imports[""] = OPSET
    for imports in (model.opset_imports, model.graph.opset_imports):
        imports.setdefault("com.microsoft", 1)


def tidy(model: ir.Model, workspace: Workspace, kept: Collection[str]) -> None:
    """Remove what nothing reads; write the functions of the project out, but for those that have a kernel."""
    common.RemoveUnusedNodesPass()(model)
    inline(model, workspace, kept)
    for function in model.functions.values():
        function.opset_imports[""] = model.opset_imports[""]  # their operators are the same in both
    common.RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]
    common.RemoveUnusedNodesPass()(model)
    common.NameFixPass()(model)
    if model.functions:
        return
    for imports in (model.opset_imports, model.graph.opset_imports):
        imports.pop(DOMAIN, None)
