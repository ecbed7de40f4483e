"""An ONNX file in, the IR out: checked, with mapped weights, in one spelling of the ways to write a graph."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx_ir.passes import common as onnx_passes

from qcompile.capture.tensors import check_tensors, check_weights, inline_small
from qcompile.capture.tidy import (
    FoldSizes,
    FoldSmallConstants,
    ForgetDoubtfulShapes,
    RemoveDropout,
    SolveBroadcasts,
    SolveReshapes,
)
from qcompile.capture.widen import widen
from qcompile.errors import UserError
from qcompile.graph.convert import check_opset, to_canonical_opset
from qcompile.graph.provenance import original_name, remember
from qcompile.graph.workspace import Workspace

_FINDS_SIZES = (SolveReshapes, SolveBroadcasts, FoldSizes)
_ROUNDS = 32  # exports settle within five; no file may keep this going
PROTOBUF_LIMIT = 2**31 - 1
EXPORT_AGAIN = "export it again, and see what onnx.checker.check_model(path) says"


@dataclasses.dataclass(frozen=True)
class Port:
    """An input or output as the caller's code knows it."""

    name: str
    type: ir.TypeProtocol | None
    shape: ir.Shape | None


def load_onnx(path: Path, workspace: Workspace) -> ir.Model:
    """The model in ``path`` at opset 21 (or its own, when newer), with its weights in ``workspace``.

    External data is mapped and moved one tensor at a time. Functions are inlined, Constant nodes become
    initializers, shape arithmetic is folded, Identity and Dropout go, half precision becomes float32 inside.
    The names, types and dynamic axes of inputs and outputs stay. Raises UserError for a file that is missing,
    broken or of an unsupported opset; for external data that leaves the model's folder, is missing or does
    not fit; for weights that are not finite.
    """
    path = Path(path)
    model = read_onnx(path)
    with _where(path), _quiet():
        interface = _interface(model)
        remember(model)
        _normalise(model)
        widen(model, workspace)
        to_canonical_opset(model)
        _simplify(model)
        remember(model)
        _restore(model, interface)
        check_weights(model)
        inline_small(model)
    workspace.adopt(model)
    return model


def read_onnx(path: Path) -> ir.Model:
    """The model in ``path`` as it is written, checked; its weights stay where they are, mapped when read.

    Raises UserError as ``load_onnx`` does, but for weights, which are not looked at.
    """
    with _where(path), _quiet():
        model = _read(path)
        check_opset(model)
        _check_ports(model, path)
        _check_wired(model, path)
        check_tensors(model)
    return model


def _read(path: Path) -> ir.Model:
    proto = _parse(path)
    _check_initializers(proto.graph, path)
    try:
        model = ir.from_proto(proto)
    except Exception as error:  # the library wraps whatever is wrong with the graph in its own errors
        what = f"the graph is not valid: {_innermost(error)}"
        raise UserError(what, where=str(path), hint=EXPORT_AGAIN) from error
    _set_folder(model, path.parent)
    return model


def _parse(path: Path) -> onnx.ModelProto:
    if path.is_dir():
        raise UserError(f"{path} is a folder", hint="pass the .onnx file in it")
    if not path.is_file():
        raise UserError(f"no such file: {path}", hint="give the path of an .onnx file")
    size = path.stat().st_size
    if size > PROTOBUF_LIMIT:
        raise UserError(
            f"the file has {size / 2**30:.1f} GiB, and a protobuf cannot exceed 2 GiB",
            where=str(path),
            hint="save the weights as external data: onnx.save(model, path, save_as_external_data=True)",
        )
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except Exception as error:  # DecodeError lives in a protobuf module whose path differs between versions
        raise _not_onnx(path, size) from error
    if not proto.HasField("graph") or not proto.graph.output:
        raise _not_onnx(path, size)
    return proto


def _not_onnx(path: Path, size: int) -> UserError:
    what = "the file is empty" if size == 0 else "the file is not an ONNX model, or it is truncated"
    return UserError(what, where=f"{path} ({size} bytes)", hint="download or export it again")


def _check_initializers(graph: onnx.GraphProto, path: Path) -> None:
    seen: set[str] = set()
    for tensor in graph.initializer:
        if tensor.name in seen:
            raise UserError(f"two initializers have the name '{tensor.name}'", where=str(path), hint=EXPORT_AGAIN)
        seen.add(tensor.name)
        for entry in tensor.external_data:
            if entry.key in ("offset", "length") and not entry.value.isdecimal():
                what = f"the external data of tensor '{tensor.name}'"
                raise UserError(f"{what} has {entry.key} '{entry.value}'", where=str(path), hint=EXPORT_AGAIN)
    if graph.sparse_initializer:
        raise UserError("sparse initializers are not supported", where=str(path), hint="export dense weights")


def _set_folder(model: ir.Model, folder: Path) -> None:
    """External data is relative to the model's folder."""
    for graph in (*model.graphs(), *(function.graph for function in model.functions.values())):
        ir.external_data.set_base_dir(graph, folder)


def _interface(model: ir.Model) -> tuple[list[Port], list[Port]]:
    weights = model.graph.initializers
    inputs = [_port(value) for value in model.graph.inputs if value.name not in weights]
    return inputs, [_port(value) for value in model.graph.outputs]


def _port(value: ir.Value) -> Port:
    return Port(value.name or "", copy.copy(value.type), None if value.shape is None else value.shape.copy())


def _normalise(model: ir.Model) -> None:
    """One spelling: sorted nodes, no functions, constants as initializers of the main graph, unique names."""
    for step in (
        onnx_passes.InlinePass(),
        onnx_passes.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
        onnx_passes.TopologicalSortPass(),
        onnx_passes.RemoveInitializersFromInputsPass(),
        onnx_passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        onnx_passes.LiftSubgraphInitializersToMainGraphPass(),
        RemoveDropout(),
        onnx_passes.IdentityEliminationPass(),
        onnx_passes.NameFixPass(),
    ):
        step(model)


def _simplify(model: ir.Model) -> None:
    """Shapes everywhere, shape arithmetic folded, nothing unused."""
    infer = onnx_passes.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)
    lift = onnx_passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)
    fold = ir.passes.Sequential(lift, FoldSmallConstants(), lift)
    lift(model)
    forget = ForgetDoubtfulShapes()
    for _ in range(_ROUNDS):
        if not _changed(model, forget, infer, SolveReshapes(), SolveBroadcasts(), forget, infer, FoldSizes()):
            break
        fold(model)  # a size may end a slice, whose size ends another
    for step in (
        fold,
        onnx_passes.IdentityEliminationPass(),
        onnx_passes.RemoveUnusedNodesPass(),
        onnx_passes.RemoveUnusedOpsetsPass(),
        onnx_passes.OutputFixPass(),
        onnx_passes.NameFixPass(),
        infer,
    ):
        step(model)


def _changed(model: ir.Model, *steps: ir.passes.InPlacePass) -> bool:
    """Whether any of ``steps`` found a size."""
    found = [step(model).modified for step in steps]
    return any(new for step, new in zip(steps, found, strict=True) if isinstance(step, _FINDS_SIZES))


def _restore(model: ir.Model, interface: tuple[list[Port], list[Port]]) -> None:
    """Inference sharpens and renames axes; those of inputs and outputs are the caller's, and stay."""
    for values, ports in zip((model.graph.inputs, model.graph.outputs), interface, strict=True):
        now, wanted = [value.name for value in values], [port.name for port in ports]
        if now != wanted:
            raise UserError(
                f"the model's interface cannot be kept: {', '.join(wanted)} became {now}",
                hint="one tensor that is two outputs at once needs an Identity node between",
            )
        for value, port in zip(values, ports, strict=True):
            value.type, value.shape = port.type, port.shape


def _check_ports(model: ir.Model, path: Path) -> None:
    """Inputs and outputs must be tensors; a negative size, as older exporters write it, is one that is not known."""
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.type is not None and not isinstance(value.type, ir.TensorType):
            what = f"'{value.name}' is no tensor but a {type(value.type).__name__}"
            raise UserError(what, where=str(path), hint="export the model with tensors alone as inputs and outputs")
        if value.shape is not None and any(isinstance(size, int) and size < 0 for size in value.shape):
            value.shape = ir.Shape([None if isinstance(size, int) and size < 0 else size for size in value.shape])


def _check_wired(model: ir.Model, path: Path) -> None:
    """Every value that is read must be made somewhere."""
    for graph in (*model.graphs(), *(function.graph for function in model.functions.values())):
        for node in graph:
            for value in node.inputs:
                if value is not None and not _is_made(value):
                    what = f"node '{original_name(node)}' ({node.op_type})"
                    raise UserError(
                        f"{what} reads '{value.name}', which nothing makes",
                        where=str(path),
                        hint="the file is damaged, or a tool removed a node that is in use",
                    )
        for value in graph.outputs:
            if not _is_made(value):
                raise UserError(f"output '{value.name}' is made by no node", where=str(path), hint=EXPORT_AGAIN)


def _is_made(value: ir.Value) -> bool:
    return value.producer() is not None or value.is_graph_input() or value.is_initializer()


@contextlib.contextmanager
def _where(path: Path) -> Iterator[None]:
    """A graph on which the library's clean-up stumbles is the user's to mend; say which file."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        what = f"the graph cannot be brought into normal form: {_innermost(error)}"
        raise UserError(what, where=str(path), hint=EXPORT_AGAIN) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Notices of the libraries about graphs that are repaired or refused here anyway."""
    loggers = [logging.getLogger(name) for name in ("onnx_ir", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _innermost(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).strip()[:600]}"
