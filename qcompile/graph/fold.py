"""Fold a per-channel shift z and scale s of a site's tensor into the weights around it.

    x~ = (x - z) / s                      what the consumers will read
    norm:   gamma' = gamma / s, beta' = (beta - z) / s         v_o, up_down: columns and bias of the source
    q_k:    columns of k / s, columns of q * s
    linear: W' = diag(s) W, b' = b + z W  (W before scaling)    other readers: x~ * s + z is inserted
Computed in float64, cast once. Source: Outlier Suppression+ (arXiv 2304.09145), Eq. 1-4 and Fig. 2.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from qcompile.errors import ContractError, UserError
from qcompile.graph.canonical import match
from qcompile.graph.edits import constant_array, new_initializer, own_initializer, replace_constant
from qcompile.graph.functions import is_op
from qcompile.graph.linears import Linear, as_experts, as_linear
from qcompile.graph.readers import Other, table_readers
from qcompile.graph.sites import Site
from qcompile.graph.workspace import Workspace


def fold(model: ir.Model, site: Site, scale: np.ndarray, shift: np.ndarray, workspace: Workspace) -> int:
    """Apply ``(x - shift) / scale`` to ``site``; both (channels of the producer,). Returns inserted nodes.

    Raises UserError when a folded weight is not finite, ContractError for a site that has a reason.
    """
    if site.reason:
        raise ContractError(f"the site cannot be folded: {site.reason}", where=site.name)
    s, z = np.asarray(scale, np.float64), np.asarray(shift, np.float64)
    if site.kind == "q_k":
        return _fold_q_k(model, site, s, z, workspace)
    if z.any() and site.experts:
        raise UserError("a shift would need a bias for each expert", where=site.name, hint="scale only")
    carrier = _produce(model, site, s, z, workspace)
    s_in, z_in = (s, z) if site.expand is None else (s[site.expand], z[site.expand])
    added = sum(
        compensate(model, linear, s_in, z_in, workspace) for linear in map(renewed, (*site.linears, *site.experts))
    )
    return added + int(carrier is not site.tensor) + _restore_others(model, site, carrier, s, z, workspace)


def insert(model: ir.Model, site: Site, scale: np.ndarray, shift: np.ndarray, workspace: Workspace) -> int:
    """Transform the linears' common input at run time, where the producer cannot absorb it.

    Returns the number of inserted nodes. Raises UserError when the linears read different views of it.
    """
    s, z = np.asarray(scale, np.float64), np.asarray(shift, np.float64)
    s, z = (s, z) if site.expand is None else (s[site.expand], z[site.expand])
    if site.kind == "q_k" or site.experts or len({id(linear.x) for linear in site.linears}) != 1:
        raise UserError("readers see the tensor through different views", where=site.name, hint="fold instead")
    changed = _affine_nodes(model, site.linears[0].x, 1 / s, -z / s, workspace)
    added = 2 if z.any() else 1
    for linear in map(renewed, site.linears):
        linear.node.replace_input_with(0, changed)
        added += compensate(model, linear, s, z, workspace)
    return added


def compensate(model: ir.Model, linear: Linear, s: np.ndarray, z: np.ndarray, workspace: Workspace) -> int:
    """W' = diag(s) W and b' = b + z W for one reader; a missing bias is made when z is not zero.

    A tied head keeps sharing its table: what the embedding looks up is divided by s. Returns the inserted nodes.
    """
    if z.any():
        if linear.chosen:
            raise UserError("a shift would need a bias for each expert", where=linear.name, hint="scale only")
        add_bias(model, linear, z @ np.asarray(linear.w, np.float64), workspace)
    node, index = linear.holder
    if not linear.transposed:
        store(model, node, index, np.asarray(linear.w, np.float64) * s[:, None], workspace)
        return 0
    table = linear.w.T
    scaled = np.multiply(table, s, out=np.empty_like(table), dtype=np.float64, casting="same_kind")
    replace_constant(linear.weight, _cast(scaled, linear.weight), workspace)
    return _divide_lookups(model, linear, s, workspace)


def _divide_lookups(model: ir.Model, head: Linear, s: np.ndarray, workspace: Workspace) -> int:
    lookups = table_readers(head)
    if lookups is None:
        raise ContractError("more than lookups and this head read its table", where=head.name)
    for node in lookups:
        rows = node.outputs[0]
        uses = list(rows.uses())
        restored = _affine_nodes(model, rows, 1 / s, np.zeros_like(s), workspace)
        for use in uses:
            use.node.replace_input_with(use.idx, restored)
        if rows.is_graph_output():
            _become_output(model, rows, restored)
    return len(lookups)


def scale_columns(
    model: ir.Model,
    linear: Linear,
    s: np.ndarray,
    z: np.ndarray,
    workspace: Workspace,
    columns: np.ndarray | None = None,
) -> None:
    """Make ``linear`` give (y - z) / s in ``columns`` (None: all, in order): columns of W and the bias."""
    at = slice(None) if columns is None else columns
    if z.any() and linear.add is None:
        add_bias(model, linear, _spread(-z, at, linear.columns), workspace)
    elif z.any():
        _change_bias(model, linear, at, lambda b: b - z, workspace)
    linear = renewed(linear)
    if linear.add is not None:
        _change_bias(model, linear, at, lambda b: b / s, workspace)
    w = np.array(linear.w, np.float64)
    w[..., at] /= s
    node, index = linear.holder
    store(model, node, index, w, workspace)


def _change_bias(
    model: ir.Model,
    linear: Linear,
    at: slice | np.ndarray,
    change: Callable[[np.ndarray], np.ndarray],
    workspace: Workspace,
) -> None:
    assert linear.add is not None
    bias = np.array(linear.bias, np.float64)
    bias[at] = change(bias[at])
    store(model, linear.add, 1, bias, workspace)


def _spread(values: np.ndarray, at: slice | np.ndarray, width: int) -> np.ndarray:
    whole = np.zeros(width)
    whole[at] = values
    return whole


def _fold_q_k(model: ir.Model, site: Site, s: np.ndarray, z: np.ndarray, workspace: Workspace) -> int:
    """k / s and q * s: each product of the scores stays. Channels that a rotation mixes need one s."""
    if z.any():
        raise UserError("queries and keys can only be scaled", where=site.name, hint="scale only")
    if site.ties is not None and not np.allclose(s, s[site.ties], rtol=1e-6):
        raise UserError(
            "channels that the rotary embedding mixes need one scale", where=site.name, hint="use sites.tied"
        )
    assert site.source is not None and site.expand is not None
    scale_columns(model, site.source, s, z, workspace, site.columns)
    query = renewed(site.linears[0])
    scale_columns(model, query, 1 / s[site.expand], np.zeros(site.expand.size), workspace, site.partner)
    return 0


def _produce(model: ir.Model, site: Site, s: np.ndarray, z: np.ndarray, workspace: Workspace) -> ir.Value:
    """Make the producer give x~; returns the value that carries it."""
    if site.source is not None:
        if z.any() and site.kind != "v_o":
            raise UserError("only attention passes a shift on", where=site.name, hint="scale only")
        scale_columns(model, renewed(site.source), s, z, workspace, site.columns)
        return site.tensor
    norm = site.producer
    gamma = np.asarray(constant_array(norm.inputs[1]), np.float64)
    store(model, norm, 1, gamma / s, workspace)
    if is_op(norm, "LayerNormalization"):
        beta = np.asarray(constant_array(norm.inputs[2]), np.float64)
        store(model, norm, 2, (beta - z) / s, workspace)
        return site.tensor
    return _shift_after(model, site, -z / s, workspace) if z.any() else site.tensor


def _shift_after(model: ir.Model, site: Site, offset: np.ndarray, workspace: Workspace) -> ir.Value:
    """RMSNorm has no beta: one Add after it carries the shift, for the linears and the others alike."""
    tensor, norm = site.tensor, site.producer
    held = new_initializer(model, f"{tensor.name}_shift", offset.astype(np.float32), workspace)
    add = match.new_node("", "Add", [tensor, held], {}, [norm])
    name, graph = tensor.name, norm.graph
    assert graph is not None
    tensor.replace_all_uses_with(add.outputs[0], replace_graph_outputs=True)
    add.replace_input_with(0, tensor)
    graph.insert_after(norm, add)
    add.outputs[0].type, add.outputs[0].shape = tensor.type, tensor.shape
    tensor.name, add.outputs[0].name = f"{name}_unshifted", name
    return add.outputs[0]


def _restore_others(
    model: ir.Model, site: Site, carrier: ir.Value, s: np.ndarray, z: np.ndarray, workspace: Workspace
) -> int:
    """Give every reader that is no linear ``x~ * s + z``; one pair of nodes for each value they read."""
    groups: dict[int, list[Other]] = {}
    for other in site.others:
        if not _joined(model, other, s, z, workspace):
            groups.setdefault(id(other.value), []).append(other)
    for found in groups.values():
        value = carrier if found[0].value is site.tensor else found[0].value
        restored = _affine_nodes(model, value, s, z, workspace)
        for other in found:
            if other.node is not None:
                other.node.replace_input_with(other.index, restored)
            else:
                _become_output(model, value, restored)
    return len(groups) * (2 if z.any() else 1)


def _joined(model: ir.Model, other: Other, s: np.ndarray, z: np.ndarray, workspace: Workspace) -> bool:
    """Whether ``other`` is x * f (+ o) of an earlier fold: then its f and o restore this one as well."""
    node = other.node
    factor = constant_array(node.inputs[1 - other.index]) if node is not None and is_op(node, "Mul") else None
    if node is None or factor is None or factor.shape != s.shape:
        return False
    add = match.only_consumer(node.outputs[0])
    offset = constant_array(add.inputs[1]) if add is not None and is_op(add, "Add") else None
    if z.any() and (offset is None or offset.shape != z.shape):
        return False
    if z.any() and add is not None and offset is not None:
        store(model, add, 1, np.asarray(offset, np.float64) + z * factor, workspace)
    store(model, node, 1 - other.index, np.asarray(factor, np.float64) * s, workspace)
    return True


def _become_output(model: ir.Model, old: ir.Value, new: ir.Value) -> None:
    outputs = model.graph.outputs
    outputs[[o is old for o in outputs].index(True)] = new
    new.type, new.shape = old.type, old.shape
    name = old.name
    old.name, new.name = f"{name}_folded", name


def _affine_nodes(
    model: ir.Model,
    x: ir.Value,
    factor: np.ndarray,
    offset: np.ndarray,
    workspace: Workspace,
) -> ir.Value:
    """x * factor (+ offset), right after the node that makes x."""
    steps = [("Mul", factor)] + ([("Add", offset)] if offset.any() else [])
    last = x.producer()
    for op, array in steps:
        held = new_initializer(model, f"{x.name}_{op.lower()}", array.astype(np.float32), workspace)
        assert last is not None
        node = match.new_node("", op, [x, held], {}, [last])
        model.graph.insert_after(last, node)
        last, result = node, node.outputs[0]
        result.name, result.type, result.shape = f"{held.name}_out", x.type, x.shape
        x = result
    return x


def add_bias(model: ir.Model, linear: Linear, bias: np.ndarray, workspace: Workspace) -> None:
    """Add ``bias`` (N,) to what ``linear`` gives; where it has none, by a new Add behind it."""
    if linear.add is not None:
        store(model, linear.add, 1, np.asarray(linear.bias, np.float64) + bias, workspace)
        return
    node, value = linear.node, linear.node.outputs[0]
    held = new_initializer(model, f"{linear.name}.bias", bias.astype(np.float32), workspace)
    add = match.new_node("", "Add", [value, held], {}, [node])
    result, name = add.outputs[0], value.name
    value.replace_all_uses_with(result, replace_graph_outputs=True)
    add.replace_input_with(0, value)
    assert node.graph is not None
    node.graph.insert_after(node, add)
    result.type, result.shape = value.type, value.shape
    value.name, result.name = f"{name}_product", name


def renewed(linear: Linear) -> Linear:
    """``linear`` as it is now: an earlier fold may have given it a bias."""
    found = as_experts(linear.node) if linear.chosen else as_linear(linear.node)
    assert found is not None
    return found


def store(model: ir.Model, node: ir.Node, index: int, array: np.ndarray, workspace: Workspace) -> None:
    """Give the constant at ``node.inputs[index]`` a new content, for this reader alone; UserError if not finite."""
    owned = own_initializer(model, node, index)
    replace_constant(owned, _cast(array, owned), workspace)


def _cast(array: np.ndarray, value: ir.Value) -> np.ndarray:
    with np.errstate(over="ignore"):
        cast = array.astype(np.float32, copy=False)
    if not np.isfinite(cast).all():
        raise UserError(f"folding makes '{value.name}' non-finite", hint="the site's scale is too large")
    return cast
