"""ONNX operators as differentiable functions of torch tensors, and the table that names them all.

Inputs come in the operator's order (None where one is left out), attributes as keywords.
Sources: the ONNX operator reference, opset 21; ``graph/functions.py`` for the operators of this project.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor

from qcompile.block import layout
from qcompile.block.layout import Integers, whole
from qcompile.block.quantisers import round_through
from qcompile.graph.functions import DOMAIN
from qcompile.quant.numerics import SCALE_FLOOR

# ------------------------------------------------------------------------------------------ arithmetic


def divide(a: Tensor, b: Tensor) -> Tensor:
    """ONNX divides integers towards zero."""
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def power(a: Tensor, b: Tensor) -> Tensor:
    return torch.pow(a, b).to(a.dtype)


def modulo(a: Tensor, b: Tensor, *, fmod: int = 0) -> Tensor:
    return torch.fmod(a, b) if fmod else torch.remainder(a, b)


def smallest(*parts: Tensor) -> Tensor:
    return functools.reduce(torch.minimum, parts)


def largest(*parts: Tensor) -> Tensor:
    return functools.reduce(torch.maximum, parts)


def total(*parts: Tensor) -> Tensor:
    return functools.reduce(torch.add, parts)


def clip(x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    x = x if low is None else torch.maximum(x, low)
    return x if high is None else torch.minimum(x, high)


def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    return F.gelu(x, approximate=approximate)


def elu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return F.elu(x, alpha)


def leaky_relu(x: Tensor, *, alpha: float = 0.01) -> Tensor:
    return F.leaky_relu(x, alpha)


def hard_sigmoid(x: Tensor, *, alpha: float = 0.2, beta: float = 0.5) -> Tensor:
    return (alpha * x + beta).clamp(0, 1)


# ------------------------------------------------------------------------------------------ reductions


def _axes(x: Tensor, axes: Integers | None) -> list[int]:
    return whole(axes) if axes is not None else []


def _reduction(kernel: Callable[[Tensor, list[int], bool], Tensor], name: str) -> Callable[..., Tensor]:
    def reduce(x: Tensor, axes: Integers | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Tensor:
        along = _axes(x, axes)
        if not along and noop_with_empty_axes:
            return x
        return kernel(x, along or list(range(x.ndim)), bool(keepdims))

    reduce.__name__ = reduce.__qualname__ = name
    return reduce


reduce_sum = _reduction(lambda x, axes, keep: x.sum(axes, keep).to(x.dtype), "reduce_sum")
reduce_mean = _reduction(lambda x, axes, keep: x.mean(axes, keep), "reduce_mean")
reduce_max = _reduction(lambda x, axes, keep: x.amax(axes, keep), "reduce_max")
reduce_min = _reduction(lambda x, axes, keep: x.amin(axes, keep), "reduce_min")
reduce_l2 = _reduction(lambda x, axes, keep: x.square().sum(axes, keep).sqrt(), "reduce_l2")
reduce_sum_square = _reduction(lambda x, axes, keep: x.square().sum(axes, keep), "reduce_sum_square")
reduce_log_sum_exp = _reduction(lambda x, axes, keep: x.logsumexp(axes, keep), "reduce_log_sum_exp")


def arg_max(x: Tensor, *, axis: int = 0, keepdims: int = 1) -> Tensor:
    return x.argmax(axis, bool(keepdims))


def arg_min(x: Tensor, *, axis: int = 0, keepdims: int = 1) -> Tensor:
    return x.argmin(axis, bool(keepdims))


# --------------------------------------------------------------------------- products, norms, attention


def gemm(
    a: Tensor, b: Tensor, c: Tensor | None = None, *,
    alpha: float = 1.0, beta: float = 1.0, transA: int = 0, transB: int = 0,
) -> Tensor:  # fmt: skip
    y = alpha * ((a.T if transA else a) @ (b.T if transB else b))
    return y if c is None else y + beta * c


def einsum(*parts: Tensor, equation: str) -> Tensor:
    return torch.einsum(equation, *parts)


def conv(
    x: Tensor, w: Tensor, b: Tensor | None = None, *, kernel_shape: Sequence[int] = (), auto_pad: str = "NOTSET",
    dilations: Sequence[int] = (), group: int = 1, pads: Sequence[int] = (), strides: Sequence[int] = (),
) -> Tensor:  # fmt: skip
    """x (B, C, ...spatial), w (M, C / group, ...kernel), in one to three dimensions."""
    spatial = w.ndim - 2
    stride, dilation = list(strides) or [1] * spatial, list(dilations) or [1] * spatial
    if auto_pad.startswith("SAME"):
        pads = _same_pads(x.shape[2:], w.shape[2:], stride, dilation, upper=auto_pad == "SAME_UPPER")
    if any(pads):
        flat = [n for axis in reversed(range(spatial)) for n in (pads[axis], pads[axis + spatial])]
        x = F.pad(x, flat)
    kernel = (F.conv1d, F.conv2d, F.conv3d)[spatial - 1]
    return kernel(x, w, b, stride=stride, dilation=dilation, groups=group)


def _same_pads(
    sizes: Sequence[int], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int], upper: bool
) -> list[int]:
    """Padding that makes the output ceil(size / stride); an odd one lies at the end when ``upper``."""
    amounts = [
        max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0)
        for n, k, s, d in zip(sizes, kernel, stride, dilation, strict=True)
    ]
    less, more = [n // 2 for n in amounts], [n - n // 2 for n in amounts]
    return [*less, *more] if upper else [*more, *less]


def softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    return x.softmax(axis)


def log_softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    return x.log_softmax(axis)


def layer_norm(
    x: Tensor, scale: Tensor, bias: Tensor | None = None, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1
) -> Tensor:
    normal = F.layer_norm(x, x.shape[axis % x.ndim :], eps=epsilon) * scale
    return normal if bias is None else normal + bias


def group_norm(
    x: Tensor, scale: Tensor, bias: Tensor, *, num_groups: int, epsilon: float = 1e-5, stash_type: int = 1
) -> Tensor:
    return F.group_norm(x, num_groups, scale, bias, epsilon)


def batch_norm(
    x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor, *, epsilon: float = 1e-5, momentum: float = 0.9
) -> Tensor:
    return F.batch_norm(x, mean, var, scale, bias, eps=epsilon)


def rms_norm(x: Tensor, scale: Tensor, *, epsilon: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt() * scale


def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, *, scale: float) -> Tensor:
    """q (B, H, S, d), k and v (B, H, T, d or e), bias (B, H, S, T) or what broadcasts to it."""
    return F.scaled_dot_product_attention(q, k, v, bias, scale=scale)


def grouped_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, *, scale: float, groups: int) -> Tensor:
    return attention(q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1), bias, scale=scale)


# ------------------------------------------------------------------------------------------ quantisation


def fake_quantize_per_token(x: Tensor, *, levels: float) -> Tensor:
    """The function's own float32 arithmetic; the grid follows the row's extremes, also in the gradient."""
    high, low = x.amax(-1, keepdim=True).clamp(min=0), x.amin(-1, keepdim=True).clamp(max=0)
    scale = ((high - low) / levels).clamp(min=SCALE_FLOOR)
    first = round_through(low / scale)
    return torch.clamp(round_through(x / scale), first, first + levels) * scale


def fake_quantize_per_token_symmetric(x: Tensor, *, levels: float) -> Tensor:
    scale = (x.abs().amax(-1, keepdim=True) / levels).clamp(min=SCALE_FLOOR)
    return round_through(x / scale) * scale


def clip_tokens(x: Tensor, *, reach: float) -> Tensor:
    high, low = x.amax(-1, keepdim=True).clamp(min=0), x.amin(-1, keepdim=True).clamp(max=0)
    return torch.minimum(torch.maximum(x, low * reach), high * reach)


def rotate_blocks(x: Tensor, matrix: Tensor) -> Tensor:
    return (x.reshape(*x.shape[:-1], -1, len(matrix)) @ matrix).reshape(x.shape)


def _along(values: Tensor, x: Tensor, axis: int, block_size: int) -> Tensor:
    """Scales or zero points broadcast over ``x``: one, one for each index of ``axis``, or one for each block of it."""
    if values.numel() == 1:
        return values.reshape(())
    if block_size:
        return values.repeat_interleave(block_size, axis).narrow(axis, 0, x.shape[axis])
    return values.reshape([-1 if i == axis % x.ndim else 1 for i in range(x.ndim)])


def quantize_linear(
    x: Tensor, scale: Tensor, zero: Tensor, *, axis: int = 1, block_size: int = 0, saturate: int = 1
) -> Tensor:
    """The codes, in floating point: a gradient has to pass."""
    bounds = torch.iinfo(zero.dtype)
    steps = round_through(x / _along(scale, x, axis, block_size))
    return (steps + _along(zero, x, axis, block_size)).clamp(bounds.min, bounds.max)


def dequantize_linear(
    codes: Tensor, scale: Tensor, zero: Tensor | None = None, *, axis: int = 1, block_size: int = 0
) -> Tensor:
    step = _along(scale, codes, axis, block_size)
    values = codes.to(scale.dtype)
    return (values if zero is None else values - _along(zero, codes, axis, block_size)) * step


# ------------------------------------------------------------------------------------------ the table


@dataclasses.dataclass(frozen=True)
class Op:
    """``call`` computes the operator; inputs at ``integers`` are read as Python integers.

    ``on_host``: the result is made on the CPU whatever the inputs. ``refuse``: why a node has no translation.
    """

    call: Callable[..., Any]
    integers: tuple[int, ...] = ()
    on_host: bool = False
    refuse: Callable[[ir.Node], str] = lambda _node: ""


def _attribute_is(name: str, *known: object) -> Callable[[ir.Node], str]:
    def refuse(node: ir.Node) -> str:
        held = node.attributes.get(name)
        return f"{name} = {held.value}" if held is not None and held.value not in known else ""

    return refuse


def _narrow_codes(node: ir.Node) -> str:
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    if zero is None:
        return "no zero point says which codes it makes"
    known = (ir.DataType.UINT8, ir.DataType.INT8, ir.DataType.UINT16, ir.DataType.INT16)
    return "" if zero.dtype in known else f"codes of type {zero.dtype}"


_PLAIN: dict[str, Callable[..., Any]] = {
    "Abs": torch.abs, "Add": torch.add, "And": torch.logical_and, "Ceil": torch.ceil, "Cos": torch.cos,
    "Equal": torch.eq, "Erf": torch.erf, "Exp": torch.exp, "Floor": torch.floor, "Greater": torch.gt,
    "GreaterOrEqual": torch.ge, "HardSwish": F.hardswish, "IsNaN": torch.isnan, "Less": torch.lt,
    "LessOrEqual": torch.le, "Log": torch.log, "MatMul": torch.matmul, "Mish": F.mish, "Mul": torch.mul,
    "Neg": torch.neg, "Not": torch.logical_not, "Or": torch.logical_or, "Reciprocal": torch.reciprocal,
    "Relu": torch.relu, "Round": torch.round, "Sigmoid": torch.sigmoid, "Sign": torch.sign, "Sin": torch.sin,
    "Softplus": F.softplus, "Sqrt": torch.sqrt, "Sub": torch.sub, "Tanh": torch.tanh, "Where": torch.where,
    "Xor": torch.logical_xor,
    "Clip": clip, "Div": divide, "Elu": elu, "Gelu": gelu, "HardSigmoid": hard_sigmoid, "LeakyRelu": leaky_relu,
    "Max": largest, "Min": smallest, "Mod": modulo, "Pow": power, "Sum": total,
    "Conv": conv, "Einsum": einsum, "Gemm": gemm,
    "BatchNormalization": batch_norm, "GroupNormalization": group_norm, "LayerNormalization": layer_norm,
    "LogSoftmax": log_softmax, "Softmax": softmax,
    "Cast": layout.cast, "CastLike": layout.cast_like, "Concat": layout.concat, "Dropout": layout.identity,
    "Flatten": layout.flatten, "Gather": layout.gather, "GatherElements": layout.gather_elements,
    "GatherND": layout.gather_nd, "Identity": layout.identity, "NonZero": layout.non_zero,
    "Transpose": layout.transpose,
}  # fmt: skip
_REDUCTIONS: dict[str, Callable[..., Any]] = {
    "ReduceL2": reduce_l2, "ReduceLogSumExp": reduce_log_sum_exp, "ReduceMax": reduce_max, "ReduceMean": reduce_mean,
    "ReduceMin": reduce_min, "ReduceSum": reduce_sum, "ReduceSumSquare": reduce_sum_square,
}  # fmt: skip
_OWN: dict[str, Callable[..., Any]] = {
    "Attention": attention, "ClipTokens": clip_tokens, "FakeQuantizePerToken": fake_quantize_per_token,
    "FakeQuantizePerTokenSymmetric": fake_quantize_per_token_symmetric, "GroupedAttention": grouped_attention,
    "RMSNormalization": rms_norm, "RotaryEmbedding": rotary_embedding, "RotateBlocks": rotate_blocks, "Silu": F.silu,
}  # fmt: skip
_SETTLED: dict[str, Op] = {
    "ArgMax": Op(arg_max, refuse=_attribute_is("select_last_index", 0)),
    "ArgMin": Op(arg_min, refuse=_attribute_is("select_last_index", 0)),
    "ConstantOfShape": Op(layout.constant_of_shape, (0,), on_host=True),
    "CumSum": Op(layout.cumsum, (1,)),
    "DequantizeLinear": Op(dequantize_linear),
    "Expand": Op(layout.expand, (1,)),
    "OneHot": Op(layout.one_hot, (1,)),
    "Pad": Op(layout.pad, (1, 3), refuse=_attribute_is("mode", "constant")),
    "QuantizeLinear": Op(quantize_linear, refuse=_narrow_codes),
    "Range": Op(layout.range_, on_host=True),
    "Reshape": Op(layout.reshape, (1,)),
    "ScatterElements": Op(layout.scatter_elements, refuse=_attribute_is("reduction", "none", "add")),
    "ScatterND": Op(layout.scatter_nd, refuse=_attribute_is("reduction", "none", "add")),
    "Shape": Op(layout.shape, on_host=True),
    "Size": Op(layout.size, on_host=True),
    "Slice": Op(layout.slice_, (1, 2, 3, 4)),
    "Split": Op(layout.split, (1,)),
    "Squeeze": Op(layout.squeeze, (1,)),
    "Tile": Op(layout.tile, (1,)),
    "TopK": Op(layout.top_k, (1,)),
    "Trilu": Op(layout.trilu, (1,)),
    "Unsqueeze": Op(layout.unsqueeze, (1,)),
}
OPS: dict[tuple[str, str], Op] = {
    **{("", name): Op(call) for name, call in _PLAIN.items()},
    **{("", name): Op(call, (1,)) for name, call in _REDUCTIONS.items()},
    **{("", name): op for name, op in _SETTLED.items()},
    **{(DOMAIN, name): Op(call) for name, call in _OWN.items()},
}
