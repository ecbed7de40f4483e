"""Which kernel each matmul of a packaged program reaches, read from the graph that ONNX Runtime runs."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import onnx_ir as ir

from qcompile.backends.base import Kernel
from qcompile.backends.ort.linear import PRODUCTS
from qcompile.backends.ort.names import REASON, SITE
from qcompile.graph.canonical import match

LOW_BIT = (
    "DynamicQuantizeMatMul", "MatMulInteger", "MatMulIntegerToFloat", "MatMulNBits", "QGemm", "QLinearMatMul",
)  # fmt: skip
_FUSED = re.compile(r"^fused |(/\w+Fusion/)+$|/\w+Fusion$")


def kernels(path: Path) -> list[Kernel]:
    """One entry for each product in the program at ``path``, in graph order; attention in chunks is one."""
    packaged = ir.load(path)
    known = {str(node.name): node for node in packaged.graph}
    order = {name: place for place, name in enumerate(known)}
    products = [node for node in _optimised(path).graph if node.op_type in PRODUCTS]
    products.sort(key=lambda node: order.get(_plain(node), len(order)))
    found = [described(node, known) for node in products]
    return [k for place, k in enumerate(found) if k["kernel"] != "Attention" or k not in found[:place]]


def _optimised(path: Path) -> ir.Model:
    from qcompile.calibration.runner import open_session

    with tempfile.TemporaryDirectory(prefix="qcompile-") as folder:
        target = Path(folder) / "optimised.onnx"
        open_session(path, optimised_path=target)
        return ir.load(target)


def _plain(node: ir.Node) -> str:
    """The name in the packaged program; ONNX Runtime calls what it fuses ``fused x`` or ``x/SomeFusion/``."""
    return _FUSED.sub("", str(node.name))


def described(node: ir.Node, known: dict[str, ir.Node]) -> Kernel:
    """How ``node`` runs; ``known``: the nodes of the packaged program by name."""
    source = known.get(_plain(node))
    site = source.metadata_props.get(SITE, "") if source is not None else ""
    low_bit = node.op_type in LOW_BIT
    return Kernel(
        site=site or str(node.name),
        kernel=node.op_type,
        low_bit=low_bit,
        reason="" if low_bit else _reason(node, source),
    )


def _reason(node: ir.Node, source: ir.Node | None) -> str:
    if node.op_type in ("Attention", "MultiHeadAttention"):
        return "products of activations: no integer kernel holds the softmax between them"
    if source is None:
        return "ONNX Runtime made it while optimising"
    if REASON in source.metadata_props:
        return source.metadata_props[REASON]
    roots = [match.through(value, "Transpose") for value in source.inputs]
    if not any(root is not None and root.is_initializer() for root in roots):
        return "a product of two activations, not both quantised right before it"
    return "kept in float by the recipe"
