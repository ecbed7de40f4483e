"""Integer only: the quantised graph without a float between its inputs and its outputs.

rewrite:  every float operator  ->  standard integer operators on fixed-point int32 and 8-bit codes
needs:    a quantised model; calibration samples for the grids
ensures:  what has an integer form is computed in integers, with saturation instead of overflow; what has none is
          told, and an error with strict
source:   I-LLM, arXiv 2405.17849, for the operators; exponentials and activations by tables instead of DI-Exp, and
          a softmax that is normalised behind its product with the values
"""

from __future__ import annotations

import dataclasses
import json
from typing import ClassVar, Literal

import onnx_ir as ir

from qcompile.calibration.positions import position_limits
from qcompile.errors import UserError
from qcompile.graph.provenance import layer_name
from qcompile.integer.convert import Settings, convert
from qcompile.integer.grids import caches
from qcompile.integer.rules import RULES
from qcompile.ledger import Preserves
from qcompile.pipeline import Context, Form, Pass, check_range
from qcompile.proof.prepared import BOUNDS

MOST_ROWS = 1024  # of a batch
MOST_POSITIONS = 2**15  # 16-bit weights of so many tokens add up to 31 bits; half with a cache, which has as many again


@dataclasses.dataclass(frozen=True)
class IntOnly(Pass):
    """Options:

    positions: the longest text, in tokens, that rotary embeddings have tables for and sums are proven for
    probability_bits: of attention weights and values, 8 or 16
    strict: an operator without an integer form is an error
    """

    name: ClassVar[str] = "int_only"
    preserves: ClassVar[Preserves] = "approximation"
    reads: ClassVar[tuple[Form, ...]] = ("quantised",)
    makes: ClassVar[Form | None] = "integer"

    positions: int = 4096
    probability_bits: Literal[8, 16] = 16
    strict: bool = False

    def __post_init__(self) -> None:
        check_range(self, 1, MOST_POSITIONS, "positions")

    def run(self, model: ir.Model, ctx: Context) -> int:
        cached = bool(caches(model.graph))
        if cached and self.positions > MOST_POSITIONS // 2:
            what = f"positions={self.positions} is too long for a model with a cache"
            raise UserError(what, hint=f"at most {MOST_POSITIONS // 2} there")
        longest = min(self.positions, position_limits(model)[0])  # before tables become codes
        converter = convert(model, ctx, Settings(self.positions, self.probability_bits), RULES)
        if self.strict and converter.floats:
            node, why = converter.floats[0]
            more = f" and {len(converter.floats) - 1} more" if len(converter.floats) > 1 else ""
            what = f"{node.op_type} of '{layer_name(node)}'{more} would stay float: {why}"
            raise UserError(what, hint="leave out strict to keep it float")
        model.metadata_props[BOUNDS] = json.dumps(_bounds(model, longest, cached))
        ctx.ledger.current.facts["float operators"] = len(converter.floats)
        return len(converter.held)


def _bounds(model: ir.Model, longest: int, cached: bool) -> dict[str, int]:
    """The largest sizes that the program is proven for, by the name of the axis; ``longest``: of a text."""
    found: dict[str, int] = {}
    both = longest * (2 if cached else 1)  # of a mask, over the past and the new tokens
    texts = [v for v in model.graph.inputs if v.dtype is not None and v.dtype.is_integer()][:1]
    parts = [*texts, *(v for v in model.graph.inputs if v.dtype is not None and v.dtype.is_floating_point())]
    for value, size in (*((v, longest) for v in parts), *((v, both) for v in model.graph.inputs)):
        for axis, dim in enumerate(value.shape or ()):
            if isinstance(dim, ir.SymbolicDim) and dim.value is not None:
                found.setdefault(str(dim.value), MOST_ROWS if axis == 0 else size)
    return found
