"""GELU (erf and tanh) and SiLU, however they are spelled.

0.5 x (1 + erf(x / sqrt 2))                                  ->  Gelu(x)
0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))            ->  Gelu(x){approximate="tanh"}
x sigmoid(x)                                                 ->  qcompile.Silu(x)
"""

from __future__ import annotations

import math

import onnx_ir as ir

from qcompile.graph.canonical import match
from qcompile.graph.functions import DOMAIN, is_op, use

QUICK = 1.702  # x sigmoid(1.702 x) is QuickGELU, whose canonical spelling that is


def rewrite(model: ir.Model) -> int:
    """Recognise every spelled-out activation; returns how many."""
    count = 0
    for node in match.nodes(model.graph, "Sigmoid"):
        count += _silu(model, node)
    for node in match.nodes(model.graph, "Erf"):
        count += _gelu(model, node, _erf_argument(node), "none")
    for node in match.nodes(model.graph, "Tanh"):
        count += _gelu(model, node, _tanh_argument(node), "tanh")
    return count


def _silu(model: ir.Model, sigmoid: ir.Node) -> int:
    x = sigmoid.inputs[0]
    multiply = match.only_consumer(sigmoid.outputs[0], "Mul")
    if multiply is None or match.other_operand(multiply, sigmoid.outputs[0]) is not x:
        return 0
    use(model, "Silu")
    match.put_instead(multiply, match.new_node(DOMAIN, "Silu", [x], {}, [multiply]))
    match.remove_dead(model.graph, [sigmoid])
    return 1


def _close(a: float | None, b: float) -> bool:
    return a is not None and abs(a - b) <= 1e-4 * abs(b)


def _scaled(value: ir.Value | None) -> tuple[ir.Value, float] | None:
    """``value`` as (operand, factor) of a product with, or quotient by, a constant number."""
    node = match.producer(value, "Mul", "Div")
    operands = match.constant_operand(node) if node is not None else None
    if node is None or operands is None or operands[1].size != 1:
        return None
    factor = float(operands[1].reshape(-1)[0])
    if node.op_type == "Div":
        if node.inputs[0] is not operands[0] or factor == 0:
            return None
        factor = 1 / factor
    return operands[0], factor


def _erf_argument(erf: ir.Node) -> ir.Value | None:
    found = _scaled(erf.inputs[0])
    return found[0] if found is not None and _close(found[1], math.sqrt(0.5)) else None


def _tanh_argument(tanh: ir.Node) -> ir.Value | None:
    """x of tanh(sqrt(2/pi) (x + 0.044715 x^3)), in the sum form or as x sqrt(2/pi) (1 + 0.044715 x^2)."""
    outer = _scaled(tanh.inputs[0])
    if outer is not None and _close(outer[1], math.sqrt(2 / math.pi)):
        total = match.producer(outer[0], "Add")
        return _cubic_sum(total) if total is not None else None
    product = match.producer(tanh.inputs[0], "Mul")
    return _factored(product) if product is not None else None


def _cubic_sum(total: ir.Node) -> ir.Value | None:
    for x, cubic in (total.inputs, reversed(total.inputs)):
        inner = _scaled(cubic)
        if x is not None and inner is not None and _close(inner[1], 0.044715) and _power(inner[0], x) == 3:
            return x
    return None


def _factored(product: ir.Node) -> ir.Value | None:
    for left, right in (product.inputs, reversed(product.inputs)):
        scaled, one_plus = _scaled(left), match.producer(right, "Add")
        operands = match.constant_operand(one_plus) if one_plus is not None else None
        if scaled is None or operands is None or not _close(scaled[1], math.sqrt(2 / math.pi)):
            continue
        if operands[1].size != 1 or not _close(float(operands[1].reshape(-1)[0]), 1.0):
            continue
        if _is_scaled_square(operands[0], scaled[0]):
            return scaled[0]
    return None


def _is_scaled_square(value: ir.Value, x: ir.Value) -> bool:
    """value == 0.044715 x^2, as (0.044715 x) x or 0.044715 (x x)."""
    inner = _scaled(value)
    if inner is not None and _close(inner[1], 0.044715):
        return _power(inner[0], x) == 2
    node = match.producer(value, "Mul")
    if node is None:
        return False
    other = match.other_operand(node, x)
    inner = _scaled(other)
    return inner is not None and inner[0] is x and _close(inner[1], 0.044715)


def _power(value: ir.Value, x: ir.Value) -> int | None:
    """n if value is x^n by Pow or repeated Mul."""
    if value is x:
        return 1
    node = match.producer(value, "Pow", "Mul")
    if node is None:
        return None
    if node.op_type == "Pow":
        exponent = match.scalar(node.inputs[1])
        return int(exponent) if node.inputs[0] is x and exponent in (2.0, 3.0) else None
    left, right = (_power(v, x) if v is not None else None for v in node.inputs)
    return left + right if left is not None and right is not None else None


def _gelu(model: ir.Model, curve: ir.Node, x: ir.Value | None, approximate: str) -> int:
    one_plus = match.only_consumer(curve.outputs[0], "Add")
    operands = match.constant_operand(one_plus) if one_plus is not None else None
    if (
        x is None
        or one_plus is None
        or operands is None
        or not _close(float(operands[1].reshape(-1)[0]), 1.0)
    ):
        return 0
    end = _half_product(one_plus, x)
    if end is None:
        return 0
    sources = [n for v in end.inputs if v is not None and (n := v.producer()) is not None]
    gelu = match.new_node("", "Gelu", [x], {"a": ir.AttrString("approximate", approximate)}, [end])
    match.put_instead(end, gelu)
    match.remove_dead(model.graph, sources)
    return 1


def _half_product(one_plus: ir.Node, x: ir.Value) -> ir.Node | None:
    """The last node of 0.5 x (1 + curve), in any order of the three factors."""
    node, factors = one_plus, {"half": False, "x": False}
    while not all(factors.values()):
        value = node.outputs[0]
        following = match.only_consumer(value, "Mul")
        other = match.other_operand(following, value) if following is not None else None
        if following is None or other is None:
            return None
        scaled = _scaled(other)
        if _close(match.scalar(other), 0.5) and not factors["half"]:
            factors["half"] = True
        elif other is x and not factors["x"]:
            factors["x"] = True
        elif scaled is not None and scaled[0] is x and _close(scaled[1], 0.5) and not any(factors.values()):
            factors = dict.fromkeys(factors, True)
        else:
            return None
        node = following
    return node if is_op(node, "Mul") else None


# --------------------------------------------------------------------------- what is almost an activation


def misses(graph: ir.Graph) -> list[match.Unrecognised]:
    """Activations but for one detail: a curve that has either the argument or the product of one."""
    found = [(n, "SiLU", _silu_detail(n)) for n in match.nodes(graph, "Sigmoid")]
    for node in match.nodes(graph, "Erf"):
        found.append((node, "GELU", _gelu_detail(node, _erf_argument(node), "its erf is not of x / sqrt(2)")))
    for node in match.nodes(graph, "Tanh"):
        if _is_cubic(node.inputs[0]):
            why = "its tanh is not of sqrt(2 / pi) (x + 0.044715 x^3)"
            found.append((node, "GELU", _gelu_detail(node, _tanh_argument(node), why)))
    return [match.Unrecognised(node, f"not seen as a {name}: {why}") for node, name, why in found if why]


def _silu_detail(sigmoid: ir.Node) -> str:
    x, gate = sigmoid.inputs[0], sigmoid.outputs[0]
    scaled = _scaled(x)
    for reader in match.consumers(gate):
        other = match.other_operand(reader, gate) if is_op(reader, "Mul") else None
        if other is not None and other is x:
            return "its sigmoid has another reader"
        if other is not None and scaled is not None and other is scaled[0] and not _close(scaled[1], QUICK):
            return f"its sigmoid is of {scaled[1]:g} x"
    return ""


def _gelu_detail(curve: ir.Node, x: ir.Value | None, argument: str) -> str:
    """Which half fails; empty when both do, for then it is something else."""
    one_plus = match.only_consumer(curve.outputs[0], "Add")
    operands = match.constant_operand(one_plus) if one_plus is not None else None
    is_one = operands is not None and operands[1].size == 1 and _close(float(operands[1].reshape(-1)[0]), 1.0)
    if x is None:
        return argument if is_one else ""
    if match.only_consumer(curve.outputs[0]) is None:
        return f"its {curve.op_type.lower()} has another reader"
    if not is_one:
        return f"1 is not added to its {curve.op_type.lower()}"
    return "what follows is not a product with x / 2, or has another reader"


def _is_cubic(value: ir.Value | None, depth: int = 6) -> bool:
    """Whether a third power, or a factor close to GELU's, is in the argument."""
    node = match.producer(value, "Mul", "Div", "Add", "Pow") if depth else None
    if node is None:
        return False
    held = [number for v in node.inputs if (number := match.scalar(v)) is not None]
    if node.op_type == "Pow":
        return held == [3.0]
    return any(abs(h - 0.0447) < 1e-3 for h in held) or any(_is_cubic(v, depth - 1) for v in node.inputs)
