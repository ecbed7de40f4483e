"""Runs of elementwise integer operators around a Requantize become one operator that a kernel computes in one go.

    [Add | Sub constant]  [Max, Min]  [Max, Min, Mul constant]  Requantize  [Add]  [Max, Min]  [Cast]   ->   Rescale

A Transpose of heads and tokens in front of a run, or behind one whose other operands are constant, is taken in as well.
What lies between is read by nothing else, so that nothing but the number of passes over memory changes.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from qcompile.graph.canonical import match
from qcompile.graph.edits import constant_array, naming, new_initializer
from qcompile.graph.functions import DOMAIN, use
from qcompile.graph.workspace import Workspace

_NAMES = {ir.DataType.INT32: "Rescale", ir.DataType.UINT8: "RescaleToUint8", ir.DataType.INT8: "RescaleToInt8"}
_REACH = 2**30 - 1  # of what Requantize takes
_TURN = (0, 2, 1, 3)  # heads and tokens
_ENDLESS = {"floor": -(2**31), "ceiling": 2**31 - 1}


@dataclasses.dataclass
class _Chain:
    """The nodes of a run in order, its operands and its ends."""

    nodes: list[ir.Node]
    x: ir.Value
    before: ir.Value | np.ndarray
    lift: np.ndarray
    scale: tuple[ir.Value | np.ndarray, ir.Value | np.ndarray]
    after: ir.Value | np.ndarray
    ends: dict[str, int]
    kind: ir.DataType = ir.DataType.INT32
    turned: bool = False


def rewrite(model: ir.Model, workspace: Workspace) -> int:
    """Bring every Requantize of the main graph, with what stands around it, to one Rescale; returns how many."""
    zero, one = np.zeros((), np.int32), np.ones((), np.int32)
    held: dict[int, ir.Value] = {}  # constants of which equal ones are shared, by their only element
    count = 0
    with naming(model):
        for node in match.nodes(model.graph, "Requantize", "RequantizeSigned"):
            value, multiplier, divisor = node.inputs
            assert value is not None and multiplier is not None and divisor is not None
            low, high = (match.int_attribute(node, key, 0) for key in ("low", "high"))
            chain = _Chain([node], value, zero, one, (multiplier, divisor), zero, _ENDLESS | {"low": low, "high": high})
            _grow_up(chain)
            turn = _maker(chain.x, "Transpose")
            if turn is not None and _is_turn(turn):
                chain.turned = True
                _take_above(chain, turn, turn.inputs[0])
            _grow_down(chain)
            _turn_below(chain)
            _replace(model, chain, workspace, held)
            count += 1
    return count


def _grow_up(chain: _Chain) -> None:
    """Take in what makes the operand of the Requantize."""
    node = _maker(chain.x, "Mul")
    found = match.constant_operand(node) if node is not None else None
    if node is not None and found is not None and _is_lift(found[1]):
        chain.lift = found[1]
        _take_above(chain, node, found[0])
    while (pair := _clip_above(chain.x)) is not None:
        (upper, ceiling), (lower, floor), x = pair
        most = _REACH // chain.lift
        if not (np.array_equal(ceiling, most) and np.array_equal(floor, -most)):  # Rescale saturates there by itself
            if ceiling.size > 1 or floor.size > 1 or chain.ends["ceiling"] != _ENDLESS["ceiling"]:
                return
            chain.ends |= {"floor": int(floor.reshape(-1)[0]), "ceiling": int(ceiling.reshape(-1)[0])}
        _take_above(chain, upper, chain.x)
        _take_above(chain, lower, x)
    node = _maker(chain.x, "Add", "Sub")
    found = match.constant_operand(node) if node is not None else None
    if node is None or found is None or (node.op_type == "Sub" and found[0] is not node.inputs[0]):
        return
    other, array = found
    chain.before = _negative(array) if node.op_type == "Sub" else _constant_value(node, other)
    _take_above(chain, node, other)


def _grow_down(chain: _Chain) -> None:
    """Take in what reads its result."""
    node = match.only_consumer(chain.nodes[-1].outputs[0], "Add")
    if node is not None and node.inputs[0] is not node.inputs[1]:
        other = match.other_operand(node, chain.nodes[-1].outputs[0])
        if other is not None and other.dtype == ir.DataType.INT32:
            chain.after = other
            chain.nodes.append(node)
    lower = match.only_consumer(chain.nodes[-1].outputs[0], "Max")
    upper = match.only_consumer(lower.outputs[0], "Min") if lower is not None else None
    if lower is not None and upper is not None and (floor := _number(lower)) and (ceiling := _number(upper)):
        chain.ends |= {"least": floor[1], "most": ceiling[1]}
        chain.nodes += [lower, upper]
    else:
        chain.ends |= _ends_of_sum(chain)
    cast = match.only_consumer(chain.nodes[-1].outputs[0], "Cast")
    kind = ir.DataType(cast.attributes["to"].as_int()) if cast is not None else None
    if cast is not None and kind in _NAMES:
        chain.kind = kind
        chain.nodes.append(cast)


def _turn_below(chain: _Chain) -> None:
    """Turn the operands instead of the result."""
    turn = match.only_consumer(chain.nodes[-1].outputs[0], "Transpose")
    if turn is None or not _is_turn(turn):
        return
    multiplier, divisor = chain.scale
    held = [
        constant_array(v) if isinstance(v, ir.Value) else v
        for v in (chain.before, chain.lift, multiplier, divisor, chain.after)
    ]
    if any(array is None or array.ndim > len(_TURN) for array in held):
        return
    found = [_turned(array) for array in held if array is not None]
    chain.before, chain.lift, chain.after = found[0], found[1], found[4]
    chain.scale = found[2], found[3]
    chain.turned = not chain.turned
    chain.nodes.append(turn)


def _is_turn(node: ir.Node) -> bool:
    return tuple(node.attributes["perm"].as_ints() if "perm" in node.attributes else ()) == _TURN


def _turned(array: np.ndarray) -> np.ndarray:
    """An operand of what is turned."""
    if array.ndim < len(_TURN) - 2:  # one number, or one for each of the last axis
        return array
    whole = array.reshape((1,) * (len(_TURN) - array.ndim) + array.shape)
    return np.ascontiguousarray(whole.transpose(_TURN))


def _ends_of_sum(chain: _Chain) -> dict[str, int]:
    """What the result and ``after`` add up to at most."""
    after = constant_array(chain.after) if isinstance(chain.after, ir.Value) else chain.after
    if after is None:
        return {"least": -(2**31), "most": 2**31 - 1}
    return {"least": chain.ends["low"] + int(after.min()), "most": chain.ends["high"] + int(after.max())}


def _take_above(chain: _Chain, node: ir.Node, x: ir.Value | None) -> None:
    assert x is not None
    chain.nodes.insert(0, node)
    chain.x = x


def _maker(value: ir.Value, *ops: str) -> ir.Node | None:
    """The node that makes ``value``, if nothing but one node reads it."""
    return match.producer(value, *ops) if match.only_consumer(value) is not None else None


def _number(node: ir.Node) -> tuple[ir.Value, int] | None:
    """For a binary node with one constant of one element: (the other operand, the number)."""
    found = match.constant_operand(node)
    return (found[0], int(found[1].reshape(-1)[0])) if found is not None and found[1].size == 1 else None


def _is_lift(array: np.ndarray) -> bool:
    return array.dtype == np.int32 and bool(((array > 0) & (array & (array - 1) == 0)).all())


_End = tuple[ir.Node, np.ndarray]


def _clip_above(value: ir.Value) -> tuple[_End, _End, ir.Value] | None:
    """Min and Max that make ``value``, each with its constant, and what they clip."""
    upper = _maker(value, "Min")
    ceiling = match.constant_operand(upper) if upper is not None else None
    lower = _maker(ceiling[0], "Max") if ceiling is not None else None
    floor = match.constant_operand(lower) if lower is not None else None
    if upper is None or lower is None or ceiling is None or floor is None:
        return None
    return (upper, ceiling[1]), (lower, floor[1]), floor[0]


def _constant_value(node: ir.Node, other: ir.Value) -> ir.Value:
    value = match.other_operand(node, other)
    assert value is not None
    return value


def _negative(array: np.ndarray) -> np.ndarray:
    return np.asarray(-array.astype(np.int64)).astype(np.int32)


def _replace(model: ir.Model, chain: _Chain, workspace: Workspace, held: dict[int, ir.Value]) -> None:
    def operand(value: ir.Value | np.ndarray) -> ir.Value:
        if isinstance(value, ir.Value):
            return value
        if value.size > 1:
            return new_initializer(model, "c", value, workspace)
        number = int(value.reshape(-1)[0])
        if number not in held:
            held[number] = new_initializer(model, "c", np.asarray(number, np.int32), workspace)
        return held[number]

    inputs = [chain.x, *map(operand, (chain.before, chain.lift, *chain.scale, chain.after))]
    attributes = {key: ir.AttrInt64(key, value) for key, value in chain.ends.items()}
    name = _NAMES[chain.kind] + ("Turned" if chain.turned else "")
    use(model, name)
    new = match.new_node(DOMAIN, name, inputs, attributes, chain.nodes)
    match.put_instead(chain.nodes[-1], new)
    match.remove_dead(model.graph, chain.nodes[-2::-1])
