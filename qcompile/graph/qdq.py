"""Write quantisation into the graph: QuantizeLinear/DequantizeLinear, or the per-token function.

    static:   x -> [Clip] -> QuantizeLinear(s, z uint8) -> DequantizeLinear -> reader
    dynamic:  x -> [Mul 0/1] -> qcompile.FakeQuantizePerToken{levels} -> reader
    weight:   W -> DequantizeLinear(codes int8, scale, zero point) along the output columns or in groups
Fewer than 8 bits: the codes use a part of uint8, and a Clip keeps x inside it. The Mul leaves out channels
that are kept in float.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from qcompile.graph.caches import Cache
from qcompile.graph.canonical import match
from qcompile.graph.edits import constant_array, new_initializer
from qcompile.graph.functions import DOMAIN, is_op, use
from qcompile.graph.sites import Linear
from qcompile.graph.workspace import Workspace
from qcompile.quant.numerics import Affine, QuantizedWeight
from qcompile.quant.schemes import ActivationScheme

Readers = Sequence[tuple[ir.Node, int]]  # (node, index of the input)


def quantize_static(
    model: ir.Model,
    value: ir.Value,
    readers: Readers,
    affine: Affine,
    workspace: Workspace,
    axis: int | None = None,
) -> None:
    """Let ``readers`` (node, input index) read ``value`` through one Q/DQ pair.

    ``affine`` is scalar, or per channel of ``axis``.
    """
    name = str(value.name)
    x = _clipped(model, value, affine, workspace) if affine.high - affine.low < 255 else value
    scale = new_initializer(model, f"{name}.scale", affine.scale, workspace)
    zero = new_initializer(model, f"{name}.zero_point", affine.zero_point.astype(np.uint8), workspace)
    attributes = {} if axis is None else {"axis": ir.AttrInt64("axis", axis)}
    codes = _after(x, "QuantizeLinear", [x, scale, zero], attributes, f"{name}.codes")
    codes.type, codes.shape = ir.TensorType(ir.DataType.UINT8), value.shape
    result = _after(codes, "DequantizeLinear", [codes, scale, zero], attributes, f"{name}.dequantized")
    result.type, result.shape = value.type, value.shape
    _redirect(readers, result)


def quantize_per_token(
    model: ir.Model,
    value: ir.Value,
    readers: Readers,
    scheme: ActivationScheme,
    workspace: Workspace,
    ordinary: np.ndarray | None = None,
) -> None:
    """Let ``readers`` read ``value`` through the per-token function.

    ``ordinary`` (C,) is 0 at the channels that are multiplied in float elsewhere: they read as zero and do
    not stretch the range.
    """
    function = "FakeQuantizePerTokenSymmetric" if scheme.symmetric else "FakeQuantizePerToken"
    levels = 2 ** (scheme.bits - 1) - 1 if scheme.symmetric else 2**scheme.bits - 1
    use(model, function)
    attributes = {"levels": ir.AttrFloat32("levels", float(levels))}
    x = value
    if ordinary is not None:
        kept = ordinary.astype(np.float32)
        mask = new_initializer(model, f"{value.name}.ordinary_channels", kept, workspace)
        x = _after(value, "Mul", [value, mask], {}, f"{value.name}.ordinary")
        x.type, x.shape = value.type, value.shape
    result = _after(x, function, [x], attributes, f"{value.name}.per_token", DOMAIN)
    result.type, result.shape = value.type, value.shape
    _redirect(readers, result)


def quantize_cache(
    model: ir.Model, cache: Cache, scheme: ActivationScheme, centre: np.ndarray | None, workspace: Workspace
) -> None:
    """Let ``cache`` be joined by tokens on the grid of the per-token function, around ``centre``.

    centre: (1, heads, 1, width), or None for zero
    """
    value = cache.new
    if centre is not None:
        held = new_initializer(model, f"{cache.name}.centre", centre, workspace)
        value = _after(value, "Sub", [cache.new, held], {}, f"{cache.name}.centred")
        value.type, value.shape = cache.new.type, cache.new.shape
        back = _after(value, "Add", [value, held], {}, f"{cache.name}.new")
        back.type, back.shape = cache.new.type, cache.new.shape
        adder = back.producer()
        assert adder is not None
        quantize_per_token(model, value, [(adder, 0)], scheme, workspace)
        _redirect([(cache.node, 1)], back)
        return
    quantize_per_token(model, value, [(cache.node, 1)], scheme, workspace)


def clip_tokens(model: ir.Model, value: ir.Value, readers: Readers, reach: float) -> None:
    """Let ``readers`` read ``value`` with each row cut to ``reach``, a share, of its own range."""
    use(model, "ClipTokens")
    attributes = {"reach": ir.AttrFloat32("reach", reach)}
    result = _after(value, "ClipTokens", [value], attributes, f"{value.name}.cut", DOMAIN)
    result.type, result.shape = value.type, value.shape
    _redirect(readers, result)


def open_clips(model: ir.Model) -> None:
    """Let every ``clip_tokens`` of the model keep the whole range."""
    for node in model.graph:
        if is_op(node, "ClipTokens"):
            node.attributes["reach"] = ir.AttrFloat32("reach", 1.0)


def switch(
    model: ir.Model,
    readers: Readers,
    values: tuple[ir.Value, ir.Value],
    flag: tuple[ir.Value, int],
    workspace: Workspace,
) -> None:
    """Let ``readers`` read the second of ``values`` in a run where ``flag`` is set, else the first.

    ``flag``: a bool vector and the index in it. Both values come from nodes in front of the readers, and the second is
    made before the first.
    """
    now, other = values
    flags, index = flag
    place = new_initializer(model, f"{flags.name}.place", np.array(index, np.int64), workspace)
    is_set = _after(now, "Gather", [flags, place], {"axis": ir.AttrInt64("axis", 0)}, f"{now.name}.flag")
    is_set.type, is_set.shape = ir.TensorType(ir.DataType.BOOL), ir.Shape([])
    chosen = _after(is_set, "Where", [is_set, other, now], {}, f"{now.name}.switched")
    chosen.type, chosen.shape = now.type, now.shape
    _redirect(readers, chosen)


def quantize_linear_weight(
    model: ir.Model, linear: Linear, codes: QuantizedWeight, workspace: Workspace
) -> None:
    """Replace W of ``linear`` (not a tied head) by its codes, dequantised; W goes when nobody reads it."""
    floats, axis = linear.node.inputs[1], 1 if codes.group_size is None else 0
    dequantized = _dequantized(model, linear.name, codes, workspace, axis)
    model.graph.insert_before(linear.node, dequantized.producer())  # type: ignore[arg-type]
    linear.node.replace_input_with(1, dequantized)
    _drop_unused(model, floats)


def quantize_table(model: ir.Model, table: ir.Value, codes: QuantizedWeight, workspace: Workspace) -> None:
    """Replace a table (V, C), wherever it is read, by its codes with one scale for each row.

    ``codes`` is of the transposed table: (C, V).
    """
    name = str(table.name)
    rows = QuantizedWeight(np.ascontiguousarray(codes.codes.T), codes.scale, codes.zero_point, None)
    dequantized = _dequantized(model, name, rows, workspace, axis=0)
    first = next(node for node in model.graph if any(v is table for v in node.inputs))
    readers = [(use.node, use.idx) for use in table.uses()]
    model.graph.insert_before(first, dequantized.producer())  # type: ignore[arg-type]
    _redirect(readers, dequantized)
    _drop_unused(model, table)


def _drop_unused(model: ir.Model, value: ir.Value | None) -> None:
    if value is not None and value.is_initializer() and not value.uses() and not value.is_graph_output():
        del model.graph.initializers[str(value.name)]


def _dequantized(
    model: ir.Model, name: str, codes: QuantizedWeight, workspace: Workspace, axis: int
) -> ir.Value:
    held = new_initializer(model, f"{name}.weight_codes", codes.codes, workspace)
    scale = new_initializer(model, f"{name}.weight_scale", codes.scale, workspace)
    zero = new_initializer(model, f"{name}.weight_zero_point", codes.zero_point, workspace)
    attributes = [ir.AttrInt64("axis", axis)]
    if codes.group_size is not None:
        attributes.append(ir.AttrInt64("block_size", min(codes.group_size, codes.codes.shape[0])))
    node = ir.Node("", "DequantizeLinear", [held, scale, zero], attributes, num_outputs=1)
    result = node.outputs[0]
    result.name, result.dtype = f"{name}.dequantized_weight", ir.DataType.FLOAT
    result.shape = ir.Shape(codes.codes.shape)
    return result


def _clipped(model: ir.Model, value: ir.Value, affine: Affine, workspace: Workspace) -> ir.Value:
    low = (affine.low - affine.zero_point).astype(np.float32) * affine.scale
    high = (affine.high - affine.zero_point).astype(np.float32) * affine.scale
    if low.size == 1:
        bounds = [
            new_initializer(model, f"{value.name}.{end}", bound.reshape(()), workspace)
            for end, bound in (("low", low), ("high", high))
        ]
        result = _after(value, "Clip", [value, *bounds], {}, f"{value.name}.clipped")
    else:
        floor = new_initializer(model, f"{value.name}.low", low, workspace)
        ceiling = new_initializer(model, f"{value.name}.high", high, workspace)
        floored = _after(value, "Max", [value, floor], {}, f"{value.name}.floored")
        floored.type, floored.shape = value.type, value.shape
        result = _after(floored, "Min", [floored, ceiling], {}, f"{value.name}.clipped")
    result.type, result.shape = value.type, value.shape
    return result


def _after(
    value: ir.Value,
    op: str,
    inputs: Sequence[ir.Value],
    attributes: dict[str, ir.Attr],
    name: str,
    domain: str = "",
) -> ir.Value:
    """A new node right after the one that makes ``value``, or at the start for a graph input."""
    source = value.producer()
    node = match.new_node(domain, op, inputs, attributes, [source] if source is not None else [])
    node.outputs[0].name = name
    if source is not None and source.graph is not None:
        source.graph.insert_after(source, node)
    else:
        graph = value.graph
        assert graph is not None
        graph.insert_before(next(iter(graph)), node)
    return node.outputs[0]


def _redirect(readers: Readers, value: ir.Value) -> None:
    for node, index in readers:
        node.replace_input_with(index, value)


def table_of(linear: Linear) -> ir.Value:
    """The embedding table behind a tied head."""
    assert linear.transposed and constant_array(linear.weight) is not None
    return linear.weight


def keep_columns(
    model: ir.Model, linear: Linear, columns: np.ndarray, w: np.ndarray, workspace: Workspace
) -> np.ndarray:
    """Multiply the input channels ``columns`` in float beside the rest; returns W with their rows zero.

    x W = x[:, columns] W[columns] + x W', so the quantised input may saturate in those channels. The sum
    takes the name of the product, so that readers and graph outputs keep theirs.
    Source: LLM.int8 (arXiv 2208.07339), with columns fixed at calibration.
    """
    if not columns.size:
        return w
    node, value = linear.node, linear.node.outputs[0]
    name = str(value.name)
    index = new_initializer(model, f"{linear.name}.outlier_columns", columns.astype(np.int64), workspace)
    rows = new_initializer(model, f"{linear.name}.outlier_rows", w[columns], workspace)
    picked = match.new_node("", "Gather", [linear.x, index], {"axis": ir.AttrInt64("axis", -1)}, [node])
    product = match.new_node("", "MatMul", [picked.outputs[0], rows], {}, [node])
    total = match.new_node("", "Add", [value, product.outputs[0]], {}, [node])
    value.replace_all_uses_with(total.outputs[0], replace_graph_outputs=True)
    total.replace_input_with(0, value)
    model.graph.insert_after(node, [picked, product, total])
    value.name = f"{name}.without_outliers"
    names = {picked: f"{name}.outliers", product: f"{name}.outlier_product", total: name}
    for made, called in names.items():
        made.outputs[0].name, made.outputs[0].type = called, value.type
    total.outputs[0].shape = value.shape
    zeroed = w.copy()
    zeroed[columns] = 0
    return zeroed


def quantize_attention(
    model: ir.Model, node: ir.Node, operands: Sequence[Affine], workspace: Workspace
) -> None:
    """Quantise queries, keys, values (``operands``) and probabilities (range 0..1) of an attention node.

    The node is written out, since the probabilities live inside it.
    """
    for index, affine in enumerate(operands):
        value = node.inputs[index]
        assert value is not None
        quantize_static(model, value, [(node, index)], affine, workspace)
    p, product = spell_out_attention(model, node, workspace)
    bits_high = operands[0].high - operands[0].low
    unit = Affine(np.asarray(1 / bits_high, np.float32), np.zeros((), np.int32), 0, bits_high)
    quantize_static(model, p, [(product, 0)], unit, workspace)


def spell_out_attention(model: ir.Model, node: ir.Node, workspace: Workspace) -> tuple[ir.Value, ir.Node]:
    """Replace Attention or GroupedAttention by its body; returns the probabilities and the last MatMul."""
    q, k, v, bias = node.inputs
    graph = node.graph
    assert graph is not None and k is not None and v is not None
    made: list[ir.Node] = []

    def add(op: str, inputs: Sequence[ir.Value | None], suffix: str, *attributes: ir.Attr) -> ir.Value:
        made.append(match.new_node("", op, inputs, {a.name: a for a in attributes}, [node]))
        result = made[-1].outputs[0]
        result.name, result.dtype = f"{node.outputs[0].name}.{suffix}", ir.DataType.FLOAT
        return result

    groups = match.int_attribute(node, "groups", 1)
    if groups > 1:
        k, v = (_repeated(model, x, groups, name, add, workspace) for x, name in ((k, "k"), (v, "v")))
    scale = np.asarray(node.attributes["scale"].as_float(), np.float32)
    alpha = new_initializer(model, "attention_scale", scale, workspace)
    keys = add("Transpose", [k], "keys", ir.AttrInt64s("perm", [0, 1, 3, 2]))
    scores = add("MatMul", [q, keys], "scores")
    biased = add("Add", [add("Mul", [scores, alpha], "scaled"), bias], "biased")
    p = add("Softmax", [biased], "probabilities", ir.AttrInt64("axis", -1))
    graph.insert_before(node, made)
    product = match.new_node("", "MatMul", [p, v], {}, [node])
    match.put_instead(node, product)
    return p, product


def _repeated(
    model: ir.Model,
    value: ir.Value,
    groups: int,
    name: str,
    add: Callable[..., ir.Value],
    workspace: Workspace,
) -> ir.Value:
    """Each head of (B, H, S, d) ``groups`` times in a row."""
    axis = new_initializer(model, "head_axis", np.array([2], np.int64), workspace)
    counts = new_initializer(model, "head_repeat", np.array([1, 1, groups, 1, 1], np.int64), workspace)
    flat = new_initializer(model, "head_flat", np.array([0, -1], np.int64), workspace)
    tail = add("Shape", [value], f"{name}_tail", ir.AttrInt64("start", 2))
    tail.dtype = ir.DataType.INT64
    shape = add("Concat", [flat, tail], f"{name}_shape", ir.AttrInt64("axis", 0))
    shape.dtype = ir.DataType.INT64
    wide = add("Expand", [add("Unsqueeze", [value, axis], f"{name}_5d"), counts], f"{name}_wide")
    return add("Reshape", [wide, shape], f"{name}_heads")
