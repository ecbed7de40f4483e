"""The lower bound counts the work of the matmuls, and nothing twice."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import TensorProto, helper

from qcompile import roofline
from qcompile.commands.bench import random_feeds
from tests.surface.plain import WIDTH, feeds


def test_linears_count_two_operations_for_each_token_and_weight(model: Path) -> None:
    work = roofline.work(model, feeds(batch=2, length=5))
    assert work.linear == 2 * 10 * (WIDTH * 4 * WIDTH * 2)
    assert work.attention == 0 and work.uncounted == {}
    assert work.shape[0] == 10


def test_products_of_activations_count_as_attention(tmp_path: Path) -> None:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3, 4, 5])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 3, 4, 4])
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["x", "t"], ["y"]),
    ]
    opset = helper.make_opsetid("", 21)
    proto = helper.make_model(helper.make_graph(nodes, "g", [x], [y]), opset_imports=[opset], ir_version=10)
    onnx.save(proto, tmp_path / "qk.onnx")
    work = roofline.work(tmp_path / "qk.onnx", random_feeds(tmp_path / "qk.onnx", 2, 4))
    assert work.linear == 0 and work.attention == 2 * (2 * 3 * 4 * 4) * 5


def test_rates_are_positive() -> None:
    measured = roofline.rates((8, 16, 16), threads=1)
    assert measured.fp32 > 1e6 and measured.u8s8 > 1e6
