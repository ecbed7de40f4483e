"""The project's operators: each body computes its definition, here in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qcompile.calibration.runner import open_session
from qcompile.graph.functions import DOMAIN, is_op, use

Array = np.ndarray


def drawn(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def computed(name: str, inputs: list[Array], **attributes: float) -> Array:
    """What ONNX Runtime makes of one node of ``name``; integers become int attributes."""
    floats = ir.TensorType(ir.DataType.FLOAT)
    ends = [
        ir.Value(name=f"x{i}", type=floats, shape=ir.Shape([f"d{i}_{j}" for j in range(x.ndim)]))
        for i, x in enumerate(inputs)
    ]
    held = [
        ir.AttrInt64(key, value) if isinstance(value, int) else ir.AttrFloat32(key, value)
        for key, value in attributes.items()
    ]
    node = ir.Node(DOMAIN, name, ends, held, num_outputs=1)
    node.outputs[0].name, node.outputs[0].type = "y", floats
    model = ir.Model(ir.Graph(ends, node.outputs, nodes=[node], opset_imports={"": 21}, name="g"), ir_version=10)
    use(model, name)
    use(model, name)  # a second time changes nothing
    assert len(model.functions) == 1 and is_op(node, name) and not is_op(node, "Neg") and not is_op(None, name)
    session: Any = open_session(ir.to_proto(model).SerializeToString(), threads=1)
    result: Array = session.run(None, {f"x{i}": x for i, x in enumerate(inputs)})[0]
    return result


def softmax(x: Array) -> Array:
    p = np.exp(x - x.max(axis=-1, keepdims=True))
    return np.asarray(p / p.sum(axis=-1, keepdims=True))


def test_rms_normalization() -> None:
    x, scale = drawn(2, 3, 16), drawn(16, seed=1)
    expected = x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + 1e-3) * scale
    np.testing.assert_allclose(computed("RMSNormalization", [x, scale], epsilon=1e-3), expected, rtol=1e-5)


def test_silu() -> None:
    x = 4 * drawn(2, 3, 16)
    np.testing.assert_allclose(computed("Silu", [x]), x / (1 + np.exp(-x)), rtol=1e-5, atol=1e-6)


def test_rotary_embedding_rotates_halves() -> None:
    x, angles = drawn(2, 4, 5, 8), np.outer(np.arange(5), [1, 0.3, 0.1, 0.01])
    cos, sin = (np.tile(f(angles), 2)[None, None].astype(np.float32) for f in (np.cos, np.sin))
    pairs = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angles)
    expected = np.concatenate([pairs.real, pairs.imag], axis=-1)
    np.testing.assert_allclose(computed("RotaryEmbedding", [x, cos, sin]), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("groups", (1, 2, 4))
def test_attention_and_its_groups(groups: int) -> None:
    q, k, v = drawn(2, 4, 5, 8), drawn(2, 4 // groups, 7, 8, seed=1), drawn(2, 4 // groups, 7, 8, seed=2)
    bias = np.where(drawn(2, 1, 5, 7, seed=3) > 0.5, np.finfo(np.float32).min, 0).astype(np.float32)
    wide_k, wide_v = (np.repeat(x, groups, axis=1) for x in (k, v))
    expected = softmax(0.3 * q @ wide_k.transpose(0, 1, 3, 2) + bias) @ wide_v
    if groups == 1:
        np.testing.assert_allclose(computed("Attention", [q, k, v, bias], scale=0.3), expected, rtol=1e-4, atol=1e-5)
    grouped = computed("GroupedAttention", [q, k, v, bias], scale=0.3, groups=groups)
    np.testing.assert_allclose(grouped, expected, rtol=1e-4, atol=1e-5)
