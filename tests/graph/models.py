"""Shared by the tests of the canonical form: models, canonical once per session, and their comparison."""

from __future__ import annotations

import collections
import dataclasses
import functools
import types
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime

from qcompile.capture.onnx_file import load_onnx
from qcompile.graph.workspace import Workspace
from qcompile.ledger import Entry, Ledger
from qcompile.models.architectures import cached_export
from qcompile.passes.canonicalise import Canonicalise

PADDED_SHAPES = ((2, 10), (3, 17))  # (batch, sequence); the last row is padded from its middle


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def feeds_for(model: onnxruntime.InferenceSession, batch: int, sequence: int) -> dict[str, np.ndarray]:
    """Random ids or pixels by the input's name; masks with the last row half padded."""
    random = np.random.default_rng(sequence)
    found: dict[str, np.ndarray] = {}
    for port in model.get_inputs():
        if port.name == "pixel_values":
            found[port.name] = random.normal(size=(batch, 3, 32, 32)).astype(np.float32)
        elif port.name.endswith("mask"):
            found[port.name] = np.ones((batch, sequence), np.int64)
            found[port.name][-1, max(1, sequence // 2) :] = 0
        else:
            length = max(1, sequence // 3) if port.name.startswith("decoder") else sequence
            found[port.name] = random.integers(3, 256, (batch, length))
    return found


def difference(before: onnxruntime.InferenceSession, after: onnxruntime.InferenceSession) -> float:
    """max|after - before| / max|before| over unmasked positions, the worst of the padded shapes."""
    worst = 0.0
    for batch, sequence in PADDED_SHAPES:
        feeds = feeds_for(before, batch, sequence)
        expected, actual = before.run(None, feeds)[0], after.run(None, feeds)[0]
        error = np.abs(actual - expected)
        mask = feeds.get("attention_mask")
        if mask is not None and mask.shape == error.shape[:2]:
            error = error * mask[..., None]
        worst = max(worst, float(error.max() / np.abs(expected).max()))
    return worst


@dataclasses.dataclass(frozen=True)
class Canonical:
    """A canonical model on disk, and what the pass recorded while making it."""

    source: Path
    path: Path
    entry: Entry

    def load(self, workspace: Workspace) -> ir.Model:
        """A fresh copy to edit, with its tensors in ``workspace``."""
        model = ir.load(self.path)
        workspace.adopt(model)
        return model


class Library:
    """Canonical models, each made once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._get = functools.cache(self._make)

    def architecture(self, name: str, opset: int = 20, attention: str = "sdpa") -> Canonical:
        return self._get(cached_export(name, opset=opset, attention=attention))

    def fused(self, name: str) -> Canonical:
        return self._get(self._fused_file(name))

    @functools.cache  # noqa: B019 - one library lives as long as the session
    def _fused_file(self, name: str) -> Path:
        from qcompile.models.fused import fused

        return fused(name, self._folder / "fused")

    def _make(self, source: Path) -> Canonical:
        workspace = Workspace(self._folder)
        model, entry = canonicalised(source, workspace)
        return Canonical(source, workspace.save(model, "canonical"), entry)


def canonicalised(source: Path, workspace: Workspace) -> tuple[ir.Model, Entry]:
    model = load_onnx(source, workspace)
    return model, canonicalise(model, workspace)


def canonicalise(model: ir.Model, workspace: Workspace) -> Entry:
    ledger = Ledger()
    context: Any = types.SimpleNamespace(workspace=workspace, ledger=ledger)
    Canonicalise().run(model, context)
    return ledger.current


def spelled(path: Path, text: str, weights: dict[str, np.ndarray], opset: int = 21) -> Path:
    """Write the graph ``text`` (ONNX's own syntax) with ``weights`` as its initializers."""
    header = f'<ir_version: 10, opset_import: ["" : {opset}, "com.microsoft" : 1]>\n'
    proto = onnx.parser.parse_model(header + text)
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(a, name) for name, a in weights.items())
    onnx.save(proto, path)
    return path


def compare(
    source: Path, feeds: dict[str, np.ndarray], workspace: Workspace
) -> tuple[ir.Model, Entry, float]:
    """The canonical form of ``source``, what was recorded, and the worst relative error over all outputs."""
    model, entry = canonicalised(source, workspace)
    return model, entry, relative_error(session(source), session(workspace.save(model, "after")), feeds)


def relative_error(
    before: onnxruntime.InferenceSession, after: onnxruntime.InferenceSession, feeds: dict[str, np.ndarray]
) -> float:
    pairs = zip(before.run(None, feeds), after.run(None, feeds), strict=True)
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for b, a in pairs)


def operators(model: ir.Model) -> dict[str, int]:
    """How often each operator occurs."""
    return dict(collections.Counter(node.op_type for node in model.graph))
