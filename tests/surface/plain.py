"""A target that runs the IR as it is, and a tiny model: what the surface is tested with."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from qcompile.backends.base import Kernel
from qcompile.graph.provenance import layer_name
from qcompile.ledger import Preserves
from qcompile.pipeline import Context, Pass, Target

VOCABULARY, WIDTH = 32, 16


class Plain:
    """ONNX Runtime without a lowering."""

    target = Target("plain", "onnxruntime", "the program as it is")

    def lower(self, model: ir.Model, ctx: Context) -> int:
        return 0

    def kernels_of(self, model: Path) -> list[Kernel]:
        found = (node for node in ir.load(model).graph if node.op_type == "MatMul")
        return [
            {"site": layer_name(n), "kernel": "MatMul", "low_bit": False, "reason": "plain"} for n in found
        ]

    def package(self, model: ir.Model, folder: Path) -> None:
        ir.save(model, folder / "model.onnx", external_data="model.onnx.data")


def write_model(path: Path, *, scale: float = 1.0) -> Path:
    """Two linears behind a LayerNorm: input_ids, attention_mask [batch, seq] -> last_hidden_state."""
    generator = np.random.default_rng(0)

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        return numpy_helper.from_array(
            (scale * generator.standard_normal(shape) / 4).astype(np.float32), name
        )

    weights = [
        weight("table", VOCABULARY, WIDTH),
        weight("gain", WIDTH),
        weight("offset", WIDTH),
        weight("up.weight", WIDTH, 4 * WIDTH),
        weight("down.weight", 4 * WIDTH, WIDTH),
    ]
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["embedded"], "embed"),
        helper.make_node("Unsqueeze", ["attention_mask", "last"], ["column"], "column"),
        helper.make_node("Cast", ["column"], ["mask"], "cast", to=TensorProto.FLOAT),
        helper.make_node("Mul", ["embedded", "mask"], ["masked"], "masked"),
        helper.make_node("LayerNormalization", ["masked", "gain", "offset"], ["normed"], "norm", axis=-1),
        helper.make_node("MatMul", ["normed", "up.weight"], ["wide"], "up"),
        helper.make_node("Relu", ["wide"], ["active"], "act"),
        helper.make_node("MatMul", ["active", "down.weight"], ["last_hidden_state"], "down"),
    ]
    ids = [
        helper.make_tensor_value_info(n, TensorProto.INT64, ["batch", "seq"])
        for n in ("input_ids", "attention_mask")
    ]
    out = helper.make_tensor_value_info("last_hidden_state", TensorProto.FLOAT, ["batch", "seq", WIDTH])
    last = numpy_helper.from_array(np.array([2]), "last")
    graph = helper.make_graph(nodes, "tiny", ids, [out], [*weights, last])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, path)
    return path


def feeds(batch: int = 1, length: int = 6) -> dict[str, np.ndarray]:
    """One valid set of inputs, its last position padded."""
    ids = np.arange(batch * length).reshape(batch, length) % VOCABULARY
    mask = np.ones_like(ids)
    mask[:, -1] = 0
    return {"input_ids": ids, "attention_mask": mask}


@dataclasses.dataclass(frozen=True)
class OneOutlier(Pass):
    """An analysis that finds one site, for ``analyze``."""

    name: ClassVar[str] = "outliers"
    preserves: ClassVar[Preserves] = "analysis"

    def run(self, model: ir.Model, ctx: Context) -> int:
        ctx.ledger.record("norm:norm", largest=30.5, channel=7)
        ctx.ledger.skip("norm:other", "nothing reads it", "other_node")
        return 0
