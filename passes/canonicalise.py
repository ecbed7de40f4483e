"""Canonicalise: one spelling for norms, activations, linears, rotary embeddings and attention.

rewrite:  every spelled-out or fused form  ->  LayerNormalization, qcompile.RMSNormalization, Gelu,
          qcompile.Silu, MatMul + Add with W [K, N], qcompile.RotaryEmbedding, qcompile.Attention or
          GroupedAttention
needs:    constant weights
ensures:  equal to 1e-5 at unmasked positions; later passes match one spelling only
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import onnx_ir as ir
from onnx_ir.passes import common

from qcompile.graph.canonical import (
    activation,
    attention,
    experts,
    flatten,
    fused,
    joined,
    linear,
    norm,
    rope,
)
from qcompile.graph.provenance import original_name
from qcompile.ledger import Preserves
from qcompile.pipeline import Context, Form, Pass


@dataclasses.dataclass(frozen=True)
class Canonicalise(Pass):
    """Recognise once; no options."""

    name: ClassVar[str] = "canonicalise"
    preserves: ClassVar[Preserves] = "function"
    reads: ClassVar[tuple[Form, ...]] = ("captured", "canonical")
    makes: ClassVar[Form | None] = "canonical"

    def run(self, model: ir.Model, ctx: Context) -> int:
        taken_apart, refused = fused.rewrite(model, ctx.workspace)
        counts = {
            "fused operators": taken_apart,
            "norms": norm.rewrite(model, ctx.workspace),
            "activations": activation.rewrite(model),
            "linears": linear.rewrite(model, ctx.workspace),
            "reshapes": flatten.rewrite(model, ctx.workspace) + joined.rewrite(model, ctx.workspace),
            "experts": experts.rewrite(model, ctx.workspace),
            "rotary embeddings": rope.rewrite(model),
        }
        counts["attentions"], left = attention.rewrite(model, ctx.workspace)
        common.RemoveUnusedNodesPass()(model)
        common.CommonSubexpressionEliminationPass()(model)
        near = [miss for part in (norm, activation, rope, linear) for miss in part.misses(model.graph)]
        for item in (*refused, *left, *near):
            ctx.ledger.skip(item.node.op_type, item.reason, original_name(item.node))
        ctx.ledger.current.facts["recognised"] = counts
        return sum(counts.values())
