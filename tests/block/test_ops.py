"""Every operator that can be learned through computes what ONNX Runtime computes, one node at a time."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from qcompile.block.fx import to_torch
from qcompile.block.ops import OPS, fake_quantize_per_token
from qcompile.graph.functions import DOMAIN, use
from tests.graph.models import session, spelled

TOLERANCE = 2e-6  # relative to the largest output; measured: at most 6e-7


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


@dataclasses.dataclass(frozen=True)
class Case:
    """One call on x (2, 3, 4) float, with constants; ``many``: the outputs that it gives."""

    call: str
    constants: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    x: np.ndarray = dataclasses.field(default_factory=lambda: random(2, 3, 4))
    result: str = "float"
    many: int = 1


F2 = random(2, 3, 4, seed=1)
ROW = random(4, seed=2)
IMAGE = random(2, 4, 7, 6)
FLAGS = {"f": random(2, 3, 4, seed=3) > 0}
COUNTS = {"i": np.random.default_rng(4).integers(-9, 9, (2, 3, 4)), "j": ints(3)}

CASES: list[Case] = [
    *(Case(f"{op} (x)") for op in (
        "Abs", "Ceil", "Cos", "Dropout", "Elu <alpha = 0.7>", "Elu", "Erf", "Exp", "Floor", "Gelu",
        'Gelu <approximate = "tanh">', "HardSigmoid <alpha = 0.3, beta = 0.4>", "HardSwish", "Identity",
        "LeakyRelu <alpha = 0.2>", "Mish", "Neg", "Reciprocal", "Relu", "Round", "Sigmoid", "Sign", "Sin", "Softplus",
        "Tanh", "Softmax", "Softmax <axis = 1>", "LogSoftmax <axis = 0>", "Flatten", "Flatten <axis = -1>",
        "Transpose", "Transpose <perm = [1, 2, 0]>",
    )),
    Case("Log (x)", x=np.abs(random(2, 3, 4))),
    Case("Sqrt (x)", x=np.abs(random(2, 3, 4))),
    *(Case(f"{op} (x, c)", {"c": F2}) for op in ("Add", "Div", "Max", "Min", "Mul", "Sub", "Sum")),
    Case("Sum (x, c, r)", {"c": F2, "r": ROW}),
    Case("Pow (x, c)", {"c": np.full((), 3, np.float32)}),
    Case("Clip (x, c, d)", {"c": np.array(-0.3, np.float32), "d": np.array(0.4, np.float32)}),
    Case("Clip (x, , d)", {"d": np.array(0.4, np.float32)}),
    *(Case(f"{op} (x, c)", {"c": F2}, result="bool")
      for op in ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")),
    *(Case(f"{op} (g, f)", FLAGS | {"g": F2 > 0}, result="bool") for op in ("And", "Or", "Xor")),
    Case("Not (f)", FLAGS, result="bool"),
    Case("IsNaN (x)", x=np.array([[1, np.nan]], np.float32), result="bool"),
    Case("Where (f, x, c)", FLAGS | {"c": F2}),
    Case("Div (i, j)", COUNTS, result="int64"),
    Case("Mod (i, j)", COUNTS, result="int64"),
    Case("Mod <fmod = 1> (i, j)", COUNTS, result="int64"),
    *(Case(f"{op} (x{axes})", {"a": ints(1, -1)}) for axes in (", a", "")
      for op in ("ReduceL2", "ReduceLogSumExp", "ReduceMax", "ReduceMean <keepdims = 0>", "ReduceMin", "ReduceSum",
                 "ReduceSumSquare")),
    Case("ReduceSum <noop_with_empty_axes = 1> (x)"),
    Case("ArgMax <axis = 1> (x)", result="int64"),
    Case("ArgMin <axis = -1, keepdims = 0> (x)", result="int64"),
    Case("MatMul (x, w)", {"w": random(4, 5)}),
    Case("Gemm <alpha = 0.5, beta = 2.0, transB = 1> (x, w, b)", {"w": random(5, 4), "b": random(5)}, random(3, 4)),
    Case("Gemm <transA = 1> (x, w)", {"w": random(3, 5)}, random(3, 4)),
    Case('Einsum <equation = "abc,cd->adb"> (x, w)', {"w": random(4, 5)}),
    Case("Conv <strides = [2, 1], pads = [1, 0, 0, 2], dilations = [1, 2], group = 2> (x, w, b)",
         {"w": random(6, 2, 3, 2), "b": random(6)}, IMAGE),
    *(Case(f'Conv <strides = [3, 2], auto_pad = "{pad}"> (x, w)', {"w": random(6, 4, 4, 3)}, IMAGE)
      for pad in ("SAME_UPPER", "SAME_LOWER", "VALID")),
    Case("Conv (x, w)", {"w": random(6, 3, 2)}),
    Case("BatchNormalization <epsilon = 0.1> (x, s, b, m, v)",
         {"s": random(3), "b": random(3), "m": random(3), "v": np.abs(random(3))}),
    Case("GroupNormalization <num_groups = 2, epsilon = 0.1> (x, s, b)", {"s": random(4), "b": random(4)}, IMAGE),
    Case("LayerNormalization <epsilon = 0.01> (x, s, b)", {"s": ROW, "b": random(4)}),
    Case("LayerNormalization <axis = 1> (x, s)", {"s": random(3, 4)}),
    Case("Cast <to = 7> (x)", x=random(2, 3) * 5, result="int64"),
    Case("CastLike (i, x)", COUNTS),
    Case("Concat <axis = 1> (x, c, x)", {"c": F2}),
    Case("Gather <axis = -1> (x, i)", {"i": np.array([[0, -1], [2, 1]])}),
    Case("Gather (x, i)", {"i": np.array(-1)}),
    Case("Gather (t, i)", {"t": random(99, 3), "i": np.arange(-70, 70).reshape(2, 70) % 99}),
    Case("GatherElements <axis = 1> (x, i)", {"i": np.array([[[0, -1, 2, 1]], [[1, 1, 0, -3]]])}),
    Case("GatherND (x, i)", {"i": np.array([[0, 1], [1, -1]])}),
    Case("GatherND <batch_dims = 1> (x, i)", {"i": np.array([[[1, 0]], [[2, -1]]])}),
    Case("ScatterElements <axis = 1> (x, i, u)", {"i": np.array([[[0, -1]], [[1, 2]]]), "u": random(2, 1, 2)}),
    Case('ScatterElements <reduction = "add"> (x, i, u)', {"i": np.zeros((2, 1, 2), np.int64), "u": random(2, 1, 2)}),
    Case("ScatterND (x, i, u)", {"i": np.array([[0, 1], [1, 2]]), "u": random(2, 4)}),
    Case('ScatterND <reduction = "add"> (x, i, u)', {"i": np.array([[0, 1], [0, 1]]), "u": random(2, 4)}),
    Case("Pad (x, p)", {"p": ints(0, 1, 2, 1, 0, -1)}),
    Case("Pad (x, p, v, a)", {"p": ints(1, 2, 0, 1), "v": np.array(3, np.float32), "a": ints(-1, 0)}),
    Case("CumSum (x, a)", {"a": np.array(1)}),
    Case("CumSum <exclusive = 1, reverse = 1> (x, a)", {"a": np.array(-1)}),
    Case("Trilu <upper = 0> (x, k)", {"k": np.array(-1)}),
    Case("Trilu (x)"),
    Case("OneHot <axis = 1> (i, d, v)", {"i": np.array([[0, -1], [2, 1]]), "d": np.array(3), "v": random(2)}),
    Case("NonZero (f)", FLAGS, result="int64"),
    Case("TopK <axis = 1> (x, k)", {"k": ints(2)}, many=2),
    Case("TopK <largest = 0> (x, k)", {"k": ints(3)}, many=2),
    Case("Split <axis = 2> (x, n)", {"n": ints(1, 3)}, many=2),
    Case("Split <axis = 2, num_outputs = 3> (x)", many=3, x=random(2, 3, 8)),
    Case("Reshape (x, n)", {"n": ints(0, -1)}),
    Case("Reshape <allowzero = 1> (x, n)", {"n": ints(0, 5)}, random(0, 4)),
    Case("Expand (x, n)", {"n": ints(5, 1, 3, 1)}),
    Case("Tile (x, n)", {"n": ints(1, 2, 3)}),
    Case("Squeeze (x)", x=random(1, 3, 1)),
    Case("Squeeze (x, a)", {"a": ints(-1)}, random(1, 3, 1)),
    Case("Unsqueeze (x, a)", {"a": ints(-1, 0)}),
    Case("Slice (x, b, e)", {"b": ints(0, 1), "e": ints(9, -1)}),
    Case("Slice (x, b, e, a, s)", {"b": ints(-1, 0), "e": ints(-99, 4), "a": ints(1, -1), "s": ints(-2, 2)}),
    Case("Shape <start = 1> (x)", result="int64"),
    Case("Size (x)", result="int64"),
    Case("Range (b, e, s)", {"b": np.array(9), "e": np.array(2), "s": np.array(-3)}, result="int64"),
    Case("ConstantOfShape <value = float[1] {2.5}> (n)", {"n": ints(2, 3)}),
    Case("ConstantOfShape (n)", {"n": ints(2, 3)}),
    *(Case(f"DequantizeLinear <axis = {axis}, block_size = {block}> (c, s, z)", {
        "c": np.random.default_rng(0).integers(-128, 128, (6, 4)).astype(np.int8),
        "s": np.abs(random(*shape)) + 0.1, "z": np.random.default_rng(1).integers(-9, 9, shape).astype(np.int8)})
      for axis, block, shape in ((0, 0, (6,)), (1, 0, (4,)), (0, 4, (2, 4)), (1, 0, ()))),
]  # fmt: skip


def run_both(path: Path, x: np.ndarray) -> list[tuple[np.ndarray, torch.Tensor]]:
    expected = session(path).run(None, {"x": x})
    graph = to_torch(ir.load(path))
    actual = graph.run({"x": torch.from_numpy(x)})
    return list(zip(expected, (actual[name] for name in graph.outputs), strict=True))


def check(path: Path, x: np.ndarray) -> None:
    for expected, actual in run_both(path, x):
        assert tuple(actual.shape) == expected.shape
        assert actual.numpy().dtype == expected.dtype
        if expected.size:
            size = max(float(np.abs(expected).max()), 1e-30)
            assert np.abs(actual.numpy().astype(np.float64) - expected).max() / size < TOLERANCE


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.call)
def test_an_operator_equals_onnxruntime(case: Case, tmp_path: Path) -> None:
    shape = ", ".join(f"d{i}" for i in range(case.x.ndim))
    names = [f"y{i}" for i in range(case.many)]
    types = [case.result, "int64"] if case.call.startswith("TopK") else [case.result] * case.many
    outputs = ", ".join(f"{t}[] {name}" for t, name in zip(types, names, strict=True))
    text = f"m (float[{shape}] x) => ({outputs}) {{ {', '.join(names)} = {case.call} }}"
    path = spelled(tmp_path / "m.onnx", text, case.constants)
    model = ir.load(path)
    for value in model.graph.outputs:
        value.shape = None  # as many axes as there are
    ir.save(model, path)
    check(path, case.x)


def test_every_operator_of_the_table_has_a_case() -> None:
    tested = {case.call.split(" ", 1)[0] for case in CASES} | {"QuantizeLinear"}
    assert {name for domain, name in OPS if not domain} == tested


def own_model(path: Path, call: str, x: np.ndarray, constants: dict[str, np.ndarray]) -> Path:
    """A model of one of the project's functions, run by ONNX Runtime through its body."""
    shape = ", ".join(f"d{i}" for i in range(x.ndim))
    name = call.split(" ", 1)[0]
    header = f'<ir_version: 10, opset_import: ["" : 21, "{DOMAIN}" : 1]>'
    text = f"{header} m (float[{shape}] x) => (float[{shape}] y) {{ y = {DOMAIN}.{call} }}"
    model = ir.from_onnx_text(text)
    for key, array in constants.items():
        model.graph.register_initializer(ir.Value(name=key, const_value=ir.tensor(array, name=key)))
        for node in model.graph:
            for index, value in enumerate(node.inputs):
                if value is not None and value.name == key:
                    node.replace_input_with(index, model.graph.initializers[key])
    use(model, name)
    ir.save(model, path)
    return path


HEADS = {"k": random(2, 2, 5, 4, seed=5), "v": random(2, 2, 5, 4, seed=6), "b": random(2, 1, 3, 5, seed=7)}


@pytest.mark.parametrize(
    ("call", "x", "constants"),
    [
        ("Silu (x)", random(2, 3, 4), {}),
        ("RMSNormalization <epsilon = 0.01> (x, s)", random(2, 3, 4), {"s": ROW}),
        ("RotaryEmbedding (x, c, s)", random(2, 2, 3, 4), {"c": random(3, 4, seed=5), "s": random(3, 4, seed=6)}),
        ("Attention <scale = 0.4> (x, k, v, b)", random(2, 2, 3, 4), HEADS),
        ("GroupedAttention <scale = 0.4, groups = 3> (x, k, v, b)", random(2, 6, 3, 4), HEADS),
        ("ClipTokens <reach = 0.8> (x)", random(50, 40) * 9, {}),
        ("RotateBlocks (x, matrix)", random(2, 3, 12), {"matrix": random(4, 4, seed=5)}),
        ("FakeQuantizePerToken <levels = 15.0> (x)", random(50, 40) * 9, {}),
        ("FakeQuantizePerToken <levels = 255.0> (x)", np.abs(random(50, 40)) + 1, {}),
        ("FakeQuantizePerTokenSymmetric <levels = 7.0> (x)", random(50, 40), {}),
    ],
    ids=lambda item: item if isinstance(item, str) else "",
)
def test_an_own_operator_equals_its_body(
    call: str, x: np.ndarray, constants: dict[str, np.ndarray], tmp_path: Path
) -> None:
    check(own_model(tmp_path / "m.onnx", call, x, constants), x)


@pytest.mark.parametrize("codes", [np.uint8, np.int8])
def test_static_quantisation_equals_onnxruntime_and_passes_gradients(codes: Any, tmp_path: Path) -> None:
    text = """m (float[a, 4] x) => (float[a, 4] y) {
        c = QuantizeLinear <axis = 1> (x, s, z) y = DequantizeLinear <axis = 1> (c, s, z) }"""
    constants = {"s": np.array([0.1, 0.02, 0.003, 0.5], np.float32), "z": np.array([3, 0, 100, 9], codes)}
    path = spelled(tmp_path / "m.onnx", text, constants)
    x = random(90, 4) * 3
    check(path, x)
    graph, leaf = to_torch(ir.load(path)), torch.from_numpy(x).requires_grad_()
    y = graph.run({"x": leaf})["y"]
    (slope,) = torch.autograd.grad(y.sum(), leaf)
    inside = (y - leaf).abs() <= torch.from_numpy(constants["s"]) / 2 + 1e-6
    assert torch.equal(slope != 0, inside)
    assert 0.1 < float(inside.float().mean()) < 0.9


def test_the_grid_of_a_token_follows_its_extremes() -> None:
    """Stretching the row stretches its result: the gradient along x is the result itself."""
    x = torch.from_numpy(random(5, 9)).double().requires_grad_()
    y = fake_quantize_per_token(x, levels=15.0)
    (slope,) = torch.autograd.grad((y * y.detach()).sum(), x)
    assert (slope * x).sum().item() == pytest.approx(y.square().sum().item(), rel=1e-9)
