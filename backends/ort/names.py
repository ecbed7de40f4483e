"""Node names of the program: every product is called after the layer of the user's model."""

from __future__ import annotations

import onnx_ir as ir

from qcompile.backends.ort.linear import is_product
from qcompile.graph.provenance import layer_name

SITE = "qcompile.site"
REASON = "qcompile.reason"  # why a product is not on an integer kernel


def name_products(model: ir.Model) -> None:
    """Name each product after its layer, ``layer#2`` and so on where a layer has several."""
    counts: dict[str, int] = {}
    for node in model.graph:
        if not is_product(node):
            continue
        name = layer_name(node)
        counts[name] = counts.get(name, 0) + 1
        node.name = name if counts[name] == 1 else f"{name}#{counts[name]}"
        node.metadata_props[SITE] = name
