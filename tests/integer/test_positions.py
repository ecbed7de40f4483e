"""Cosines of positions as tables: equal to the float graph's, for every layout of the positions."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qcompile.calibration.runner import open_session
from qcompile.integer.positions import PLACES, NoTable, factors
from tests.integer.graphs import Array, emitter, parsed
from tests.integer.programs import compiled

COUNT = 50
FREQUENCIES = np.geomspace(1, 1e-3, 4).astype(np.float32)
CONSTANTS = {
    "row": FREQUENCIES[None, None], "column": FREQUENCIES[None, :, None], "flat": FREQUENCIES, "axis1": np.array([1]),
    "axis2": np.array([2]), "zero": np.int64(0), "one": np.int64(1), "last": np.int64(1), "half": np.float32(0.5),
    "first": np.array([0, 1]),
}  # fmt: skip
TURNED = "e = Concat <axis = -1> (a, a) c = Cos (e) "
LAYOUTS = {
    "rows of a batch": ("int64[B, S] p", "f = Cast <to = 1> (p) u = Unsqueeze (f, axis2) a = Mul (u, row) "
                        + TURNED + "y = Unsqueeze (c, axis1)"),
    "a row for all": ("int64[1, S] p", "f = Cast <to = 1> (p) u = Unsqueeze (f, axis2) a = Mul (u, row) "
                      + TURNED + "y = Unsqueeze (c, axis1)"),
    "a product of a column and a row": ("int64[B, S] p", "n = Unsqueeze (p, axis1) f = Cast <to = 1> (n) "
                                        "m = MatMul (column, f) a = Transpose <perm = [0, 2, 1]> (m) "
                                        + TURNED + "y = Unsqueeze (c, axis1)"),
    "scaled": ("int64[B, S] p", "f = Cast <to = 1> (p) h = Mul (f, half) u = Unsqueeze (h, axis2) a = Mul (u, row) "
               + TURNED + "y = Unsqueeze (c, axis1)"),
    "one axis": ("int64[S] p", "f = Cast <to = 1> (p) u = Unsqueeze (f, axis1) a = Mul (u, flat) " + TURNED
                 + "y = Unsqueeze (c, first)"),
}  # fmt: skip


def ran(port: str, nodes: str, positions: Array) -> tuple[Array, Array]:
    """The float graph's factors, and the table's."""
    model = parsed(f"g ({port}) => (float[A, C, D, E] y) {{ {nodes} z = Identity (y) }}", CONSTANTS)
    with emitter(model) as emit:
        wanted = model.graph[-1].inputs[0]
        assert wanted is not None
        made = factors(wanted, emit, COUNT)
        model.graph.outputs[:] = [wanted, made]
        ir.external_data.load_to_model(model)
        session = open_session(ir.to_proto(model).SerializeToString(), threads=1)
    found = session.run(None, {"p": positions})
    return found[0], found[1]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_table_holds_what_the_graph_computes(layout: str) -> None:
    port, nodes = LAYOUTS[layout]
    rows = np.random.default_rng(0).integers(0, COUNT, (3, 11))
    positions = rows if "B" in port else rows[:1] if "[1" in port else rows[0]
    real, table = ran(port, nodes, positions)
    assert table.dtype == np.int32
    np.testing.assert_allclose(np.broadcast_to(table, real.shape) * 2.0**-PLACES, real, rtol=0, atol=2**-PLACES)


def test_a_position_beyond_the_table_counts_as_the_last() -> None:
    port, nodes = LAYOUTS["rows of a batch"]
    _, table = ran(port, nodes, np.array([[COUNT - 1, COUNT, 10**6, 0, -5]]))
    table = table.reshape(5, -1)
    assert (table[0] == table[1]).all() and (table[0] == table[2]).all() and (table[3] == table[4]).all()


@pytest.mark.parametrize(
    ("port", "nodes", "reason"),
    [
        ("float[B, S] p", "u = Unsqueeze (p, axis2) a = Mul (u, row) y = Cos (a)", "come from the input 'p'"),
        ("int64[B, S] p", "f = Cast <to = 1> (p) q = Add (p, one) g = Cast <to = 1> (q) u = Mul (f, g) "
         "v = Unsqueeze (u, axis2) a = Mul (v, row) y = Cos (a)", "come from 2 tensors"),
        ("int64[B, S] p", "f = Cast <to = 1> (p) k = CumSum (f, one) u = Unsqueeze (k, axis2) a = Mul (u, row) "
         "y = Cos (a)", "depend on how many"),
        ("int64[B, S] p", "f = Cast <to = 1> (p) t = ReduceMax <keepdims = 1> (f, axis1) d = Div (f, t) "
         "u = Unsqueeze (d, axis2) a = Mul (u, row) y = Cos (a)", "depend on how many"),
        ("int64[B, S] p", "f = Cast <to = 1> (p) t = ReduceMax <keepdims = 1> (f, axis1) y = Cos (t)",
         "no row for each"),
    ],
)  # fmt: skip
def test_what_is_no_function_of_one_position_is_refused(port: str, nodes: str, reason: str) -> None:
    with pytest.raises(NoTable) as error:
        ran(port, nodes, np.zeros((2, 5), np.int64))
    assert reason in str(error.value)


def test_every_layer_turns_by_the_same_two_tables() -> None:
    nodes = onnx.load(compiled("llama", "w8a8_static").folder / "model.onnx", load_external_data=False).graph.node
    tables = [node.input[0] for node in nodes if node.op_type == "Gather" and ".table" in node.input[0]]
    assert len(tables) == len(set(tables)) == 2
