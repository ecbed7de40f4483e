"""``cuda{runtime=onnxruntime}``: what is written for ONNX Runtime's CUDA provider, run by its CPU provider."""

from __future__ import annotations

import functools

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import qcompile
from qcompile.backends.cuda import provider
from qcompile.driver import CompiledModel
from qcompile.models.architectures import cached_export
from tests.integer.programs import texts


@functools.cache
def compiled(name: str, recipe: str) -> CompiledModel:
    target = "cuda{runtime=onnxruntime}"
    return qcompile.compile(cached_export(name), recipe=recipe, target=target, max_samples=4, max_length=16)


@pytest.mark.parametrize(
    ("name", "recipe", "kernel", "count"),
    (("bert", "w8a8_static", "MatMulInteger", 12), ("llama", "w4a16_g32", "MatMulNBits", 14)),
)
def test_it_is_float16_with_low_bit_kernels(name: str, recipe: str, kernel: str, count: int) -> None:
    made = compiled(name, recipe)
    graph = onnx.load(made.folder / "model.onnx").graph
    assert [node.op_type for node in graph.node].count(kernel) == count
    assert {tensor.data_type for tensor in graph.initializer} >= {onnx.TensorProto.FLOAT16}
    assert all(port.type.tensor_type.elem_type == onnx.TensorProto.FLOAT for port in graph.output)
    lowered = next(entry for entry in made.manifest["passes"] if entry["name"] == "lower")
    assert lowered["proof"]["sqnr_db"] > 40  # float16 against float32
    assert made.manifest["device"]["fallbacks"] == []
    assert any("CUDA provider, for want of a GPU" in line for line in made.manifest["device"]["not_run"])
    outputs = made.run(texts(2, 5))
    assert all(np.isfinite(array).all() for array in outputs.values())


def test_what_the_provider_lacks_is_told_by_node() -> None:
    graph = onnx.parser.parse_graph("""
        lacks (uint8[2, 4] x, int8[4, 3] w) => (int32[2, 3] y, uint8[2, 4] z) {
            y = MatMulInteger (x, w)
            one = Constant <value = uint8[1] {1}> ()
            z = BitShift <direction = "LEFT"> (x, one)
        }""")
    for node in graph.node:
        node.name = f"the {node.op_type}"
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)])
    found = provider.fallbacks(ir.serde.deserialize_model(model))
    assert [(one.node, one.operator) for one in found] == [
        ("the MatMulInteger", "MatMulInteger"), ("the BitShift", "BitShift"),
    ]  # fmt: skip
    assert "uint8" in found[0].reason and "no kernel of this operator" in found[1].reason
