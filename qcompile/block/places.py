"""Where transforms may be learned in a block: the sites whose producer and readers are all inside it.

A norm before the block (post-LN) counts as inside where nothing behind the block reads what it gives.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

import onnx_ir as ir

from qcompile.block.stream import Step
from qcompile.graph.functions import is_op
from qcompile.graph.grids import all_grids
from qcompile.graph.linears import Linear
from qcompile.graph.provenance import original_name
from qcompile.graph.sites import Kind, Site, describe, find_sites
from qcompile.pipeline import Context


@dataclasses.dataclass(frozen=True)
class Place:
    """A site in a clone of the whole model.

    before: its norm stands before the block: it scales one of the block's inputs
    shifts: whether a shift folds for free
    """

    site: Site
    before: bool
    shifts: bool


def find_places(ctx: Context, step: Step, model: ir.Model, kinds: Collection[Kind]) -> list[Place]:
    """The sites of ``step``'s block in ``model``, a clone of the whole one; those it cannot use get a reason."""
    inside = {linear.name for linear in step.linears}
    made = {str(value.name) for node in step.block().graph for value in node.outputs}
    solved = {id(value) for value, _ in all_grids(model)}
    found = []
    for site in find_sites(model):
        if not any(linear.name in inside for linear in site.linears):
            continue
        before = site.kind == "norm" and str(site.tensor.name) not in made
        reason = _obstacle(site, before, inside)
        if not reason and before and not step.reads_last(str(site.tensor.name)):
            reason = "its norm stands before the block, and more than the block reads what it gives"
        if not reason and site.kind in ("v_o", "q_k"):
            reason = _attention_obstacle(ctx, site)
        if not reason and any(id(linear.weight) in solved for linear in _touched(site)):
            reason = "the codes of its weights are chosen already"
        if site.kind not in kinds:
            continue
        if reason:
            ctx.ledger.skip(describe(site), reason, original_name(site.producer))
        else:
            found.append(Place(site, before, _shifts(site)))
    return found


def _touched(site: Site) -> list[Linear]:
    return [*site.linears, *([site.source] if site.source is not None else [])]


def _obstacle(site: Site, before: bool, inside: Collection[str]) -> str:
    if site.reason:
        return site.reason
    if any(linear.name not in inside for linear in _touched(site)):
        return "another block has a part in it"
    if before and any(other.node is None for other in site.others):
        return "what its norm gives is an output of the model"
    return ""


def _attention_obstacle(ctx: Context, site: Site) -> str:
    rule = ctx.recipe.rule("attention", original_name(site.producer))
    quantised = rule is not None and rule.activations is not None
    if site.kind == "q_k":
        return "" if quantised else "queries and keys stay float in this recipe, so nothing is gained"
    return "its heads are not read in order" if quantised and site.heads is None else ""


def _shifts(site: Site) -> bool:
    biased = all(linear.add is not None for linear in _touched(site))
    if site.experts or not biased:
        return False
    return site.kind == "v_o" or (site.kind == "norm" and is_op(site.producer, "LayerNormalization"))
