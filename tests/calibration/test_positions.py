"""How long a sequence may be: by the position table, and by the row that the first token reads."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from qcompile.calibration.inputs import UNLIMITED, model_inputs
from qcompile.calibration.positions import position_limits
from qcompile.capture.onnx_file import load_onnx
from qcompile.graph.workspace import Workspace
from qcompile.models.architectures import cached_export

COUNT = "c = CumSum(input_ids, one)"


def limit(rows: int, positions: str, table: str = "position_embeddings.weight") -> int:
    """What a table of ``rows`` rows allows that ``p``, the last value of ``positions``, looks up."""
    numbers = {"zero": 0, "one": 1, "two": 2, "five": 5}
    constants = [f"{name} = Constant <value_int = {number}> ()" for name, number in numbers.items()]
    lines = "\n".join((*constants, positions.replace("; ", "\n"), "y = Gather(table, p)"))
    head = '<ir_version: 10, opset_import: ["": 21]> g (int64[batch, sequence] input_ids, int64 end) => (float[n] y)'
    proto = onnx.parser.parse_model(f"{head} {{ {lines} }}")
    proto.graph.node[-1].input[0] = table
    weights: dict[str, np.ndarray] = {table: np.zeros((rows, 4), np.float32), "held": np.arange(3, 9)}
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in weights.items())
    smallest, largest = position_limits(ir.from_proto(proto))
    assert smallest == largest
    return smallest


@pytest.mark.parametrize(
    ("positions", "first"),
    [
        ("p = Range(zero, end, one)", 0),
        ("p = Range(two, end, one)", 2),
        ("r = Range(zero, end, one); n = NonZero(input_ids); p = Add(r, n)", 0),
        ("r = Range(one, end, one); p = Unsqueeze(r, zero)", 1),
        ("p = Slice(held, zero, end)", 3),
        (f"{COUNT}; s = Sub(c, one); p = Add(s, two)", 2),
        (f"{COUNT}; p = Add(five, c)", 6),
        (f"{COUNT}; p = Mul(input_ids, c)", 1),
        ("p = Add(input_ids, two)", 2),
    ],
)
def test_rows_in_front_that_no_token_reads_do_not_count(positions: str, first: int) -> None:
    assert limit(66, positions) == 66 - first


def test_a_table_that_is_repeated_for_each_row_is_one_too() -> None:
    """GPT-J's sines."""
    text = """<ir_version: 10, opset_import: ["": 21]> g (int64[3] whole, int64[n] start) => (float[n] y) {
        t = Expand(table, whole)
        p = Tile(start, whole)
        y = GatherElements <axis = 1> (t, p)
    }"""
    proto = onnx.parser.parse_model(text)
    for array, allowed in ((np.zeros((1, 40, 4), np.float32), 40), (np.zeros((1, 40, 4), np.int64), UNLIMITED)):
        del proto.graph.initializer[:]
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, "table"))
        assert position_limits(ir.from_proto(onnx.shape_inference.infer_shapes(proto))) == (allowed, allowed)


def test_tables_of_a_fused_embedding_bound_positions_and_ids() -> None:
    text = """<ir_version: 10, opset_import: ["": 21, "com.microsoft": 1]> g (int32[b, s] ids) => (float[b, s, 4] y) {
        y, n = com.microsoft.EmbedLayerNormalization (ids, , words, places, , g, g)
    }"""
    proto = onnx.parser.parse_model(text)
    for name, shape in {"words": (30, 4), "places": (40, 4), "g": (4,)}.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(shape, np.float32), name))
    model = ir.from_proto(proto)
    assert position_limits(model) == (40, 40) and model_inputs(model)[0].vocabulary == 30


@pytest.mark.parametrize(("rows", "allowed"), [(512, 512), (514, 512), (2050, 2048), (50, 50)])
def test_the_size_tells_where_the_index_does_not(rows: int, allowed: int) -> None:
    assert limit(rows, "p = NonZero(input_ids)") == allowed


def test_other_tables_and_constant_positions_limit_nothing() -> None:
    positions = "p = Range(zero, end, one)"
    assert limit(32, positions, "relative_position_bias") == limit(32, positions, "words") == UNLIMITED
    assert limit(32, positions, "transformer.wpe.weight") == 32
    assert limit(32, "p = Identity(held)") == UNLIMITED


@pytest.mark.parametrize(
    ("name", "allowed"), [("bert", 64), ("gpt2", 64), ("opt", 64), ("roberta", 61), ("llama", UNLIMITED)]
)
def test_what_torch_exports_is_understood(name: str, allowed: int) -> None:
    with Workspace() as workspace:
        assert position_limits(load_onnx(cached_export(name), workspace)) == (allowed, allowed)
