"""What is almost a norm, an activation, a rotary embedding or a linear says what kept it from being one."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from qcompile.graph.workspace import Workspace
from qcompile.ledger import Skip
from tests.graph.models import canonicalised, spelled
from tests.graph.small import vector, weight

NUMBERS = {
    "half": 0.5,
    "one": 1.0,
    "root2": 2**0.5,
    "slope": 1.5,
    "quick": 1.702,
    "eps": 1e-5,
    "three": 3.0,
    "two": 2.0,
}
NUMBERS |= {"cubic": 0.044715, "pi": (2 / np.pi) ** 0.5, "minus": -0.5}
WEIGHTS = {name: np.array(number, np.float32) for name, number in NUMBERS.items()} | {
    "last": np.array([-1]),
    "middle": np.array([1]),
    "zero": np.array([0]),
    "four": np.array([4]),
    "six": np.array([6]),
    "eight": np.array([8]),
    "step": np.array([2]),
    "whole": np.array([0, 0, 8]),
    "flat": np.array([-1, 8]),
    "g": vector(1),
    "b": vector(2),
    "w": weight(3),
    "batch": np.stack([weight(4)] * 2),
    "wide": weight(5, 2, 8),
    "double": weight(6).astype(np.float64),
}


def skips(body: str, path: Path, workspace: Workspace, inputs: str = "float[2, s, 8] x") -> list[Skip]:
    """What is left alone in the graph of ``body``, which ends in y and may read ``WEIGHTS``."""
    text = f"g ({inputs}) => (float[] y) {{ {body} }}"
    used = {name: array for name, array in WEIGHTS.items() if name in re.findall(r"\w+", body)}
    return canonicalised(spelled(path / "m.onnx", text, used), workspace)[1].skips


def layer_norm(**changes: str) -> str:
    """A spelled-out LayerNorm, with other lines in place of some of its own."""
    lines = {
        "m": "m = ReduceMean <keepdims = 1> (x, last)",
        "c": "c = Sub (x, m)",
        "q": "q = Mul (c, c)",
        "v": "v = ReduceMean <keepdims = 1> (q, last)",
        "e": "e = Add (v, eps)",
        "r": "r = Sqrt (e)",
        "d": "d = Div (c, r)",
        "t": "t = Mul (d, g)",
        "y": "y = Add (t, b)",
    }
    return " ".join((lines | changes).values())


NORMS = {
    "another axis": (
        layer_norm(m="m = ReduceMean <keepdims = 1> (x, middle)", v="v = ReduceMean <keepdims = 1> (q, middle)"),
        "its mean is not over the last axis alone",
    ),
    "epsilon made at run time": (
        layer_norm(e="k = ReduceMax <keepdims = 1> (x, last) e = Add (v, k)"),
        "its epsilon is computed at run time",
    ),
    "an epsilon for each channel": (layer_norm(e="e = Add (v, g)"), "its epsilon is not one number"),
    "clipped instead": (layer_norm(e="e = Max (v, eps)"), "Max follows its mean, where an epsilon is added"),
    "no epsilon": (layer_norm(e="", r="r = Sqrt (v)"), "Sqrt follows its mean, where an epsilon is added"),
    "a power": (layer_norm(r="r = Pow (e, minus)", d="d = Mul (c, r)"), "its root is spelled as Pow"),
    "two consumers in the middle": (layer_norm(y="u = Add (t, b) y = Add (u, r)"), "its root has another reader"),
    "another order": (layer_norm(d="k = Mul (r, two) d = Div (c, k)"), "its root divides in other steps"),
    "gain made at run time": (
        layer_norm(t="k = ReduceMax <keepdims = 1> (x, last) t = Mul (d, k)"),
        "not seen as the gain of a norm: the factor is computed at run time",
    ),
    "a standard norm over two axes": ("y = RMSNormalization <axis = 1> (x, wide)", "not over the last axis alone"),
}


def gelu(**changes: str) -> str:
    lines = {
        "a": "a = Div (x, root2)",
        "e": "e = Erf (a)",
        "p": "p = Add (e, one)",
        "h": "h = Mul (x, p)",
        "y": "y = Mul (h, half)",
    }
    return " ".join((lines | changes).values())


def tanh_gelu(**changes: str) -> str:
    lines = {
        "k": "k = Pow (x, three)",
        "c": "c = Mul (k, cubic)",
        "s": "s = Add (x, c)",
        "a": "a = Mul (s, pi)",
        "t": "t = Tanh (a)",
        "p": "p = Add (t, one)",
        "h": "h = Mul (x, p)",
        "y": "y = Mul (h, half)",
    }
    return " ".join((lines | changes).values())


CURVES = {
    "erf of something else": (gelu(a="a = Div (x, two)"), "not seen as a GELU: its erf is not of x / sqrt(2)"),
    "erf read twice": (gelu(y="k = Mul (h, half) y = Add (k, e)"), "its erf has another reader"),
    "erf without one": (gelu(p="p = Add (e, half)"), "1 is not added to its erf"),
    "another factor": (gelu(y="y = Mul (h, two)"), "what follows is not a product with x / 2"),
    "another cubic": (tanh_gelu(a="a = Mul (s, half)"), "its tanh is not of sqrt(2 / pi) (x + 0.044715 x^3)"),
    "tanh read twice": (tanh_gelu(y="u = Mul (h, half) y = Add (u, t)"), "its tanh has another reader"),
    "a steep SiLU": (
        "a = Mul (x, slope) e = Sigmoid (a) y = Mul (x, e)",
        "not seen as a SiLU: its sigmoid is of 1.5 x",
    ),
    "sigmoid read twice": ("e = Sigmoid (x) k = Mul (x, e) y = Add (k, e)", "its sigmoid has another reader"),
}

HALVES = "lo = Slice (x, zero, four, last) hi = Slice (x, four, eight, last)"
ROTATIONS = {
    "unequal parts": (
        "o = Slice (x, zero, six, last) e = Slice (x, six, eight, last) n = Neg (e) k = Concat <axis = -1> (n, o)"
        " i = Mul (k, g) j = Mul (x, b) y = Add (i, j)",
        "not seen as a rotary embedding: what it joins are not the two halves",
    ),
    "the other sign": (
        f"{HALVES} n = Neg (lo) k = Concat <axis = -1> (hi, n) y = Mul (k, g)",
        "the first half is negated",
    ),
    "read twice": (
        f"{HALVES} n = Neg (hi) k = Concat <axis = -1> (n, lo)"
        " i = Mul (k, g) j = Mul (x, b) l = Add (i, j) y = Add (l, k)",
        "its rotated copy has another reader",
    ),
    "not the same x": (
        f"{HALVES} n = Neg (hi) k = Concat <axis = -1> (n, lo)"
        " i = Mul (k, g) z = Relu (x) j = Mul (z, b) y = Add (i, j)",
        "not the sum of x cos and a rotated copy",
    ),
    "neighbours": (
        "e = Slice (x, zero, eight, last, step) o = Slice (x, middle, eight, last, step)"
        " n = Neg (o) u = Unsqueeze (n, last) v = Unsqueeze (e, last) k = Concat <axis = -1> (u, v)"
        " i = Reshape (k, whole) y = Mul (i, g)",
        "its pairs are neighbours",
    ),
    "written by halves": (
        f"{HALVES} c = Slice (g, zero, four, zero) s = Slice (b, zero, four, zero)"
        " a = Mul (lo, c) d = Mul (hi, s) e = Sub (a, d) f = Mul (hi, c) h = Mul (lo, s)"
        " i = Add (f, h) y = Concat <axis = -1> (e, i)",
        "written by halves",
    ),
}

# torch's older exporter computes the norms of float16 models so
NORMS["in float64"] = (
    "d = Cast <to = 11> (x) q = Mul (d, d) v = ReduceMean <keepdims = 1> (q, last) f = Cast <to = 11> (eps)"
    " e = Add (v, f) r = Sqrt (e) h = Div (d, r) y = Cast <to = 1> (h)",
    "not seen as a norm: it is computed in float64",
)
LINEARS = {
    "doubles": (
        "d = Cast <to = 11> (x) n = MatMul (d, double) y = Cast <to = 1> (n)",
        "not seen as a linear: its weight is in float64, and float32 is needed",
    ),
    "a matrix for each sample": ("y = MatMul (x, batch)", "not seen as a linear: its weight has rank 3"),
    "a weight on the left": ("y = MatMul (w, k)", "its weight stands on the left"),
    "a weight that is computed": ("h = Sin (w) y = MatMul (x, h)", "its weight is computed by Sin at run time"),
    "a weight of the caller": ("f = Reshape (x, flat) y = Gemm (f, u)", "its weight is computed at run time"),
    "a transposed input": ("f = Reshape (x, flat) y = Gemm <transA = 1> (f, wide)", "its input is transposed"),
    "a bias made at run time": (
        "f = Reshape (x, flat) m = ReduceMax <keepdims = 1> (f, zero) y = Gemm (f, w, m)",
        "its bias is computed at run time",
    ),
    "a bias for each row": (
        "f = Reshape (x, flat) y = Gemm (f, w, wide)",
        "its bias is not one number for each column",
    ),
    "an einsum": (
        'y = Einsum <equation = "bsk,kn->bsn"> (x, w)',
        "not seen as a linear: Einsum has no kernel in low bits here",
    ),
    "inside of an If": (
        "y = If (flag) <then_branch = t () => (float[] u) { u = MatMul (x, w) },"
        " else_branch = e () => (float[] v) { v = Neg (x) }>",
        "not seen as a linear: it stands inside of If",
    ),
}
INPUTS = {"a weight of the caller": "float[2, s, 8] x, float[8, 4] u", "a weight on the left": "float[b, 8, s] k"}
INPUTS["inside of an If"] = "float[2, s, 8] x, bool flag"
INPUTS |= {"a bias for each row": "float[2, 1, 8] x", "a transposed input": "float[2, 1, 8] x"}
CASES = NORMS | CURVES | ROTATIONS | LINEARS


@pytest.mark.parametrize("name", CASES)
def test_a_near_miss_says_why(name: str, tmp_path: Path, workspace: Workspace) -> None:
    body, reason = CASES[name]
    (skip,) = skips(body, tmp_path, workspace, INPUTS.get(name, "float[2, s, 8] x"))
    assert reason in skip.reason
    assert skip.node.startswith(f"{skip.site}:")  # a nameless node is known by its first output


HEALTHY = {
    "a norm": layer_norm(),
    "a norm whose gain is a trained gate": layer_norm(t="t = Mul (d, g)", y="y = Mul (t, x)"),
    "a GELU": gelu(),
    "a tanh GELU": tanh_gelu(),
    "a sigmoid from tanh": "a = Mul (x, half) t = Tanh (a) p = Add (t, one) h = Mul (x, p) y = Mul (h, half)",
    "a QuickGELU": "a = Mul (x, quick) e = Sigmoid (a) y = Mul (x, e)",
    "a gate of something else": "h = MatMul (x, w) e = Sigmoid (h) k = Relu (e) y = Mul (x, k)",
    "a variance": "c = Mul (x, x) v = ReduceMean <keepdims = 1> (c, last) e = Add (v, eps) y = Sqrt (e)",
    "a concatenation": f"{HALVES} k = Concat <axis = -1> (hi, lo) y = Relu (k)",
    "an outer product": "u = ReduceMax <keepdims = 1> (x, middle) y = MatMul (column, u)",
    "a Gemm with a row as its bias": "f = Reshape (x, flat) y = Gemm <beta = 2.0> (f, w, row)",
}
WEIGHTS |= {"column": vector(6).reshape(1, 8, 1), "row": vector(7).reshape(1, 8)}


@pytest.mark.parametrize("name", HEALTHY)
def test_what_is_recognised_or_far_from_it_says_nothing(name: str, tmp_path: Path, workspace: Workspace) -> None:
    assert skips(HEALTHY[name], tmp_path, workspace) == []
