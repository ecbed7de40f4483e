"""Small integer-only programs, with their last integers as outputs, and a NumPy run of them."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

import qcompile
from qcompile.driver import CompiledModel
from qcompile.models.architectures import VOCAB, cached_export

Array = np.ndarray
_held: list[CompiledModel] = []  # their files last as long as the process


@functools.cache
def compiled(name: str, recipe: str, passes: str = "os_plus,int_only", with_past: bool = False) -> CompiledModel:
    """The architecture ``name``, small, as an integer-only program."""
    path = cached_export(name, with_past=with_past)
    made = qcompile.compile(path, recipe=recipe, passes=passes, max_samples=8, max_length=24)
    _held.append(made)
    return made


@functools.cache
def exposed(name: str, recipe: str, with_past: bool = False) -> Path:
    """The program of ``compiled`` that also gives out the integers before each last conversion to float."""
    folder = Path(tempfile.mkdtemp(prefix="exposed"))
    made = onnx.load(compiled(name, recipe, with_past=with_past).folder / "model.onnx")
    onnx.save(expose(made), folder / "model.onnx")
    return folder / "model.onnx"


def expose(model: onnx.ModelProto) -> onnx.ModelProto:
    """``model`` with an output ``<name>.integers`` for each float output, which is Mul(Cast(integers), step)."""
    makers = {name: node for node in model.graph.node for name in node.output}
    for port in list(model.graph.output):
        if port.type.tensor_type.elem_type != onnx.TensorProto.FLOAT:
            continue
        scaling = makers[port.name]
        cast = makers[scaling.input[0]]
        assert (scaling.op_type, cast.op_type) == ("Mul", "Cast")
        name = f"{port.name}.integers"
        model.graph.node.append(onnx.helper.make_node("Identity", [cast.input[0]], [name]))
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT32, None))
    return model


def texts(rows: int, length: int, seed: int = 0) -> dict[str, Array]:
    """Token ids without padding."""
    ids = np.random.default_rng(seed).integers(3, VOCAB, (rows, length))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


class GatherElements(OpRun):
    """onnx's own takes at most 64 rows."""

    op_domain = ""

    def _run(self, data: Array, indices: Array, axis: int | None = None) -> tuple[Array]:
        return (np.take_along_axis(data, indices.astype(np.int64), axis or 0),)


def in_numpy(model: Path, feeds: dict[str, Array]) -> dict[str, Array]:
    """What ``model`` computes where every operator is NumPy's."""
    proto = onnx.load(model)
    known = {port.name for port in proto.graph.input}
    evaluator: Any = ReferenceEvaluator(proto, new_ops=[GatherElements])
    results = evaluator.run(None, {name: array for name, array in feeds.items() if name in known})
    return dict(zip((port.name for port in proto.graph.output), results, strict=True))
