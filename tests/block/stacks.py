"""Small graphs with blocks, for the tests of what works on one block at a time."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir

from qcompile.calibration.samples import Sample

C = 8
HEADER = '<ir_version: 10, opset_import: ["" : 21]>\n'
BODY = """
    n0 = LayerNormalization <axis = -1> (x0, gain)
    a0 = MatMul (n0, l0a)
    r0 = Relu (a0)
    b0 = MatMul (r0, l0b)
    {middle}
    n1 = LayerNormalization <axis = -1> (x1, gain)
    a1 = MatMul (n1, l1a)
    r1 = Relu (a1)
    b1 = MatMul (r1, l1b)
    x2 = Add (x1, b1)
    n2 = LayerNormalization <axis = -1> (x2, gain)
    y = MatMul (n2, head_w)
}}"""
WEIGHTS = {"l0a": "layers.0.a", "l0b": "layers.0.b", "l1a": "layers.1.a", "l1b": "layers.1.b", "head_w": "head"}


def planted(middle: str, before: str = "x0 = Identity (x)") -> ir.Model:
    """Two blocks of two linears (``layers.0``, ``layers.1``) and a head; ``middle`` joins the first to its residual."""
    body = BODY.format(middle=middle).strip()
    text = f"{HEADER}g (float[b, s, {C}] x, float[b, s, {C}] z) => (float[b, s, {C}] y) {{\n{before}\n{body}"
    proto = onnx.parser.parse_model(text)
    generator = np.random.default_rng(0)
    weights = {"gain": np.ones(C, np.float32)}
    weights |= {f"{name}.weight": generator.standard_normal((C, C)).astype(np.float32) for name in WEIGHTS.values()}
    for node in proto.graph.node:
        node.name = node.output[0]
        node.input[:] = [f"{WEIGHTS[name]}.weight" if name in WEIGHTS else name for name in node.input]
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(w, name) for name, w in weights.items())
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def stack(depth: int, channels: int) -> ir.Model:
    """``depth`` blocks of two linears (channels, channels) on the stream."""
    lines = ["x0 = Relu (x)"]
    for i in range(depth):
        lines += [f"n{i} = LayerNormalization <axis = -1> (x{i}, gain)", f"a{i} = MatMul (n{i}, u{i})",
                  f"r{i} = Relu (a{i})", f"b{i} = MatMul (r{i}, d{i})", f"x{i + 1} = Add (x{i}, b{i})"]  # fmt: skip
    ends = f"(float[b, s, {channels}] x) => (float[b, s, {channels}] x{depth})"
    proto = onnx.parser.parse_model(f"{HEADER}g {ends} {{\n" + "\n".join(lines) + "\n}")
    generator = np.random.default_rng(0)
    weights = {"gain": np.ones(channels, np.float32)}
    for node in proto.graph.node:
        node.name = node.output[0]
        if node.op_type == "MatMul":
            kind, number = node.input[1][0], node.input[1][1:]
            node.input[1] = f"layers.{number}.{kind}.weight"
            drawn = generator.standard_normal((channels, channels), np.float32)
            weights[node.input[1]] = drawn / np.float32(np.sqrt(channels))
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(w, name) for name, w in weights.items())
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def samples(count: int = 2, channels: int = C) -> list[Sample]:
    drawn = np.random.default_rng(1).standard_normal((count, 2, 1, 5, channels)).astype(np.float32)
    return [Sample({"x": x, "z": z}) for x, z in drawn]
