"""What each operator of the quantised graph becomes in integers."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompile.graph.canonical import match
from qcompile.graph.edits import constant_array
from qcompile.integer import attention, elementwise, positions
from qcompile.integer.convert import Converter, Refused, Rule
from qcompile.integer.elementwise import product_of, scale
from qcompile.integer.emit import LIMIT, check_bound
from qcompile.integer.grids import MOVES, NARROW_BITS, WIDE_BITS, epsilon_of
from qcompile.integer.values import Codes, Rows, Sums, Table, Weight, Wide
from qcompile.quant.integer import fit

NORM_PLACES = 20  # of a normalised row
NORM_BOUND = 2**26
MOST_CHANNELS = 2**14  # of a normalised row
SIGMAS = 4
CODE_PLACES = 21  # zeros behind a code, so that scaling it rounds late
U8, I8, I32 = ir.DataType.UINT8, ir.DataType.INT8, ir.DataType.INT32


# --------------------------------------------------------------------------- codes


def quantize(c: Converter, node: ir.Node) -> None:
    """QuantizeLinear with one scale: codes of the grid's numbers."""
    factors = constant_array(node.inputs[1])
    zero = constant_array(node.inputs[2]) if len(node.inputs) > 2 else np.zeros((), np.uint8)
    if factors is None or zero is None or factors.size != 1 or zero.size != 1:
        raise Refused("activations have no one scale that is constant")
    if zero.dtype != np.uint8:
        raise Refused(f"codes are {zero.dtype}, not uint8")
    x = c.wide(node.inputs[0])
    step, middle = float(factors.reshape(-1)[0]), int(zero.reshape(-1)[0])
    steps = c.emit.requantize(x.value, x.bound, np.float64(2.0**-x.places / step), -middle, 255 - middle)
    codes = c.emit.cast(c.emit.put("Add", [steps, c.emit.int32(middle)]), U8)
    c.held[id(node.outputs[0])] = Codes(codes, step, middle)


def dequantize(c: Converter, node: ir.Node) -> None:
    """DequantizeLinear of codes, of a weight's matrix or of a table."""
    source = node.inputs[0]
    held = c.held.get(id(source))
    if isinstance(held, Codes):
        c.held[id(node.outputs[0])] = held
        return
    codes, scale = constant_array(source), constant_array(node.inputs[1])
    if codes is None or scale is None or source is None:
        raise Refused("codes that are not quantised here")
    zero = constant_array(node.inputs[2]) if len(node.inputs) > 2 else None
    if zero is not None and zero.any():
        raise Refused("weights have zero points")
    if codes.ndim != 2 or codes.dtype != np.int8:
        raise Refused(f"weights are {codes.dtype} of {codes.ndim} axes, not an int8 matrix")
    if match.int_attribute(node, "block_size", 0):
        raise Refused("weights have one scale for each group of rows")
    result = node.outputs[0]
    if match.int_attribute(node, "axis", 1) % 2 == 1:
        c.held[id(result)] = Weight(source, codes, np.broadcast_to(scale, codes.shape[1:]))
    else:
        c.held[id(result)] = Table(source, codes, np.broadcast_to(scale, codes.shape[:1]))


def per_token(c: Converter, node: ir.Node) -> None:
    """The range of each token, found in integers."""
    x = c.wide(node.inputs[0])
    levels = int(node.attributes["levels"].as_float())
    symmetric = node.op_type == "FakeQuantizePerTokenSymmetric"
    bits = (levels + 1).bit_length() - 1 + (1 if symmetric else 0)
    op = "QuantizePerTokenIntegerSymmetric" if symmetric else "QuantizePerTokenInteger"
    made = c.emit.put_all(op, [x.value], [U8, I32, I32, I32], bits=bits)
    made[0].shape = node.outputs[0].shape
    c.held[id(node.outputs[0])] = Rows(made[0], made[1], made[2], made[3], x.places, bits)


# --------------------------------------------------------------------------- products


def product(c: Converter, node: ir.Node) -> None:
    """MatMul of codes and a constant matrix."""
    x, w = c.get(node.inputs[0]), c.get(node.inputs[1])
    if not isinstance(w, Weight) or not isinstance(x, Codes | Rows):
        raise Refused("a product of numbers that are not both codes")
    matrix = c.emit.put("Transpose", [w.source], I8, perm=[1, 0]) if w.transposed else w.source
    sizes = np.abs(w.codes.astype(np.int64)).sum(axis=0)
    if isinstance(x, Codes):
        steps = max(x.zero, 255 - x.zero)
        zero = c.emit.constant(np.asarray(x.zero, np.uint8), "zero")
        sums = c.emit.put("MatMulInteger", [x.value, matrix, zero])
        factor = w.scale.astype(np.float64) * x.scale
        held = Sums(sums, factor, int(steps * sizes.max()))
    else:
        raw = c.emit.put("MatMulInteger", [x.codes, matrix])
        columns = w.codes.astype(np.int64).sum(axis=0).astype(np.int32)
        shift = c.emit.put("Mul", [x.zero, c.emit.int32(columns, "column_sums")])
        sums = c.emit.put("Sub", [raw, shift])
        most = 2**x.bits - 1
        bound = 2 * most * int(sizes.max())  # of both terms of the difference
        held = Sums(sums, w.scale.astype(np.float64), bound, x, most * _likely(w.codes))
    check_bound(held.bound, "the sum of a product", str(node.name))
    c.held[id(node.outputs[0])] = held


def _likely(codes: np.ndarray) -> float:
    """How large |sum_k x_k w_k| becomes where every |x_k| <= 1, by the largest column.

    Terms of random signs have the column's norm as standard deviation; SIGMAS of them, but at least a quarter of what
    all terms of one sign would reach, and at most that.
    """
    matrix = codes.astype(np.float64)
    most = float(np.abs(matrix).sum(axis=0).max())
    return max(most / 4, min(most, SIGMAS * float(np.sqrt(np.square(matrix).sum(axis=0)).max())))


def transpose(c: Converter, node: ir.Node) -> None:
    held = c.held.get(id(node.inputs[0]))
    if isinstance(held, Table):
        if held.scale is None:
            raise Refused("a float table as a matrix")
        c.held[id(node.outputs[0])] = Weight(held.source, held.array.T, held.scale, transposed=True)
        return
    move(c, node)


# --------------------------------------------------------------------------- sums and elementwise


def add(c: Converter, node: ir.Node) -> None:
    left, right = node.inputs
    for value, other in ((left, right), (right, left)):
        if constant_array(other) is not None and constant_array(value) is None:
            _add_constant(c, node, value, other)
            return
    _total(c, node, [c.wide(left), c.wide(right)])


def _total(c: Converter, node: ir.Node, operands: list[Wide | ir.Value | None]) -> None:
    """The sum or difference of numbers and float constants, on the coarsest of their grids and the result's.

    On the result's alone, large numbers that nearly cancel would saturate before they do.
    """
    result = node.outputs[0]
    bound, fine = c.bound(result), c.places(result)
    places = min(fine, *(one.places for one in operands if isinstance(one, Wide)))
    widest = 2**WIDE_BITS
    given = [
        c.emit.rescaled(one, places, widest).value if isinstance(one, Wide) else c.constant(one, places)
        for one in operands
    ]
    total = c.emit.put(node.op_type, given)
    if places == fine:
        c.put(node, c.emit.clip(total, -bound, bound), bound)
    else:
        c.put(node, c.emit.rescaled(Wide(total, places, widest + LIMIT), fine, bound).value, bound)


def _add_constant(c: Converter, node: ir.Node, value: ir.Value | None, constant: ir.Value | None) -> None:
    """Numbers and a constant: value + constant, value - constant or constant - value."""
    held, array = c.held.get(id(value)), constant_array(constant)
    assert array is not None
    result = node.outputs[0]
    minus = node.op_type == "Sub"
    turned = minus and value is not node.inputs[0]
    if isinstance(held, Sums) and held.rows is None and _is_row(array, held.factor.size):
        factor = -held.factor if turned else held.factor
        bias = _whole((-array if minus and not turned else array).astype(np.float64).reshape(-1), factor)
        if bias is not None and held.bound + np.abs(bias).max() < LIMIT:
            total = c.emit.put("Add", [held.value, c.emit.int32(bias.astype(np.int32), "bias")])
            c.held[id(result)] = Sums(total, factor, held.bound + int(np.abs(bias).max()))
            return
    x = c.wide(value)
    _total(c, node, [constant, x] if turned else [x, constant])


def _is_row(array: np.ndarray, columns: int) -> bool:
    """Whether it is one number, or one for each column."""
    return array.size == 1 or array.size == array.shape[-1] == columns


def _whole(bias: np.ndarray, factor: np.ndarray) -> np.ndarray | None:
    """``bias`` in units of ``factor``; None where a column has none, or where no integer holds it."""
    if not factor.all():
        return None
    found: np.ndarray = np.rint(bias / factor)
    return found if np.abs(found).max(initial=0) < LIMIT else None


def multiply(c: Converter, node: ir.Node) -> None:
    left, right = node.inputs
    for value, other in ((left, right), (right, left)):
        array = constant_array(other)
        if array is not None and constant_array(value) is None:
            scale(c, node, c.wide(value), array.astype(np.float64))
            return
    a, b = c.wide(left), c.wide(right)
    result = node.outputs[0]
    places, bound = c.places(result), c.bound(result)
    c.put(node, product_of(c, a, b, places, bound), bound)


# --------------------------------------------------------------------------- norms and tables


def norm(c: Converter, node: ir.Node) -> None:
    """The row is normalised; gain and offset follow in one rescaling."""
    x, result = c.wide(node.inputs[0]), node.outputs[0]
    gain, shift = constant_array(node.inputs[1]), node.inputs[2] if len(node.inputs) > 2 else None
    offset = constant_array(shift)
    if gain is None or (shift is not None and offset is None):
        raise Refused("the gain or offset of a norm is computed")
    rank = len(result.shape) if result.shape is not None else None
    if rank is None or match.int_attribute(node, "axis", -1) not in (-1, rank - 1):
        raise Refused("a norm over more than the last axis")
    channels = result.shape[-1] if result.shape is not None else None
    if isinstance(channels, int) and channels > MOST_CHANNELS:
        raise Refused(f"a norm over {channels} channels, more than {MOST_CHANNELS}")
    op = "IntegerLayerNorm" if node.op_type == "LayerNormalization" else "IntegerRMSNorm"
    epsilon = round(epsilon_of(node) * 4.0**x.places)
    normal = c.emit.put(op, [x.value], epsilon=min(epsilon, 2**29 - 1))
    places, bound = c.places(result), c.bound(result)
    value = c.emit.requantize(
        normal, NORM_BOUND, gain.astype(np.float64) * 2.0 ** (places - NORM_PLACES), -bound, bound
    )
    if offset is not None and offset.any():
        value = c.emit.clip(c.emit.put("Add", [value, c.constant(shift, places)]), -bound, bound)
    c.put(node, value, bound)


def gather(c: Converter, node: ir.Node) -> None:
    """Rows of a table."""
    table, rows = node.inputs
    result = node.outputs[0]
    axis = match.int_attribute(node, "axis", 0)
    held, array = c.held.get(id(table)), constant_array(table)
    if isinstance(held, Wide):
        c.put(node, c.emit.put("Gather", [held.value, rows], axis=axis), held.bound, held.places)
        return
    places, bound = c.places(result), c.bound(result)
    if array is not None and axis == 0:
        codes = np.rint(array.astype(np.float64) * 2.0**places)
        if not np.abs(codes).max(initial=0) <= bound:  # NaN neither
            raise Refused("a table reaches further than calibration saw")
        constant = c.emit.int32(codes.astype(np.int32), f"{table.name}.integer")  # type: ignore[union-attr]
        c.put(node, c.emit.put("Gather", [constant, rows], axis=0), bound)
        return
    if not isinstance(held, Table) or held.scale is None or axis:
        raise Refused("a table that is not constant")
    picked = c.emit.cast(c.emit.put("Gather", [held.source, rows], I8, axis=0), I32)
    wide = c.emit.put("Mul", [picked, c.emit.int32(2**CODE_PLACES)])
    m, d, lift = fit(held.scale.astype(np.float64)[:, None] * 2.0 ** (places - CODE_PLACES))
    if lift:
        raise Refused("a table's scales are too large for its grid")
    m, d = np.broadcast_to(m, (len(held.scale), 1)), np.broadcast_to(d, (len(held.scale), 1))
    each = [c.emit.put("Gather", [c.emit.int32(np.ascontiguousarray(v), f"{result.name}.scale"), rows], axis=0)
            for v in (m, d)]  # fmt: skip
    c.put(node, c.emit.put("Requantize", [wide, *each], low=-bound, high=bound), bound)


def rotary(c: Converter, node: ir.Node) -> None:
    x = c.wide(node.inputs[0])
    try:
        turns = [c.turn(v) for v in node.inputs[1:3] if v is not None]
    except positions.NoTable as error:
        raise Refused(f"its cosines are no function of one position: {error}") from error
    x = c.emit.rescaled(x, x.places, 2**NARROW_BITS)
    made = c.emit.put("IntegerRotaryEmbedding", [x.value, *turns])
    c.put(node, made, 2 * x.bound, x.places)


def move(c: Converter, node: ir.Node) -> None:
    """The same operator on the integers."""
    if constant_array(node.inputs[0]) is not None:
        result = node.outputs[0]
        x = Wide(c.constant(node.inputs[0], c.places(result)), c.places(result), c.bound(result))
    else:
        x = c.wide(node.inputs[0])
    attributes = {a.name: a.value for a in node.attributes.values()}
    made = c.emit.put_all(node.op_type, [x.value, *node.inputs[1:]], [I32] * len(node.outputs), **attributes)
    for old, new in zip(node.outputs, made, strict=True):
        new.shape = old.shape
        c.held[id(old)] = Wide(new, x.places, x.bound)


def concat(c: Converter, node: ir.Node) -> None:
    result = node.outputs[0]
    places, bound = c.places(result), c.bound(result)
    parts = [c.operand(v, places, bound) for v in node.inputs]
    c.put(node, c.emit.put("Concat", parts, axis=match.int_attribute(node, "axis", 0)), bound)


def shape(c: Converter, node: ir.Node) -> None:
    """The shape of integers is that of the numbers."""
    value = node.inputs[0]
    if value in c.model.graph.inputs and str(value.name) in c.grids.places:  # type: ignore[union-attr]
        c.wide(value)
    held = c.held.get(id(value))
    if isinstance(held, Wide | Sums | Codes):
        node.replace_input_with(0, held.value)
    elif isinstance(held, Rows):
        node.replace_input_with(0, held.codes)


RULES: dict[str, Rule] = {
    "QuantizeLinear": quantize,
    "DequantizeLinear": dequantize,
    "FakeQuantizePerToken": per_token,
    "FakeQuantizePerTokenSymmetric": per_token,
    "MatMul": product,
    "Add": add,
    "Sub": add,
    "Mul": multiply,
    **elementwise.RULES,
    "LayerNormalization": norm,
    "RMSNormalization": norm,
    "Gather": gather,
    "RotaryEmbedding": rotary,
    "Attention": attention.attention,
    "GroupedAttention": attention.attention,
    "Concat": concat,
    "Shape": shape,
    "Size": shape,
    **dict.fromkeys(MOVES, move),
    "Transpose": transpose,
}
