"""Torch in, ONNX out: an ``nn.Module`` is captured by ``torch.export`` and torch's own ONNX exporter.

The file that is written keeps the module's own names: parameters are named as in ``state_dict`` where the
exporter keeps them, and every node carries ``pkg.torch.onnx.name_scopes`` in its metadata.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcompile.errors import UserError, unknown_name

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

DEFAULT_OPSET = 21
# A protobuf cannot exceed 2 GB, and a file above this size is quicker to map than to parse.
EXTERNAL_DATA_BYTES = 64 * 1024 * 1024

# Absolute paths of the exporting machine and its trace: neither belongs in a model file.
_LOCAL_METADATA = ("pkg.torch.onnx.stack_trace", "pkg.torch.onnx.fx_node")

Inputs = Mapping[str, "torch.Tensor"]
DynamicShapes = Mapping[str, Mapping[int, str]]


@dataclasses.dataclass(frozen=True)
class Captured:
    """What a factory returned: a module, its example inputs by name, and their dynamic axes."""

    module: torch.nn.Module
    inputs: dict[str, torch.Tensor]
    dynamic_shapes: dict[str, dict[int, str]]


def capture_module(
    module: torch.nn.Module,
    example_inputs: Inputs | Sequence[torch.Tensor] | torch.Tensor,
    dynamic_shapes: DynamicShapes | None,
    workdir: str | os.PathLike[str],
    *,
    opset: int = DEFAULT_OPSET,
    output_names: Sequence[str] | None = None,
) -> Path:
    """Write ``workdir/model.onnx`` for ``module`` and return its path.

    example_inputs: tensors by the name of ``forward``'s argument, or in the order of its arguments
    dynamic_shapes: axis index -> axis name for each input; None makes every axis as static as the example
    output_names:   for the first tensors that ``forward`` returns; the tensors after them are dropped.
                    None keeps all, with the exporter's names

    The module is exported in eval mode; its training flag is restored. Raises UserError naming what
    stopped the export.
    """
    _require_torch()
    inputs = named_inputs(module, example_inputs)
    shapes = _checked_shapes(inputs, dynamic_shapes)
    path = Path(workdir) / "model.onnx"
    path.parent.mkdir(parents=True, exist_ok=True)
    with _eval_mode(module), _quiet():
        _save(_export(module, inputs, shapes, opset, list(inputs), output_names), path)
    return path


def capture_with_past(module: torch.nn.Module, workdir: str | os.PathLike[str], *, opset: int = DEFAULT_OPSET) -> Path:
    """Write ``workdir/model.onnx`` for a causal language model with its key/value cache, and return its path.

    ``torch_cache`` says what its inputs and outputs are. Raises UserError for a model that has no such cache.
    """
    from qcompile.capture.torch_cache import Cache, name_total, tensors_only

    path = Path(workdir) / "model.onnx"
    path.parent.mkdir(parents=True, exist_ok=True)
    with _eval_mode(module), _quiet():
        cache = Cache(module)
        with tensors_only(module):
            model = _export(module, *cache.example(), opset, *cache.port_names())
        name_total(model)
        _save(model, path)
    return path


def capture_factory(spec: str, workdir: str | os.PathLike[str], *, opset: int = DEFAULT_OPSET) -> Path:
    """Write ``workdir/model.onnx`` for the module that ``package.module:factory`` returns.

    The factory takes no argument and returns ``(module, example_inputs[, dynamic_shapes])``, or a module with
    ``example_inputs`` (and optionally ``dynamic_shapes``) attributes. Without dynamic_shapes axis 0 of every
    input is ``batch``, and axis 1 of two-dimensional integer inputs (token ids, masks) is ``sequence``.
    """
    _require_torch()
    captured = _call_factory(_load_factory(spec), spec)
    return capture_module(captured.module, captured.inputs, captured.dynamic_shapes, workdir, opset=opset)


def named_inputs(
    module: torch.nn.Module, example_inputs: Inputs | Sequence[torch.Tensor] | torch.Tensor
) -> dict[str, torch.Tensor]:
    """The example inputs by the names of ``forward``'s arguments, in the order of its signature."""
    import torch

    parameters = list(inspect.signature(module.forward).parameters)
    if isinstance(example_inputs, torch.Tensor):
        example_inputs = (example_inputs,)
    if isinstance(example_inputs, Mapping):
        given = dict(example_inputs)
    else:
        given = dict(zip(parameters, example_inputs, strict=False))
        if len(given) != len(example_inputs):
            raise UserError(
                f"{len(example_inputs)} example inputs for {len(parameters)} arguments of forward",
                where=type(module).__name__,
                hint=f"its arguments are {', '.join(parameters)}",
            )
    wrong = [name for name, value in given.items() if not isinstance(value, torch.Tensor)]
    if wrong:
        raise UserError(
            f"example inputs must be tensors; not so: {', '.join(wrong)}",
            where=type(module).__name__,
            hint="give torch tensors, and fix other arguments in a wrapper's forward",
        )
    order = {name: index for index, name in enumerate(parameters)}
    return dict(sorted(given.items(), key=lambda item: order.get(item[0], len(order))))


def default_dynamic_shapes(inputs: Inputs) -> dict[str, dict[int, str]]:
    """Axis 0 is ``batch``; axis 1 of two-dimensional integer inputs (ids, masks) is ``sequence``."""
    shapes: dict[str, dict[int, str]] = {}
    for name, value in inputs.items():
        axes = {0: "batch"} if value.ndim else {}
        if value.ndim == 2 and not value.is_floating_point():
            axes[1] = "sequence"
        shapes[name] = axes
    return shapes


def _require_torch() -> None:
    missing = [name for name in ("torch", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"capturing a torch module needs {' and '.join(missing)}",
            hint="pip install 'qcompile-nn[torch]', or export the model to ONNX and pass the file",
        )


def _checked_shapes(inputs: Inputs, shapes: DynamicShapes | None) -> dict[str, dict[int, str]]:
    """One entry per input, which is what torch.export wants; axes outside a tensor are refused."""
    given = {name: dict(axes) for name, axes in (shapes or {}).items()}
    unknown = sorted(set(given) - set(inputs))
    if unknown:
        raise UserError(
            f"dynamic_shapes names {', '.join(unknown)}, which is no example input",
            hint=f"inputs: {', '.join(inputs)}",
        )
    for name, axes in given.items():
        for axis in axes:
            if not 0 <= axis < inputs[name].ndim:
                shape = tuple(inputs[name].shape)
                what = f"dynamic axis {axis} of '{name}' is outside its shape {shape}"
                raise UserError(what, hint="axes count from 0")
    return {name: given.get(name, {}) for name in inputs}


def _export(
    module: torch.nn.Module,
    inputs: Mapping[str, Any],
    shapes: Mapping[str, Any],
    opset: int,
    input_names: Sequence[str],
    output_names: Sequence[str] | None,
) -> ir.Model:
    import torch

    try:
        program = torch.onnx.export(
            module,
            (),
            kwargs=dict(inputs),
            dynamo=True,
            verbose=False,
            opset_version=opset,
            input_names=list(input_names),
            output_names=output_names,
            dynamic_shapes=dict(shapes),
            custom_translation_table=_translations(),
        )
    except Exception as error:  # the exporter wraps whatever the traced code raises
        raise _export_error(module, error) from error
    assert program is not None
    if output_names is not None:
        _keep_outputs(program.model, len(output_names))
    if opset == 23:
        _spread_rotary_tables(program.model)
    return program.model


def _translations() -> dict[Any, Any] | None:
    """Those of the operators that ``training`` puts into a module; none where it is not in use."""
    clips = sys.modules.get("qcompile.capture.torch_clip")
    return None if clips is None else clips.translations()


def _spread_rotary_tables(model: ir.Model) -> None:
    """Repeat cos and sin over the batch before each RotaryEmbedding.

    Torch's exporter writes them as (1, sequence, dim) at opset 23; the operator wants (batch, sequence, dim),
    and ONNX Runtime 1.31 refuses any batch but 1.
    """
    import onnx_ir.tape

    for node in list(model.graph):
        has_positions = len(node.inputs) > 3 and node.inputs[3] is not None
        if (node.domain, node.op_type) != ("", "RotaryEmbedding") or has_positions:
            continue
        tape = onnx_ir.tape.Tape()
        batch = tape.op("Shape", [node.inputs[0]], {"start": 0, "end": 1})
        ones = tape.op("Constant", [], {"value_ints": [1, 1]})
        shape = tape.op("Concat", [batch, ones], {"axis": 0})
        for index in (1, 2):
            node.replace_input_with(index, tape.op("Expand", [node.inputs[index], shape]))
        for position, added in enumerate(tape.nodes):
            added.name = f"{node.name}/spread_{position}"
            added.outputs[0].name = f"{node.name}/spread_{position}_output"
            added.metadata_props.update(node.metadata_props)
        model.graph.insert_before(node, tape.nodes)


def _keep_outputs(model: ir.Model, count: int) -> None:
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    if len(model.graph.outputs) > count:
        del model.graph.outputs[count:]
        RemoveUnusedNodesPass()(model)


def _export_error(module: torch.nn.Module, error: Exception) -> UserError:
    """A short account of a failed export: the innermost cause, and the module line that it names."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    text = str(cause).strip() or str(error).strip()
    line = text.splitlines()[0] if text else "no message"
    place = _user_frame(cause) or type(module).__name__
    return UserError(
        f"torch could not export {type(module).__name__}: {type(cause).__name__}: {line[:400]}",
        where=place,
        hint="forward must be traceable by torch.export: no branch on tensor values, tensors in and out; "
        "for a Hugging Face model try attn_implementation='eager'",
    )


def _user_frame(error: BaseException) -> str:
    """``file:line, in function`` of the innermost frame outside torch, or an empty string."""
    found = ""
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        inside = {"torch", "onnxscript", "onnx_ir", "qcompile"} & set(Path(code.co_filename).parts)
        if not inside and not code.co_filename.startswith("<"):
            found = f"{code.co_filename}:{trace.tb_lineno}, in {code.co_name}"
        trace = trace.tb_next
    return found


def _save(model: ir.Model, path: Path) -> None:
    """Write the model; weights go to ``<name>.data`` beside it when they are large."""
    import onnx_ir as ir

    for node in model.graph.all_nodes():
        for key in _LOCAL_METADATA:
            node.metadata_props.pop(key, None)
    model.graph.name = "main"
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    external = f"{path.name}.data" if size > EXTERNAL_DATA_BYTES else None
    ir.save(model, path, external_data=external)


@contextlib.contextmanager
def _eval_mode(module: torch.nn.Module) -> Iterator[None]:
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's own notices (missing torchvision, axis names that coincide) off the terminal."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _load_factory(spec: str) -> Any:
    module_name, _, attribute = spec.partition(":")
    if not module_name or not attribute:
        raise UserError(f"'{spec}' is no factory", hint="write package.module:factory")
    if "" not in sys.path:
        sys.path.insert(0, "")  # an installed command does not see the folder that the user stands in
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:
        raise UserError(
            f"cannot import '{module_name}': {type(error).__name__}: {error}",
            where=spec,
            hint="the module must be importable from the current folder or be installed",
        ) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            names = [name for name in vars(found) if not name.startswith("_")]
            raise unknown_name(f"factory in {module_name}", part, names)
        found = getattr(found, part)
    return found


def _call_factory(factory: Any, spec: str) -> Captured:
    if not callable(factory):
        hint = "write package.module:factory, a function that returns the module"
        raise UserError(f"{spec} is a {type(factory).__name__}, not a function", where=spec, hint=hint)
    try:
        result = factory()
    except Exception as error:
        what = f"{spec}() failed: {type(error).__name__}: {error}"
        raise UserError(what, where=spec, hint="call it in Python, or --debug shows the traceback") from error
    return _captured(result, spec)


def _captured(result: Any, spec: str) -> Captured:
    """Read what a factory returned; see capture_factory for the forms."""
    import torch

    if isinstance(result, torch.nn.Module):
        result = (result, getattr(result, "example_inputs", None), getattr(result, "dynamic_shapes", None))
    shape_is_right = isinstance(result, tuple) and len(result) in (2, 3)
    if not shape_is_right or not isinstance(result[0], torch.nn.Module) or result[1] is None:
        raise UserError(
            f"{spec}() returned {_describe(result)}",
            where=spec,
            hint="return (module, example_inputs[, dynamic_shapes]), or a module with an example_inputs "
            "attribute; example_inputs is a dict of tensors by argument name",
        )
    module = result[0]
    inputs = named_inputs(module, result[1])
    given = result[2] if len(result) == 3 else None
    shapes = default_dynamic_shapes(inputs) if given is None else {k: dict(v) for k, v in given.items()}
    return Captured(module, inputs, shapes)


def _describe(result: Any) -> str:
    if isinstance(result, tuple):
        return "(" + ", ".join(type(item).__name__ for item in result) + ")"
    return f"a {type(result).__name__}"
