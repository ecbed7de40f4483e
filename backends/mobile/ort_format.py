"""ONNX Runtime's mobile format: the ``.ort`` file, the operators it needs, and what the phone's accelerators say to it.

rewrite:  model.onnx  ->  model.ort, required_operators_and_types.config
needs:    a program that the CPU provider loads
ensures:  names of inputs and outputs stay; no optimisation that only one kind of processor can run
"""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TypedDict

import numpy as np

from qcompile.backends.mobile import ort_convert
from qcompile.calibration.runner import open_session, run_session
from qcompile.environment import require_onnxruntime
from qcompile.errors import UserError
from qcompile.pipeline import Arrays

MODEL, PROGRAM, OPERATORS = "model.onnx", "model.ort", "required_operators_and_types.config"
LARGEST = 2**31 - 1  # a flatbuffer counts its bytes in 31 bits


class Verdict(TypedDict):
    """What ONNX Runtime's check says of one accelerator: NO, MAYBE or YES, as the model is and with fixed shapes."""

    as_is: str
    fixed_shapes: str
    nodes: str
    partitions: int


def convert(folder: Path) -> None:
    """Write the mobile files of ``folder``/model.onnx beside it."""
    weights = sum(path.stat().st_size for path in folder.glob(f"{MODEL}*"))
    if weights > LARGEST:
        what = f"the program has {weights / 1e9:.1f} GB, and an .ort file holds at most 2.1 GB"
        raise UserError(what, hint="take a recipe with fewer bits, or leave out runtime=onnxruntime")
    require_onnxruntime()
    command = [sys.executable, "-P", ort_convert.__file__, str(folder / MODEL)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        hint = "the program runs as model.onnx: take --target cpu, and report this"
        lines = done.stderr.strip().splitlines()[-1:] or ["no reason given"]
        raise UserError(f"ONNX Runtime cannot write {PROGRAM}: {lines[0][:300]}", hint=hint)
    written = (folder / f"model.{OPERATORS}").read_text(encoding="utf-8").splitlines()
    (folder / f"model.{OPERATORS}").unlink()
    lines = [line for line in written if not line.startswith("#")]  # its comments hold absolute paths
    (folder / OPERATORS).write_text("\n".join([f"# Generated from {PROGRAM}", *lines, ""]), encoding="utf-8")


def usability(model: Path) -> dict[str, Verdict]:
    """By accelerator, what ONNX Runtime's own check says of ``model``; empty where the check cannot read it."""
    require_onnxruntime()
    from onnxruntime.tools.mobile_helpers.usability_checker import analyze_model

    lines: list[str] = []
    logger = logging.Logger("usability", logging.INFO)  # no part of the tree of loggers
    logger.addHandler(_Lines(lines))
    try:
        analyze_model(model, logger=logger)
    except Exception:  # shape inference refuses some graphs
        return {}
    return read_verdicts(lines)


class _Lines(logging.Handler):
    def __init__(self, lines: list[str]) -> None:
        super().__init__()
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self._lines += record.getMessage().splitlines()


_PARTS = re.compile(r"(\d+) partitions with a total of (\d+/\d+) nodes can be handled by the (.+) EP\.")
_AS_IS = re.compile(r"Model should perform well with (.+) as is: (\w+)")
_FIXED = re.compile(r"Model should perform well with (.+) if modified to have fixed input shapes: (\w+)")


def read_verdicts(lines: Iterable[str]) -> dict[str, Verdict]:
    """The verdicts in the ``lines`` of the check; nodes and partitions are those of the last look, at fixed shapes."""
    found: dict[str, Verdict] = {}
    for line in lines:
        if match := _PARTS.search(line):
            known = found.setdefault(match[3], Verdict(as_is="", fixed_shapes="", nodes="", partitions=0))
            known |= {"nodes": match[2], "partitions": int(match[1])}
        elif match := _AS_IS.search(line):
            found[match[1]] |= {"as_is": match[2], "fixed_shapes": match[2]}
        elif match := _FIXED.search(line):
            found[match[1]]["fixed_shapes"] = match[2]
    return found


def difference(folder: Path, feeds: Iterable[Arrays]) -> float:
    """max|model.ort - model.onnx| over all outputs for ``feeds``, both run here; 0 means the same bits."""
    sessions = [open_session(folder / name, threads=1) for name in (MODEL, PROGRAM)]
    names = [port.name for port in sessions[0].get_outputs()]
    worst = 0.0
    for one in feeds:
        known = {port.name for port in sessions[0].get_inputs()}
        given = {name: array for name, array in one.items() if name in known}
        for a, b in zip(*(run_session(session, names, given) for session in sessions), strict=True):
            same = a.shape == b.shape and a.tobytes() == b.tobytes()
            worst = max(worst, 0.0 if same else float(np.abs(a.astype(np.float64) - b.astype(np.float64)).max()))
    return worst
