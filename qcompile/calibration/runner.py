"""Runs the IR in ONNX Runtime, one sample at a time: what a user would run is what is measured."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from qcompile.calibration.caches import fed
from qcompile.environment import require_onnxruntime
from qcompile.errors import UserError
from qcompile.graph.workspace import Workspace

Arrays = dict[str, np.ndarray]
Run = Callable[[Arrays], Arrays]


def open_session(
    model: Path | bytes,
    *,
    threads: int | None = None,
    literal_qdq: bool = False,
    optimised_path: Path | None = None,
    level: str = "all",
    library: Path | None = None,
) -> Any:
    """An ``onnxruntime.InferenceSession`` on CPU.

    ``level``: how far it optimises, "basic", "extended" or "all"; ``optimised_path``: where it writes the
    outcome, with large weights in a file beside. ``library``: kernels of operators of the model's own
    (``library_beside``).

    ``literal_qdq`` executes QuantizeLinear/DequantizeLinear as written instead of fusing them into
    integer kernels; weights are then dequantised once, when the session is made.
    """
    ort = require_onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads or os.cpu_count() or 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if literal_qdq:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, f"ORT_ENABLE_{level.upper()}")
    if optimised_path is not None:
        options.optimized_model_filepath = str(optimised_path)
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", f"{optimised_path.name}.data"
        )
    source = model if isinstance(model, bytes) else str(model)
    try:
        if library is not None:
            options.register_custom_ops_library(str(library))
        return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises its own unrelated types
        raise UserError(f"ONNX Runtime cannot load the model: {_first_line(error)}", hint=_load_hint(error)) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:400]


def _load_hint(error: Exception) -> str:
    if "NOT_IMPLEMENTED" in str(error) or "not a registered" in str(error):
        return "the operator named above has no CPU kernel in this onnxruntime; replace it or export without it"
    return "check the file with `python -m onnx.checker` and onnxruntime's version"


class OrtRunner:
    """Streams samples through the model; keeps the session of the last model it ran."""

    def __init__(self, workspace: Workspace, threads: int | None = None) -> None:
        self._workspace = workspace
        self._threads = threads

    def stream(
        self, model: ir.Model, samples: Iterable[Any], fetch: Sequence[str], label: str = ""
    ) -> Iterator[tuple[Any, Arrays]]:
        """Yield ``(sample, {name: array})`` for the values ``fetch`` of ``model``, computed on each sample.

        Nothing is run and nothing comes when ``fetch`` is empty.
        Raises UserError when ONNX Runtime cannot load or run the model.
        """
        if not fetch:
            return
        with self.opened(model, fetch) as run:
            for sample in samples:
                yield sample, run(sample.feeds)

    @contextlib.contextmanager
    def opened(self, model: ir.Model, fetch: Sequence[str]) -> Iterator[Run]:
        """A function from feeds to the values ``fetch`` of ``model``; the session lasts as long as the context."""
        names = list(dict.fromkeys(fetch))
        self._workspace.let_go(model)  # the session will hold the weights
        held = [open_session(self._snapshot(model, names), threads=self._threads, literal_qdq=True)]

        def run(feeds: Arrays) -> Arrays:
            return dict(zip(names, run_session(held[0], names, fed(held[0], feeds)), strict=True))

        try:
            yield run
        finally:
            held.clear()  # whoever still has ``run`` does not keep the session

    def _snapshot(self, model: ir.Model, names: list[str]) -> Path:
        """Save ``model`` with the values ``names`` as its only outputs."""
        graph, outputs = model.graph, list(model.graph.outputs)
        values = {v.name: v for v in _all_values(graph)}
        missing = [n for n in names if n not in values]
        if missing:
            raise KeyError(f"values not in the graph: {missing[:5]}")
        graph.outputs.clear()
        graph.outputs.extend(values[n] for n in names)
        try:
            return self._workspace.save(model, "running")
        finally:
            graph.outputs.clear()
            graph.outputs.extend(outputs)


def run_session(session: Any, names: Sequence[str] | None, feeds: Arrays) -> list[np.ndarray]:
    """Run ``session``; a failure inside of onnxruntime becomes a UserError."""
    try:
        results: list[np.ndarray] = session.run(list(names) if names is not None else None, feeds)
        return results
    except UserError:  # of a program that no ONNX Runtime runs
        raise
    except Exception as error:
        hint = "do the inputs fit the model? Run the original in ONNX Runtime on the same data to see"
        raise UserError(f"ONNX Runtime cannot run the model: {_first_line(error)}", hint=hint) from error


@functools.cache
def _matmul_session() -> Any:
    """One MatMul with free shapes: ONNX Runtime's kernel is several times faster than NumPy's here."""
    value = onnx.helper.make_tensor_value_info
    ends = [
        value(name, onnx.TensorProto.FLOAT, shape)
        for name, shape in (("a", ["m", "k"]), ("b", ["k", "n"]), ("y", ["m", "n"]))
    ]
    graph = onnx.helper.make_graph([onnx.helper.make_node("MatMul", ["a", "b"], ["y"])], "matmul", ends[:2], ends[2:])
    opset = [onnx.helper.make_opsetid("", 21)]
    return open_session(onnx.helper.make_model(graph, opset_imports=opset, ir_version=10).SerializeToString())


def matmul(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """float32 product of (M, K) and (K, N)."""
    product: np.ndarray = _matmul_session().run(None, {"a": np.ascontiguousarray(a), "b": np.ascontiguousarray(b)})[0]
    return product


def _all_values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs
