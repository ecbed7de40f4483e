"""Float masks as flags: every spelling, and what is no mask."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qcompile.calibration.runner import open_session
from qcompile.integer.masks import NoFlags, flags_of, split
from tests.integer.graphs import Array, emitter, parsed

FAR = float(np.finfo(np.float32).min)
GRAPH = "g (bool[B, S] m, int64[B, S] i, float[B, S] f) => (float[B, S] y) { %s y = Identity (mask) }"
CONSTANTS = {
    "zero": np.float32(0), "far": np.float32(FAR), "one": np.float32(1), "half": np.float32(0.5),
    "near": np.float32(-3), "axis": np.array([1]), "rows": np.array([0, 1, -1]), "none": np.float32(-np.inf),
    "upper": np.triu(np.full((3, 3), FAR, np.float32), 1), "start": np.array([0]), "end": np.array([2]),
    "old": np.float32(-1e4), "shape": np.array([2, 1, 3, 3]), "mixed": np.array([[0, -1, FAR]], np.float32),
    "ragged": np.array([[0, np.nan, FAR]], np.float32),
}  # fmt: skip
FEEDS = {
    "m": np.array([[True, True, False], [True, False, False]]),
    "i": np.array([[1, 1, 0], [1, 0, 0]]),
    "f": np.zeros((2, 3), np.float32),
}


def ran(nodes: str, constants: dict[str, Array] | None = None) -> tuple[Array, Array]:
    """The float mask, and its flags."""
    model = parsed(GRAPH % nodes, {**CONSTANTS, **(constants or {})})
    with emitter(model) as emit:
        mask = model.graph[-1].inputs[0]
        assert mask is not None
        flags = flags_of(mask, emit)
        model.graph.outputs[:] = [mask, flags]
        flags.type = ir.TensorType(ir.DataType.BOOL)
        flags.name = flags.name or "flags"
        ir.external_data.load_to_model(model)
        session = open_session(ir.to_proto(model).SerializeToString(), threads=1)
    found = session.run(None, FEEDS)
    return found[0], found[1]


@pytest.mark.parametrize(
    "nodes",
    (
        "mask = Where (m, zero, far)",
        "mask = Where (m, far, zero)",
        "mask = Where (m, zero, none)",
        "mask = Where (m, zero, old)",
        "mask = Where (m, zero, zero)",
        "o = Where (m, zero, far) mask = Where (m, o, far)",
        "o = Where (m, zero, far) n = Not (m) mask = Where (n, far, o)",
        "o = Where (m, zero, far) u = Unsqueeze (o, axis) mask = Add (u, upper)",
        "u = Where (m, zero, far) v = Where (m, far, zero) mask = Add (u, v)",
        "c = Cast <to = 1> (m) s = Sub (one, c) mask = Mul (s, far)",
        "c = Cast <to = 1> (i) s = Sub (one, c) mask = Mul (far, s)",
        "c = Cast <to = 1> (i) u = Unsqueeze (c, axis) s = Sub (one, u) mask = Mul (s, far)",
        "c = Cast <to = 1> (i) u = Unsqueeze (c, axis) e = Expand (u, shape) s = Sub (one, e) mask = Mul (s, far)",
        "o = Where (m, zero, far) t = Transpose <perm = [1, 0]> (o) mask = Identity (t)",
        "o = Where (m, zero, far) mask = Slice (o, start, end, axis)",
        "o = Where (m, zero, far) mask = Concat <axis = 0> (o, upper)",
        "mask = Identity (upper)",
    ),
)
def test_flags_say_where_a_mask_is_zero(nodes: str) -> None:
    mask, flags = ran(nodes)
    np.testing.assert_array_equal(np.broadcast_to(flags, mask.shape), mask == 0)


@pytest.mark.parametrize(
    ("nodes", "reason"),
    [
        ("mask = Identity (f)", "the mask comes from the float input 'f'"),
        ("mask = Neg (f)", "Neg is in the way"),
        ("mask = Where (m, zero, near)", "neither 0 nor far below it"),
        ("mask = Identity (mixed)", "neither 0 nor far below it"),
        ("mask = Identity (ragged)", "neither 0 nor far below it"),
        ("c = Cast <to = 1> (m) mask = Mul (c, far)", "not (1 - mask) times"),
        ("c = Cast <to = 1> (m) s = Sub (half, c) mask = Mul (s, far)", "not (1 - mask) times"),
        ("c = Cast <to = 1> (m) s = Sub (one, c) mask = Mul (s, near)", "not (1 - mask) times"),
        ("s = Sub (one, f) mask = Mul (s, far)", "no Cast of flags"),
        ("c = Cast <to = 11> (f) d = Cast <to = 1> (c) s = Sub (one, d) mask = Mul (s, far)", "made of the float"),
        ("o = Where (m, zero, far) n = Where (m, zero, near) mask = Add (o, n)", "neither 0 nor far below it"),
    ],
)
def test_what_is_no_mask_is_refused_with_the_reason(nodes: str, reason: str) -> None:
    with pytest.raises(NoFlags) as error:
        ran(nodes)
    assert reason in str(error.value)


@pytest.mark.parametrize(
    ("nodes", "bias"),
    [
        ("mask = Identity (upper)", None),
        ("mask = Identity (mixed)", [[0, -1, 0]]),
        ("o = Where (m, zero, far) mask = Add (o, near)", -3),
        ("o = Where (m, zero, far) mask = Add (mixed, o)", [[0, -1, 0]]),
        ("mask = Where (m, zero, far)", None),
    ],
)
def test_a_constant_beside_the_mask_is_a_bias(nodes: str, bias: object) -> None:
    model = parsed(GRAPH % nodes, CONSTANTS)
    with emitter(model) as emit:
        flags, found = split(model.graph[-1].inputs[0], emit)  # type: ignore[arg-type]
    assert flags.shape is not None
    if bias is None:
        assert found is None
    else:
        np.testing.assert_array_equal(found, np.array(bias))


def test_a_bias_that_is_no_number_is_refused() -> None:
    model = parsed(GRAPH % "mask = Identity (ragged)", CONSTANTS)
    with emitter(model) as emit, pytest.raises(NoFlags, match="not finite"):
        split(model.graph[-1].inputs[0], emit)  # type: ignore[arg-type]
