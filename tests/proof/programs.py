"""Programs written in ONNX's text form, and proofs of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx
import onnx.parser

from qcompile.proof.intervals import Finding, Intervals, find_intervals
from qcompile.proof.prepared import prepared
from qcompile.proof.prove import IntegerProof, prove
from qcompile.proof.spans import Span

HEADER = '<ir_version: 10, opset_import: ["": 21, "qcompile": 1, "com.microsoft": 1, "other": 1]>\n'


def parsed(text: str, functions: str = "") -> onnx.ModelProto:
    """``text`` from the graph's name on; ``functions`` after it."""
    return onnx.parser.parse_model(f"{HEADER}{text}\n{functions}")


def proof(path: Path, text: str, functions: str = "", **bounds: int) -> IntegerProof:
    """The proof of a program, types and intervals only."""
    file = path / "program.onnx"
    onnx.save(parsed(text, functions), file)
    return prove(file, bounds, levels=())


def intervals(
    text: str, bounds: Mapping[str, int] | None = None, functions: str = ""
) -> tuple[Intervals, dict[str, Span]]:
    """The analysis of a program, and the span of each value by name."""
    import onnx_ir as ir

    ready = prepared(ir.from_proto(parsed(text, functions)), "test")
    assert not ready.findings, ready.findings
    found = find_intervals(ready.model, bounds or {})
    return found, {str(value.name): span for value, span in found.spans.items()}


def ends(text: str, name: str = "y", **bounds: int) -> tuple[int, int]:
    """Between what the value ``name`` of a program without findings lies."""
    found, by_name = intervals(text, bounds)
    assert not found.findings, found.findings
    return by_name[name].least, by_name[name].most


def kinds(findings: list[Finding]) -> list[str]:
    """The kinds of the findings, each once, in order."""
    return list(dict.fromkeys(one.kind for one in findings))
