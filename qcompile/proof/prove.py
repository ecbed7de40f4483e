"""The proof that a program is integer-only and cannot overflow: types, grades, the optimised graph, intervals."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from qcompile.proof.floats import FLOAT, OPAQUE, Crossing, Types, check_types
from qcompile.proof.intervals import Finding, OperatorBounds, Peak, check_bounds, find_intervals
from qcompile.proof.optimised import LEVELS, OptimisedGraph, optimised_graph
from qcompile.proof.prepared import Prepared, read_prepared

GRADES = {
    "A": "standard integer operators only",
    "B": "integer operators of the project, each with a body of standard ones",
    "C": "integers in and out, but floats or unknown code inside operators",
    "none": "floats remain",
}


@dataclasses.dataclass(frozen=True)
class Check:
    """One line of the proof."""

    name: str
    holds: bool
    found: str


@dataclasses.dataclass(frozen=True)
class IntegerProof:
    """The outcome of ``prove``; plain data, so that a manifest can hold it.

    ``kinds``: nodes that are integer, boundary, opaque or float; ``functions``: calls of the project's operators;
    ``assumptions``: what is taken for granted of the inputs; ``peak``: the int32 value nearest to overflow.
    """

    grade: str
    values: int
    nodes: int
    proven: int
    kinds: dict[str, int]
    functions: dict[str, int]
    extensions: dict[str, int]
    boundary: list[Crossing]
    operators: dict[str, OperatorBounds]
    peak: Peak
    bounds: dict[str, int]
    assumptions: list[str]
    optimised: list[OptimisedGraph]
    findings: list[Finding]

    @property
    def holds(self) -> bool:
        return not self.all_findings and self.grade in ("A", "B")

    @property
    def all_findings(self) -> list[Finding]:
        """Those of the program, then those of its optimised graphs."""
        return [*self.findings, *(one for graph in self.optimised for one in graph.findings)]

    def checks(self) -> list[Check]:
        """The proof as lines of a table."""
        flawed = [one for one in self.findings if one.kind in ("float", "type")]
        return [
            Check("types", not flawed, self._types(len(flawed))),
            Check("grade", self.grade in ("A", "B"), f"{self.grade}: {GRADES[self.grade]}"),
            *(Check(f"optimised {graph.level}", not graph.findings, _of_graph(graph)) for graph in self.optimised),
            Check("intervals", len(flawed) == len(self.findings), self._intervals()),
        ]

    def _types(self, flawed: int) -> str:
        sides = [crossing.side for crossing in self.boundary]
        at = f"{sides.count('in')} in, {sides.count('out')} out, {sides.count('constant')} constants"
        words = f"{flawed} findings" if flawed else f"{self.values} values"
        return f"{words}; floats at the boundary: {at if sides else 'none'}"

    def _intervals(self) -> str:
        words = f"{self.proven} of {self.nodes} nodes proven"
        if not self.peak.node:
            return words
        return f"{words}; nearest to overflow: {self.peak.share:.3g} of 2^31 at {self.peak.node} ({self.peak.operator})"


def _of_graph(graph: OptimisedGraph) -> str:
    if graph.findings:
        return f"{len(graph.findings)} findings in {graph.nodes} nodes"
    added = ", ".join(f"{name} {count}" for name, count in graph.extensions.items())
    return f"{graph.nodes} nodes, no float inside{f'; integer extensions: {added}' if added else ''}"


def prove(path: Path, bounds: Mapping[str, int] | None = None, *, levels: Sequence[str] = LEVELS) -> IntegerProof:
    """Prove the ONNX program at ``path``, also as ONNX Runtime optimises it at each of ``levels``.

    ``bounds``: the largest size of dynamic dims by name; they win over those in the model's metadata. Raises
    UserError for a file that cannot be read or a bound of an unknown dim.
    """
    ready = read_prepared(path)
    check_bounds(ready.model, bounds or {})
    sizes = {**ready.bounds, **(bounds or {})}
    types, intervals = check_types(ready.model), find_intervals(ready.model, sizes)
    operators = dict(sorted(intervals.operators.items()))
    return IntegerProof(
        grade=grade(types, ready),
        values=types.values,
        nodes=sum(one.nodes for one in operators.values()),
        proven=sum(one.proven for one in operators.values()),
        kinds=types.kinds,
        functions=ready.functions,
        extensions=types.extensions,
        boundary=types.boundary,
        operators=operators,
        peak=intervals.peak,
        bounds=sizes,
        assumptions=list(intervals.assumptions),
        optimised=[optimised_graph(path, level) for level in levels],
        findings=[*ready.findings, *types.findings, *intervals.findings],
    )


def grade(types: Types, ready: Prepared) -> str:
    """A, B, C or none, as ``GRADES`` says; a function of another domain is opaque: a runtime may have a kernel."""
    if types.kinds[FLOAT] or types.loose:
        return "none"
    if types.kinds[OPAQUE] or ready.foreign or types.findings or ready.findings:
        return "C"
    return "B" if ready.functions else "A"
