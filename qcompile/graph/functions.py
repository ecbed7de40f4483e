"""Operators of the project's own domain: ONNX functions whose body is the executable specification.

ONNX has no operator (or none that every runtime reads) for these; a function runs anywhere, and a backend
may replace it by a kernel.
"""

from __future__ import annotations

import functools

import onnx
import onnx.parser
import onnx_ir as ir

from qcompile.graph import integer

DOMAIN = "qcompile"
_HEADER = f'<domain: "{DOMAIN}", opset_import: ["" : 21]>\n'
_CALLING_HEADER = f'<domain: "{DOMAIN}", opset_import: ["" : 21, "{DOMAIN}" : 1]>\n'  # uses functions of its own

_BODIES: dict[str, str] = {
    # x (..., C), scale (C) -> (..., C); root mean square over the last axis (arXiv 1910.07467)
    "RMSNormalization": """RMSNormalization <epsilon> (x, scale) => (y) {
        eps = Constant <value_float: float = @epsilon> ()
        last = Constant <value_ints = [-1]> ()
        square = Mul (x, x)
        mean = ReduceMean <keepdims = 1> (square, last)
        shifted = Add (mean, eps)
        root = Sqrt (shifted)
        normal = Div (x, root)
        y = Mul (normal, scale)
    }""",
    # x * sigmoid(x)
    "Silu": """Silu (x) => (y) {
        gate = Sigmoid (x)
        y = Mul (x, gate)
    }""",
    # x (B, H, S, d); cos, sin broadcast to it; halves rotated as in LLaMA (arXiv 2104.09864)
    "RotaryEmbedding": """RotaryEmbedding (x, cos, sin) => (y) {
        first, second = Split <axis = -1, num_outputs = 2> (x)
        negated = Neg (second)
        rotated = Concat <axis = -1> (negated, first)
        a = Mul (x, cos)
        b = Mul (rotated, sin)
        y = Add (a, b)
    }""",
    # rows of x (..., C) on the grid of their own min and max, `levels` = 2^bits - 1 steps; zero is exact
    "FakeQuantizePerToken": """FakeQuantizePerToken <levels> (x) => (y) {
        steps = Constant <value_float: float = @levels> ()
        tiny = Constant <value_float: float = 1.1754944e-38> ()
        zero = Constant <value_float: float = 0.0> ()
        last = Constant <value_ints = [-1]> ()
        top = ReduceMax <keepdims = 1> (x, last)
        bottom = ReduceMin <keepdims = 1> (x, last)
        hi = Max (top, zero)
        lo = Min (bottom, zero)
        width = Sub (hi, lo)
        step = Div (width, steps)
        scale = Max (step, tiny)
        below = Div (lo, scale)
        first = Round (below)
        zero_point = Neg (first)
        end = Sub (steps, zero_point)
        ratio = Div (x, scale)
        rounded = Round (ratio)
        floored = Max (rounded, first)
        code = Min (floored, end)
        y = Mul (code, scale)
    }""",
    # the same on a grid symmetric about zero, `levels` = 2^(bits-1) - 1 steps to each side
    "FakeQuantizePerTokenSymmetric": """FakeQuantizePerTokenSymmetric <levels> (x) => (y) {
        steps = Constant <value_float: float = @levels> ()
        tiny = Constant <value_float: float = 1.1754944e-38> ()
        last = Constant <value_ints = [-1]> ()
        size = Abs (x)
        top = ReduceMax <keepdims = 1> (size, last)
        step = Div (top, steps)
        scale = Max (step, tiny)
        ratio = Div (x, scale)
        code = Round (ratio)
        y = Mul (code, scale)
    }""",
    # rows of x (..., C) cut to `reach`, a share, of their own min and max
    "ClipTokens": """ClipTokens <reach> (x) => (y) {
        share = Constant <value_float: float = @reach> ()
        zero = Constant <value_float: float = 0.0> ()
        last = Constant <value_ints = [-1]> ()
        top = ReduceMax <keepdims = 1> (x, last)
        bottom = ReduceMin <keepdims = 1> (x, last)
        above = Max (top, zero)
        below = Min (bottom, zero)
        hi = Mul (above, share)
        lo = Mul (below, share)
        floored = Max (x, lo)
        y = Min (floored, hi)
    }""",
    # each run of n channels of x (..., C) times matrix (n, n); n divides C
    "RotateBlocks": """RotateBlocks (x, matrix) => (y) {
        shape = Shape (x)
        size = Shape <start = 0, end = 1> (matrix)
        rest = Constant <value_ints = [-1]> ()
        blocked = Concat <axis = 0> (rest, size)
        blocks = Reshape (x, blocked)
        turned = MatMul (blocks, matrix)
        y = Reshape (turned, shape)
    }""",
    # q, k, v (B, H, S or T, d), bias broadcast to (B, H, S, T); softmax over T
    "Attention": """Attention <scale> (q, k, v, bias) => (y) {
        alpha = Constant <value_float: float = @scale> ()
        kt = Transpose <perm = [0, 1, 3, 2]> (k)
        scaled = Mul (q, alpha)
        scores = MatMul (scaled, kt)
        biased = Add (scores, bias)
        p = Softmax <axis = -1> (biased)
        y = MatMul (p, v)
    }""",
    # as Attention, but k and v (B, H / groups, T, d): each of their heads serves `groups` query heads
    "GroupedAttention": """GroupedAttention <scale, groups> (q, k, v, bias) => (y) {
        alpha = Constant <value_float: float = @scale> ()
        count = Constant <value_int: int = @groups> ()
        two = Constant <value_ints = [2]> ()
        one = Constant <value_ints = [1]> ()
        pair = Constant <value_ints = [1, 1]> ()
        flat = Constant <value_ints = [0, -1]> ()
        counts = Reshape (count, one)
        repeat = Concat <axis = 0> (pair, counts, pair)
        k5 = Unsqueeze (k, two)
        v5 = Unsqueeze (v, two)
        kr = Expand (k5, repeat)
        vr = Expand (v5, repeat)
        ks = Shape <start = 3> (kr)
        vs = Shape <start = 3> (vr)
        kshape = Concat <axis = 0> (flat, ks)
        vshape = Concat <axis = 0> (flat, vs)
        kh = Reshape (kr, kshape)
        vh = Reshape (vr, vshape)
        kt = Transpose <perm = [0, 1, 3, 2]> (kh)
        scaled = Mul (q, alpha)
        scores = MatMul (scaled, kt)
        biased = Add (scores, bias)
        p = Softmax <axis = -1> (biased)
        y = MatMul (p, vh)
    }""",
}


@functools.cache
def _proto(name: str) -> onnx.FunctionProto:
    if name in _BODIES:
        return onnx.parser.parse_function(_HEADER + _BODIES[name])
    text = integer.body(name)
    return onnx.parser.parse_function((_CALLING_HEADER if f" {DOMAIN}." in text else _HEADER) + text)


def use(model: ir.Model, name: str) -> None:
    """Make the function ``name``, and those that it uses, known to ``model``."""
    model.opset_imports.setdefault(DOMAIN, 1)
    model.graph.opset_imports.setdefault(DOMAIN, 1)
    key = (DOMAIN, name, "")
    if key not in model.functions:
        function = ir.serde.deserialize_function(_proto(name))
        model.functions[function.identifier()] = function
        for node in function:
            if node.domain == DOMAIN:
                use(model, node.op_type)


def is_op(node: ir.Node | None, *names: str) -> bool:
    """Whether ``node`` is one of the standard or project operators called ``names``."""
    return node is not None and node.op_type in names and node.domain in ("", "ai.onnx", DOMAIN)
