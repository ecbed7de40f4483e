"""Matrices folded into the weights around a residual stream, a value path or a down projection.

    residual: writers W C R and b C R, tables E C R        readers R^T diag(gamma) W and b + beta W, norms without gain
    v_o:      columns W_v T_h and bias b_v T_h of a head    rows T_h^-1 W_o of every query head that it serves
    down:     x -> x H in blocks, at run time               rows H^T W
R and H are orthogonal, T invertible; C = 1 - 11^T / d takes the mean off where the norms are LayerNorms, which then
are RMSNorms.
Computed in float64, cast once. Source: QuaRot (arXiv 2404.00456), SpinQuant (2405.16406), section 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from qcompile.graph import functions
from qcompile.graph.canonical import match
from qcompile.graph.edits import constant_array, new_initializer, own_initializer, replace_constant
from qcompile.graph.fold import add_bias, renewed, store
from qcompile.graph.functions import is_op
from qcompile.graph.linears import Linear
from qcompile.graph.residual import NormReader, Stream, scaled_lookup
from qcompile.graph.sites import Site
from qcompile.graph.workspace import Workspace

ROWS = 4096  # of a table that are turned at a time
DAMPING = 1e-3  # of the mean of a moment's diagonal: channels hardly seen get no extreme scale


def hadamard(size: int) -> np.ndarray:
    """The normalised Hadamard matrix of Sylvester's construction, (size, size) float64; size is a power of two."""
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return np.asarray(matrix / np.sqrt(len(matrix)))


def power_of_two_in(size: int) -> int:
    """The largest power of two that divides ``size``."""
    return size & -size


def random_rotation(size: int, random: np.random.Generator) -> np.ndarray:
    """A random orthogonal matrix that spreads every channel over all: (size, size) float64.

    Random signs, then Hadamard on the power of two in ``size`` (x) a random orthogonal matrix on the rest (QuaRot,
    section 3, has tables of Hadamard matrices for some sizes; this serves all).
    """
    power = power_of_two_in(size)
    signs = random.choice((-1.0, 1.0), size)
    q, r = np.linalg.qr(random.standard_normal((size // power, size // power)))
    return np.asarray(signs[:, None] * np.kron(q * np.sign(np.diag(r)), hadamard(power)))


def blocked_rotation(order: np.ndarray, block: int, random: np.random.Generator) -> np.ndarray:
    """A rotation that spreads each channel over those next to it in ``order`` (d,) alone: (d, d) float64, orthogonal.

    Runs of ``block`` channels, the last one maybe shorter, become as many channels by ``random_rotation``.
    """
    rotation = np.zeros((len(order), len(order)))
    for start in range(0, len(order), block):
        run = order[start : start + block]
        rotation[run, start : start + len(run)] = random_rotation(len(run), random)
    return rotation


def balancing_matrix(inputs: np.ndarray, weights: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """The invertible T (n, n) between inputs x and weights W that leaves rounding the least to spoil, float64.

    ``inputs`` and ``weights`` (n, n): second moments, the means of x^T x and of W W^T. Rounding x T and multiplying it
    by T^-1 W loses as much as |x T|^2 |T^-1 W|^2 is large. The least has T T^T = G = ``inputs``^-1 # ``weights``, the
    geometric mean of two matrices, and x T and T^-1 W then have one second moment: its axes are spread evenly over the
    n channels by ``random_rotation``.
    """
    h, m = (DAMPING * np.trace(a) / len(a) * np.eye(len(a)) + a for a in (inputs, weights))
    root, inverse = _power(h, 0.5), _power(h, -0.5)
    half = _power(inverse @ _power(root @ m @ root, 0.5) @ inverse, 0.5)
    axes = np.linalg.eigh(half @ h @ half)[1]
    return np.asarray(half @ axes @ random_rotation(len(h), random))


def _power(matrix: np.ndarray, exponent: float) -> np.ndarray:
    """Of a symmetric positive matrix."""
    values, vectors = np.linalg.eigh(np.asarray(matrix, np.float64))
    return np.asarray((vectors * np.maximum(values, np.finfo(np.float64).tiny) ** exponent) @ vectors.T)


# --------------------------------------------------------------------------- the residual stream


def rotate_streams(model: ir.Model, streams: Sequence[Stream], rotation: np.ndarray, workspace: Workspace) -> int:
    """Change the basis of ``streams``, all of the width of ``rotation`` (d, d); returns the heads that got a table.

    A head that shares its table with an embedding gets one of its own: the last norm's gain belongs to the head alone,
    and no diagonal stands between them once they are rotated.
    """
    untied = sum(_untie(model, head, workspace) for stream in streams for head in stream.tied_heads)
    for product in {id(node): node for stream in streams for node in stream.scaled}.values():
        _scale_table(model, product, workspace)
    constants: dict[bool, list[tuple[ir.Node, int]]] = {True: [], False: []}
    for stream in streams:
        turn = _centred(rotation) if stream.centred else rotation
        constants[stream.centred] += stream.constants
        for linear in stream.linears:
            _turn_columns(model, linear, turn, workspace)
        for patch in stream.patches:
            _turn_patches(model, patch, turn, workspace)
        for norm in stream.norms:
            _turn_reader(model, norm, rotation, workspace)
        for linear in stream.direct:
            _turn_rows(model, renewed(linear), rotation, workspace)
    for centred, places in constants.items():
        _turn_constants(model, places, _centred(rotation) if centred else rotation, workspace)
    return untied


def _centred(rotation: np.ndarray) -> np.ndarray:
    """C R with C = 1 - 11^T / d."""
    return np.asarray(rotation - rotation.mean(axis=0, keepdims=True))


def _turned(array: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """``array @ matrix`` in float64, some rows at a time, as float32: (..., d)."""
    rows = array.reshape(-1, array.shape[-1])
    result = np.empty((len(rows), matrix.shape[1]), np.float32)
    for start in range(0, len(rows), ROWS):
        result[start : start + ROWS] = rows[start : start + ROWS].astype(np.float64) @ matrix
    return result.reshape(*array.shape[:-1], matrix.shape[1])


def _scale_table(model: ir.Model, product: ir.Node, workspace: Workspace) -> None:
    """table[ids] * c  ->  (table * c)[ids]: what an earlier fold took apart for the head that shared the table."""
    lookup, found = scaled_lookup(product), match.constant_operand(product)
    assert lookup is not None and found is not None
    rows, factor = found
    table = constant_array(lookup.inputs[0])
    assert table is not None
    scaled = np.multiply(table, factor, out=np.empty_like(table), dtype=np.float64, casting="same_kind")
    store(model, lookup, 0, scaled, workspace)
    product.outputs[0].replace_all_uses_with(rows)
    model.graph.remove(product, safe=True)


def _turn_columns(model: ir.Model, linear: Linear, matrix: np.ndarray, workspace: Workspace) -> None:
    node, index = linear.holder
    store(model, node, index, _turned(linear.w, matrix), workspace)
    if linear.add is not None and linear.bias is not None:
        store(model, linear.add, 1, _turned(linear.bias, matrix), workspace)


def _turn_rows(model: ir.Model, linear: Linear, rotation: np.ndarray, workspace: Workspace) -> None:
    """W' = R^T W, for every expert where there are some."""
    node, index = linear.holder
    rows = _turned(np.swapaxes(linear.w, -1, -2), rotation)
    store(model, node, index, np.ascontiguousarray(np.swapaxes(rows, -1, -2)), workspace)


def _turn_patches(model: ir.Model, node: ir.Node, matrix: np.ndarray, workspace: Workspace) -> None:
    for index in range(1, len(node.inputs)):
        held = constant_array(node.inputs[index])
        if held is not None:
            turned = _turned(np.moveaxis(held, 0, -1), matrix)
            store(model, node, index, np.ascontiguousarray(np.moveaxis(turned, -1, 0)), workspace)


def _turn_constants(
    model: ir.Model, places: Sequence[tuple[ir.Node, int]], matrix: np.ndarray, workspace: Workspace
) -> None:
    """Each constant once; one that is read elsewhere too is copied for these readers first."""
    readers: dict[int, list[tuple[ir.Node, int]]] = {}
    for node, index in places:
        readers.setdefault(id(node.inputs[index]), []).append((node, index))
    for found in readers.values():
        value = found[0][0].inputs[found[0][1]]
        assert value is not None
        array = constant_array(value)
        assert array is not None
        if not value.is_initializer() or len(list(value.uses())) > len(found):
            (node, index), *rest = found
            value = own_initializer(model, node, index)
            for other, place in rest:
                other.replace_input_with(place, value)
        replace_constant(value, _turned(array, matrix), workspace)


def _turn_reader(model: ir.Model, norm: NormReader, rotation: np.ndarray, workspace: Workspace) -> None:
    """Fold the norm's gain and offset into the linears, then turn their rows; the norm has neither any more."""
    node = norm.node
    gamma = np.asarray(constant_array(node.inputs[1]), np.float64)
    beta = constant_array(node.inputs[2]) if len(node.inputs) > 2 else None
    for linear in map(renewed, norm.linears):
        if beta is not None and beta.any():
            add_bias(model, linear, np.asarray(beta, np.float64) @ np.asarray(linear.w, np.float64), workspace)
        _turn_rows(model, renewed(linear), gamma[:, None] * rotation, workspace)
    if is_op(node, "LayerNormalization"):
        node = _without_mean(model, node)
    store(model, node, 1, np.ones_like(gamma), workspace)


def _without_mean(model: ir.Model, node: ir.Node) -> ir.Node:
    """The RMSNorm that a LayerNorm is on rows whose mean is zero."""
    functions.use(model, "RMSNormalization")
    epsilon = node.attributes.get("epsilon")
    attributes = {"epsilon": epsilon if epsilon is not None else ir.AttrFloat32("epsilon", 1e-5)}
    made = match.new_node(functions.DOMAIN, "RMSNormalization", list(node.inputs[:2]), attributes, [node])
    match.put_instead(node, made)
    return made


def _untie(model: ir.Model, head: Linear, workspace: Workspace) -> int:
    """Give a tied head a matrix (K, N) of its own."""
    if not head.transposed:
        return 0
    transpose = head.holder[0]
    held = new_initializer(model, f"{head.name}.weight", np.ascontiguousarray(head.w), workspace)
    head.node.replace_input_with(1, held)
    if not list(transpose.outputs[0].uses()):
        model.graph.remove(transpose, safe=True)
    return 1


# --------------------------------------------------------------------------- values, and the input of a linear


def rotate_values(model: ir.Model, site: Site, matrices: np.ndarray, workspace: Workspace) -> None:
    """Turn the values of each key-value head by its matrix of ``matrices`` (kv heads, d, d), invertible.

    Attention mixes tokens alone, so it passes the turn on to the rows of the output projection.
    """
    assert site.source is not None and site.heads is not None
    columns, rows = site.heads
    source, reader = renewed(site.source), renewed(site.linears[0])
    w = np.array(source.w, np.float64)
    bias = None if source.bias is None else np.array(source.bias, np.float64)
    for head, matrix in zip(columns, matrices, strict=True):
        w[:, head] = w[:, head] @ matrix
        if bias is not None:
            bias[head] = bias[head] @ matrix
    store(model, *source.holder, w, workspace)
    if source.add is not None and bias is not None:
        store(model, source.add, 1, bias, workspace)
    store(model, *reader.holder, turned_rows(reader.w, rows, np.linalg.inv(matrices)), workspace)


def turned_rows(w: np.ndarray, rows: np.ndarray, matrices: np.ndarray) -> np.ndarray:
    """W (K, N) with its ``rows`` (kv heads, times, d) multiplied by their heads' ``matrices`` (kv heads, d, d)."""
    result = np.array(w, np.float64)
    for head, matrix in zip(rows, matrices, strict=True):
        for places in head:
            result[places] = matrix @ result[places]
    return result


def insert_rotation(model: ir.Model, linear: Linear, block: np.ndarray, workspace: Workspace) -> ir.Value:
    """Turn each run of n channels of the linear's input at run time by ``block`` (n, n), orthogonal; the new input.

    x -> RotateBlocks(x, block), and W' = diag(block, ..., block)^T W.
    """
    functions.use(model, "RotateBlocks")
    held = new_initializer(model, f"{linear.x.name}_rotation", block.astype(np.float32), workspace)
    node = match.new_node(functions.DOMAIN, "RotateBlocks", [linear.x, held], {}, [linear.node])
    model.graph.insert_before(linear.node, node)
    turned = node.outputs[0]
    turned.name, turned.type, turned.shape = f"{linear.x.name}_rotated", linear.x.type, linear.x.shape
    linear.node.replace_input_with(0, turned)
    store(model, *linear.holder, turned_blocks(linear.w, block), workspace)
    return turned


def turned_blocks(w: np.ndarray, block: np.ndarray) -> np.ndarray:
    """diag(block, ..., block)^T W for W (K, N)."""
    blocks = np.asarray(w, np.float64).reshape(-1, len(block), w.shape[1])
    return np.asarray((block.T @ blocks).reshape(w.shape))
