"""Proving a compiled folder again: is it what was compiled, does it run, and is it still that close?"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from qcompile import backends, manifest
from qcompile.backends.base import Program, longest_text, open_program, program_interface
from qcompile.calibration.samples import Sample, proof_samples
from qcompile.difference import Difference, proof_of
from qcompile.errors import QCompileError
from qcompile.graph.workspace import Workspace
from qcompile.intake import take, take_samples
from qcompile.report import decibels

LENGTH = 512  # of arrays given in Python, whose length is not noted
SLACK_DB = 3.0  # samples other than those of the compilation may come out this much worse


@dataclasses.dataclass(frozen=True)
class Check:
    """One thing that was checked; ``holds`` is None where it could not be."""

    name: str
    holds: bool | None
    found: str


def verify(
    folder: Path,
    original: str | None = None,
    *,
    calibration: Path | None = None,
    tokenizer: Path | None = None,
    max_length: int | None = None,
    allow_pickle: bool = False,
) -> list[Check]:
    """Check the compiled ``folder``, against the model ``original`` too where it is given.

    ``max_length``: tokens per sample at most; None takes what was calibrated on.
    """
    record = manifest.load(folder)
    files = _files(folder, record)
    if not files.holds:
        return [files]  # what runs would not be what was compiled
    checks = [files, _interface(folder, record)]
    try:
        program = open_program(folder)
    except QCompileError as error:
        return [*checks, Check("loads", False, error.message)]
    with Workspace() as workspace:
        source = _source_of(folder, original, record)
        taken = take(source, workspace, allow_pickle=allow_pickle, with_past=_exports_past(source, record))
        words = tokenizer if tokenizer is not None else taken.tokenizer
        count = record["calibration"]["samples"]  # the same ones are held out then
        length = min(max_length or record["calibration"].get("max_length", LENGTH), longest_text(folder))
        samples, _ = take_samples(taken.model, calibration, words, count, length, record["seed"])
        some = proof_samples(taken.model, samples)
        checks.append(_runs(program, some))
        if original is not None:
            checks.append(_source(taken.source, record))
            checks.append(_outputs(program, taken.model, some, workspace, record))
    return [*checks, _kernels(folder, record)]


def _source_of(folder: Path, original: str | None, record: manifest.Manifest) -> str | ir.Model:
    """What samples are made for: the original, else the program, else nothing but its inputs and outputs."""
    if original is not None:
        return original
    path = folder / "model.onnx"
    return str(path) if path.is_file() else _ports(record)


def _ports(record: manifest.Manifest) -> ir.Model:
    """A model without nodes that takes what the program takes."""
    inputs = [
        ir.Value(name=port["name"], type=ir.TensorType(ir.DataType[port["type"]]), shape=ir.Shape(port["shape"]))
        for port in record["interface"]["inputs"]
    ]
    return ir.Model(ir.Graph(inputs, [], nodes=[], opset_imports={"": 21}, name="program"), ir_version=10)


def _exports_past(source: str | ir.Model, record: manifest.Manifest) -> bool:
    """Whether ``source`` is a folder to export as the one that ``record`` speaks of: with its cache."""
    if isinstance(source, ir.Model):
        return False
    names = [str(value["name"]) for value in record["interface"]["inputs"]]
    return record["source"]["kind"] == "hugging_face" and Path(source).is_dir() and any("past" in n for n in names)


def _files(folder: Path, record: manifest.Manifest) -> Check:
    for name, known in sorted(record["files"].items()):
        path = folder / name
        if not path.is_file():
            return Check("files", False, f"{name} is missing")
        if manifest.sha256(path) != known["sha256"]:
            return Check("files", False, f"{name} is not the file that was written")
    return Check("files", True, f"{len(record['files'])} as written")


def _interface(folder: Path, record: manifest.Manifest) -> Check:
    now = manifest.plain(program_interface(folder))
    known = record["interface"]
    names = ", ".join(str(v["name"]) for side in ("inputs", "outputs") for v in known[side])
    for side in ("inputs", "outputs"):
        for old, new in itertools.zip_longest(known[side], now[side]):
            if old != new:
                return Check("interface", False, f"{side}: {old} became {new}")
    return Check("interface", True, f"kept: {names}")


def _runs(program: Program, samples: Sequence[Sample]) -> Check:
    for number, sample in enumerate(samples):
        first, second = program(sample.feeds), program(sample.feeds)
        for name, array in first.items():
            if array.dtype.kind == "f" and np.isnan(array).any():
                return Check("runs", False, f"output '{name}' has NaN on sample {number}")
            if not np.array_equal(array, second[name]):
                return Check("runs", False, f"output '{name}' differs between two runs of sample {number}")
    return Check("runs", True, "finite, and the same twice")


def _source(source: dict[str, Any], record: manifest.Manifest) -> Check:
    known = record["source"]
    if source["kind"] != known["kind"]:
        return Check("original", None, f"compiled from {known['kind']}, given is {source['kind']}")
    same = _digests(source) == _digests(known)
    return Check(
        "original", same, "the model that was compiled" if same else "is not the model that was compiled"
    )


def _digests(source: dict[str, Any]) -> list[str]:
    return sorted(f["sha256"] for f in source.get("files", {}).values()) or [source.get("sha256", "")]


def _outputs(
    program: Program, model: ir.Model, samples: Sequence[Sample], workspace: Workspace, record: manifest.Manifest
) -> Check:
    from qcompile.calibration.runner import OrtRunner

    kept = {port["name"]: port["type"] for port in record["interface"]["outputs"]}
    alike = [v for v in model.graph.outputs if v.dtype is not None and kept.get(v.name) == v.dtype.name]
    names = [str(v.name) for v in alike]  # a quantised cache is codes
    worst: dict[str, Difference] = {name: Difference() for name in names}
    for sample, before in OrtRunner(workspace).stream(model, samples, names, label="original"):
        after = program(sample.feeds)
        for name in names:
            worst[name].add(before[name], after[name], sample.mask)
    proof = proof_of(worst.values(), len(samples), None)
    recorded = record["end_to_end"]["sqnr_db"]
    bound = float("inf") if recorded is None else recorded - SLACK_DB
    words = f"SQNR {decibels(manifest.plain(proof.sqnr_db))}, when compiled {decibels(recorded)}"
    return Check("outputs", proof.sqnr_db >= bound, words)


def _kernels(folder: Path, record: manifest.Manifest) -> Check:
    now = backends.by_name(record["target"]["name"]).kernels_of(folder / "model.onnx")
    low = sum(1 for k in now if k["low_bit"])
    known = sum(1 for k in record["kernels"] if k["low_bit"])
    return Check("kernels", low >= known, f"{low} of {len(now)} matmuls in low bits, when compiled {known}")
