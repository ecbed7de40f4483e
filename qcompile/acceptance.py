"""Whether a compiled program may be written: gates that it must pass, and warnings of what is left to wish."""

from __future__ import annotations

import math
from typing import Any

from qcompile.errors import GateError
from qcompile.ledger import Proof
from qcompile.manifest import Manifest
from qcompile.progress import warn

POOR_DB = 3.0  # of the whole program: half of its output is error


def check(record: Manifest, proof: Proof) -> None:
    """GateError where the gate was missed or the program overflows; warnings where little was gained or is left.

    ``proof``: of the program against the model as it was captured.
    """
    _check_gate(record["gate"])
    _check_outputs(proof)
    kernels = record["kernels"]
    if record["gate"] is None and record["max_drop"] is not None:
        warn("the allowed drop was not checked, because nothing was quantised")
    if not kernels:
        warn("this graph has no matmul, so there was nothing to make faster or smaller")
    elif record["recipe"].rules and not any(k["low_bit"] for k in kernels):
        warn("nothing runs in low bits; `qcompile explain` and the report say why for each matmul")


def _check_gate(gate: dict[str, Any] | None) -> None:
    """``gate``: {metric, drop, max_drop, ...} from the pass that measured it; GateError when missed."""
    if gate is None or (gate["drop"] is not None and gate["drop"] <= gate["max_drop"]):
        return
    drop = "nan" if gate["drop"] is None else f"{gate['drop']:.4g}"
    raise GateError(
        f"the {gate['metric']} dropped by {drop}, allowed {gate['max_drop']:g}; nothing was written",
        hint="allow a larger --max-drop, or take a recipe with more bits",
    )


def _check_outputs(proof: Proof) -> None:
    """GateError where the program overflows; a warning where little of the model is left in its outputs."""
    if math.isinf(proof.max_abs):
        raise GateError(
            "the compiled program answers NaN or infinity where the float model does not; nothing was written",
            hint="its weights or activations are too large or too small for these formats: see `qcompile analyze`",
        )
    if proof.sqnr_db < POOR_DB:
        warn(
            f"the outputs are far from the float model's (SQNR {proof.sqnr_db:.1f} dB); "
            "more bits help, and `qcompile explain` shows the worst layers"
        )
