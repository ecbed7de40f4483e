"""ONNX Runtime's fused operators, and the newer operators of ONNX, in the canonical spelling.

Norms, activations and products here; attention and rotary embeddings in files of their own. What cannot be
taken apart stays, with a reason.
Source of the definitions: ONNX Runtime's ContribOperators.md and the ONNX operator set 23 and 24.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from qcompile.graph.canonical import fused_attention, fused_rotary, match
from qcompile.graph.canonical.activation import QUICK
from qcompile.graph.canonical.draft import Draft, float_attribute, given, is_used
from qcompile.graph.workspace import Workspace

MICROSOFT = "com.microsoft"
Decompose = Callable[[Draft, ir.Node], str]


def rewrite(model: ir.Model, workspace: Workspace) -> tuple[int, list[match.Unrecognised]]:
    """Take every fused operator apart; returns how many, and those that stay with the reason.

    In rounds: the shapes behind an operator that inference does not know are seen once it is taken apart.
    """
    total = 0
    while True:
        count, left = _round(model, workspace)
        total += count
        if count:
            common.RemoveUnusedNodesPass()(model)
            common.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(model)
        if not (count and left):
            return total, left


def _round(model: ir.Model, workspace: Workspace) -> tuple[int, list[match.Unrecognised]]:
    count, left = 0, []
    for node in list(model.graph):
        decompose = _rule(node)
        if decompose is None:
            continue
        reason = decompose(Draft(model, node, workspace), node)
        if reason:
            left.append(match.Unrecognised(node, reason))
        else:
            count += 1
    return count, left


def _rule(node: ir.Node) -> Decompose | None:
    if node.domain == MICROSOFT:
        return _MICROSOFT.get(node.op_type, _unknown)
    if node.domain in ("", "ai.onnx"):
        return _STANDARD.get(node.op_type)
    return None


def _unknown(_draft: Draft, node: ir.Node) -> str:
    return f"{node.op_type} of ONNX Runtime has no canonical form here"


# --------------------------------------------------------------------------- norms


def _layer_norm(
    draft: Draft, x: ir.Value, gamma: ir.Value | None, beta: ir.Value | None, epsilon: float
) -> ir.Value:
    inputs = [x, gamma] + ([beta] if beta is not None else [])
    return draft.op("LayerNormalization", *inputs, axis=-1, epsilon=epsilon)


def _skip_layer_norm(draft: Draft, node: ir.Node) -> str:
    """LayerNormalization(input + bias + skip); the fourth output is the sum."""
    if is_used(node, 1, 2):
        return "its mean or deviation is read"
    total = _residual_sum(draft, node, given(node, 4))
    epsilon = float_attribute(node, "epsilon", 1e-12)
    return draft.finish(_layer_norm(draft, total, node.inputs[2], given(node, 3), epsilon), None, None, total)


def _skip_rms_norm(draft: Draft, node: ir.Node) -> str:
    if is_used(node, 1, 2):
        return "its mean or deviation is read"
    total = _residual_sum(draft, node, given(node, 3))
    normal = draft.own(
        "RMSNormalization", total, node.inputs[2], epsilon=float_attribute(node, "epsilon", 1e-12)
    )
    return draft.finish(normal, None, None, total)


def _residual_sum(draft: Draft, node: ir.Node, bias: ir.Value | None) -> ir.Value:
    x = draft.op("Add", node.inputs[0], bias) if bias is not None else node.inputs[0]
    return draft.op("Add", x, node.inputs[1])


def _rms_norm(draft: Draft, node: ir.Node) -> str:
    if is_used(node, 1) or match.int_attribute(node, "axis", -1) != -1:
        return "its deviation is read, or it is not over the last axis"
    epsilon = float_attribute(node, "epsilon", 1e-5)
    return draft.finish(draft.own("RMSNormalization", *node.inputs[:2], epsilon=epsilon))


def _embed_layer_norm(draft: Draft, node: ir.Node) -> str:
    """The sum of word, position and segment rows, normalised; the second output counts each row's mask."""
    ids, segments = map(_uncast, node.inputs[:2])
    words, positions, kinds, gamma, beta = node.inputs[2:7]
    mask, places = _uncast(given(node, 7)), _uncast(given(node, 8))
    if places is None:
        assert ids is not None
        # (1, S), not (S): ONNX Runtime 1.31 rewrites Gather(table, Range) to a Slice that it cannot run
        places = draft.op("Unsqueeze", draft.range(draft.length(ids, 1)), draft.ints(0))
    total = draft.op("Add", draft.op("Gather", words, ids), draft.op("Gather", positions, places))
    if segments is not None and kinds is not None:
        total = draft.op("Add", total, draft.op("Gather", kinds, segments))
    normal = _layer_norm(draft, total, gamma, beta, float_attribute(node, "epsilon", 1e-12))
    counts = None
    if is_used(node, 1):
        if mask is None:
            return "the mask index is read, but there is no mask"
        one = draft.constant(np.asarray(1, np.int64 if mask.dtype == ir.DataType.INT64 else np.int32), "one")
        real = draft.op("Equal", mask, one)
        counts = draft.op("ReduceSum", draft.op("Cast", real, to=int(ir.DataType.INT32)), draft.ints(1), keepdims=0)
    return draft.finish(normal, counts, total if is_used(node, 2) else None)


def _uncast(index: ir.Value | None) -> ir.Value | None:
    """Integers as the caller gives them: the fused operator wants int32, Gather takes both."""
    cast = match.producer(index, "Cast")
    source = cast.inputs[0] if cast is not None else None
    return source if source is not None and source.dtype in (ir.DataType.INT32, ir.DataType.INT64) else index


# --------------------------------------------------------------------------- activations and products


def _gelu(draft: Draft, node: ir.Node, approximate: str) -> str:
    """BiasGelu, FastGelu and Gelu: the optional second input is added first."""
    bias = given(node, 1)
    x = draft.op("Add", node.inputs[0], bias) if bias is not None else node.inputs[0]
    return draft.finish(draft.op("Gelu", x, approximate=approximate))


def _erf_gelu(draft: Draft, node: ir.Node) -> str:
    return _gelu(draft, node, "none")


def _tanh_gelu(draft: Draft, node: ir.Node) -> str:
    return _gelu(draft, node, "tanh")


def _swish(draft: Draft, node: ir.Node, default: float) -> str:
    """x sigmoid(alpha x)."""
    x, alpha = node.inputs[0], float_attribute(node, "alpha", default)
    if alpha == 1.0:
        return draft.finish(draft.own("Silu", x))
    gate = draft.op("Sigmoid", draft.op("Mul", x, draft.number(alpha)))
    return draft.finish(draft.op("Mul", x, gate))


def _quick_gelu(draft: Draft, node: ir.Node) -> str:
    return _swish(draft, node, QUICK)


def _standard_swish(draft: Draft, node: ir.Node) -> str:
    return _swish(draft, node, 1.0)


def _fused_matmul(draft: Draft, node: ir.Node) -> str:
    if match.int_attribute(node, "transBatchA", 0) or match.int_attribute(node, "transBatchB", 0):
        return "it transposes the batch"
    operands = []
    for value, flag in zip(node.inputs, ("transA", "transB"), strict=False):
        if match.int_attribute(node, flag, 0):
            if value is None or value.shape is None:
                return "the rank of a transposed operand is not known"
            rank = len(value.shape)
            value = draft.op("Transpose", value, perm=[*range(rank - 2), rank - 1, rank - 2])
        operands.append(value)
    product = draft.op("MatMul", *operands)
    alpha = float_attribute(node, "alpha", 1.0)
    return draft.finish(product if alpha == 1.0 else draft.op("Mul", product, draft.number(alpha)))


_MICROSOFT: dict[str, Decompose] = {
    "SkipLayerNormalization": _skip_layer_norm,
    "SkipSimplifiedLayerNormalization": _skip_rms_norm,
    "SimplifiedLayerNormalization": _rms_norm,
    "EmbedLayerNormalization": _embed_layer_norm,
    "BiasGelu": _erf_gelu,
    "FastGelu": _tanh_gelu,
    "Gelu": _erf_gelu,
    "QuickGelu": _quick_gelu,
    "FusedMatMul": _fused_matmul,
    **fused_attention.MICROSOFT,
    **fused_rotary.MICROSOFT,
}
_STANDARD: dict[str, Decompose] = {
    "SimplifiedLayerNormalization": _rms_norm,  # ONNX Runtime registers it in the standard domain
    "Swish": _standard_swish,
    **fused_attention.STANDARD,
    **fused_rotary.STANDARD,
}
