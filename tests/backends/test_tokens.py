"""Token tensors as matrices, and attention on them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from tests.backends.ground import Feeds, graph, lower, normal

TOLERANCE = 2e-6
H, D = 4, 8
C = H * D


def post_norm() -> ir.Model:
    """A residual block whose first sum is an output as well."""
    text = f"""g (float[batch, seq, {C}] x) => (float[batch, seq, {C}] y, float[batch, seq, {C}] middle) {{
        p = MatMul(x, w)
        q = Add(p, b)
        middle = Add(q, x)
        y = LayerNormalization <axis = -1> (middle, gain, shift)
    }}"""
    return graph(text, w=normal(C, C), b=normal(C, seed=1), gain=normal(C, seed=2), shift=normal(C, seed=3))


def test_a_residual_norm_escapes_the_slow_fusion(tmp_path: Path) -> None:
    program = lower(post_norm(), tmp_path / "p")
    operators = program.operators()
    assert operators["LayerNormalization"] == operators["Gemm"] == 1
    assert "SkipLayerNormalization" not in operators
    for shape in ((1, 1), (3, 5)):
        assert program.difference({"x": normal(*shape, C)}) < TOLERANCE


def test_names_types_and_axes_of_the_interface_stay(tmp_path: Path) -> None:
    model = post_norm()
    before = [(v.name, v.dtype, str(v.shape)) for v in (*model.graph.inputs, *model.graph.outputs)]
    written = lower(model, tmp_path / "p").written.graph
    assert [(v.name, v.dtype, str(v.shape)) for v in (*written.inputs, *written.outputs)] == before


def test_tensors_of_different_lengths_are_not_added_as_matrices(tmp_path: Path) -> None:
    text = f"""g (float[batch, seq, {C}] x, float[1, seq, {C}] position) => (float[batch, seq, {C}] y) {{
        s = Add(x, position)
        n = LayerNormalization <axis = -1> (s, gain, shift)
        y = MatMul(n, w)
    }}"""
    model = graph(text, w=normal(C, C), gain=normal(C, seed=2), shift=normal(C, seed=3))
    program = lower(model, tmp_path / "p")
    assert program.difference({"x": normal(3, 5, C), "position": normal(1, 5, C, seed=1)}) < TOLERANCE


# --------------------------------------------------------------------------- attention

MASKS = {
    "none": "bias = Identity(zero)",
    "padding": """m1 = Unsqueeze(mask, pair) visible = Cast <to = 9> (m1)
        bias = Where(visible, zero, hidden)""",
    "causal": """size = Shape <start = 1, end = 2> (mask) scalar = Squeeze(size)
        places = Range(start, scalar, step)
        row = Unsqueeze(places, row_axes) column = Unsqueeze(places, column_axes)
        past = LessOrEqual(column, row)
        m1 = Unsqueeze(mask, pair) seen = Cast <to = 9> (m1)
        visible = And(past, seen)
        bias = Where(visible, zero, hidden)""",
}


def attention(
    mask: str, groups: int = 1, rotary: bool = False, transposed_keys: bool = False, hidden: float = -3.4e38
) -> ir.Model:
    """q, k, v as torch's exporter makes them: Reshape and Transpose around the project's function."""
    kind = "Attention" if groups == 1 else "GroupedAttention"
    extra = "" if groups == 1 else f", groups = {groups}"
    width = C // groups
    keys = "kt = Transpose <perm = [0, 2, 3, 1]> (k4) kh0 = Transpose <perm = [0, 1, 3, 2]> (kt)"
    turned = "qh = qcompile.RotaryEmbedding(qh0, cos, sin) kh = qcompile.RotaryEmbedding(kh0, cos, sin)"
    text = f"""g (float[batch, seq, {C}] q, float[batch, seq, {width}] k, float[batch, seq, {width}] v,
            int64[batch, seq] mask, float[batch, 1, seq, {D}] cos, float[batch, 1, seq, {D}] sin)
            => (float[batch, seq, {C}] y) {{
        {MASKS[mask]}
        q4 = Reshape(q, split) qh0 = Transpose <perm = [0, 2, 1, 3]> (q4)
        k4 = Reshape(k, kv_split) {keys if transposed_keys else "kh0 = Transpose <perm = [0, 2, 1, 3]> (k4)"}
        v4 = Reshape(v, kv_split) vh = Transpose <perm = [0, 2, 1, 3]> (v4)
        {turned if rotary else "qh = Identity(qh0) kh = Identity(kh0)"}
        c = qcompile.{kind} <scale = 0.3 {extra}> (qh, kh, vh, bias)
        ct = Transpose <perm = [0, 2, 1, 3]> (c)
        y = Reshape(ct, joined)
    }}"""
    numbers = {
        "split": [0, 0, H, D], "kv_split": [0, 0, H // groups, D], "joined": [0, 0, C], "pair": [1, 2],
        "row_axes": [0, 1, 3], "column_axes": [0, 1, 2],
    }  # fmt: skip
    scalars = {
        "start": np.int64(0),
        "step": np.int64(1),
        "zero": np.float32(0),
        "hidden": np.float32(hidden),
    }
    constants = {k: np.array(v, np.int64) for k, v in numbers.items()} | {k: np.array(v) for k, v in scalars.items()}
    return graph(text, **{name: array for name, array in constants.items() if name in text})


def sequences(batch: int, length: int, groups: int = 1, padded: str = "") -> tuple[Feeds, np.ndarray]:
    """Feeds whose last sample is padded, and which positions are real."""
    mask = np.ones((batch, length), np.int64)
    if padded == "right":
        mask[-1, length - length // 3 :] = 0
    if padded == "left":
        mask[-1, : length // 3] = 0
    angle = normal(batch, 1, length, D // 2, seed=9)
    tables = {"cos": np.cos(angle), "sin": np.sin(angle)}
    feeds: Feeds = {"q": normal(batch, length, C), "mask": mask}
    feeds |= {name: normal(batch, length, C // groups, seed=place) for place, name in enumerate("kv", 1)}
    return feeds | {n: np.concatenate([a, a], -1) for n, a in tables.items()}, mask.astype(bool)


@pytest.mark.parametrize("padded", ["", "left", "right"])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("mask", MASKS)
def test_attention_is_one_operator_with_nothing_around_it(mask: str, groups: int, padded: str, tmp_path: Path) -> None:
    program = lower(attention(mask, groups), tmp_path / "p")
    operators = program.operators()
    assert operators["Attention"] == (8 if mask == "causal" else 1)
    assert {"Transpose", "Softmax", "MatMul"}.isdisjoint(operators)
    assert [k["kernel"] for k in program.kernels] == ["Attention"]
    assert "softmax" in program.kernels[0]["reason"]
    for shape in ((1, 1), (2, 7), (2, 20)):
        feeds, keep = sequences(*shape, groups=groups, padded=padded)
        assert program.difference(feeds, keep) < TOLERANCE


def test_chunks_of_queries_hold_at_every_length(tmp_path: Path) -> None:
    program = lower(attention("causal"), tmp_path / "p")
    for length in range(1, 35):
        feeds, keep = sequences(2, length, padded="left")
        assert program.difference(feeds, keep) < TOLERANCE, length


def test_a_table_that_only_looks_rotary_is_left_to_the_function(tmp_path: Path) -> None:
    """cos and sin are inputs here: their halves need not be equal."""
    program = lower(attention("padding", rotary=True), tmp_path / "p")
    assert "RotaryEmbedding" not in program.operators()
    feeds, keep = sequences(3, 5, padded="right")
    assert program.difference(feeds, keep) < TOLERANCE


def test_heads_that_come_another_way_are_transposed(tmp_path: Path) -> None:
    program = lower(attention("padding", transposed_keys=True), tmp_path / "p")
    assert program.operators()["Attention"] == 1
    feeds, keep = sequences(3, 5, padded="right")
    assert program.difference(feeds, keep) < TOLERANCE


@pytest.mark.parametrize("batched", [False, True])
def test_rotary_tables_of_one_or_of_every_sample(batched: bool, tmp_path: Path) -> None:
    lead = "batch" if batched else "1"
    text = f"""g (float[batch, seq, {C}] q, float[{lead}, 1, seq, {D // 2}] angle)
            => (float[batch, seq, {C}] y) {{
        both = Concat <axis = -1> (angle, angle)
        cos = Cos(both) sin = Sin(both)
        q4 = Reshape(q, split) qh = Transpose <perm = [0, 2, 1, 3]> (q4)
        turned = qcompile.RotaryEmbedding(qh, cos, sin)
        c = qcompile.Attention <scale = 1.0> (turned, turned, qh, zero)
        ct = Transpose <perm = [0, 2, 1, 3]> (c)
        y = Reshape(ct, joined)
    }}"""
    constants = {
        "split": np.array([0, 0, H, D]),
        "joined": np.array([0, 0, C]),
        "zero": np.array(0, np.float32),
    }
    program = lower(graph(text, **constants), tmp_path / "p")
    assert program.operators()["RotaryEmbedding"] >= 1
    feeds = {"q": normal(3, 5, C), "angle": normal(3 if batched else 1, 1, 5, D // 2, seed=1)}
    assert program.difference(feeds) < TOLERANCE


def test_rotary_tables_with_unequal_halves_are_left_to_the_function(tmp_path: Path) -> None:
    text = f"""g (float[batch, seq, {C}] q, float[1, 1, seq, {D // 2}] a, float[1, 1, seq, {D // 2}] b)
            => (float[batch, seq, {C}] y) {{
        both = Concat <axis = -1> (a, b)
        cos = Cos(both) sin = Sin(both)
        q4 = Reshape(q, split) qh = Transpose <perm = [0, 2, 1, 3]> (q4)
        turned = qcompile.RotaryEmbedding(qh, cos, sin)
        c = qcompile.Attention <scale = 1.0> (turned, turned, qh, zero)
        ct = Transpose <perm = [0, 2, 1, 3]> (c)
        y = Reshape(ct, joined)
    }}"""
    constants = {"split": np.array([0, 0, H, D]), "joined": np.array([0, 0, C]), "zero": np.array(0, np.float32)}
    program = lower(graph(text, **constants), tmp_path / "p")
    assert "RotaryEmbedding" not in program.operators()
    tables = {name: normal(1, 1, 5, D // 2, seed=place) for place, name in enumerate("ab")}
    assert program.difference({"q": normal(3, 5, C), **tables}) < TOLERANCE


def test_a_soft_causal_bias_is_not_cut(tmp_path: Path) -> None:
    program = lower(attention("causal", hidden=-5.0), tmp_path / "p")
    assert program.operators()["Attention"] == 1
    feeds, keep = sequences(2, 20)
    assert program.difference(feeds, keep) < TOLERANCE
