"""Checks of a model's tensors before anything is mapped or allocated, and of the weights' values."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import onnx
import onnx_ir as ir

from qcompile.errors import UserError
from qcompile.graph.provenance import original_name
from qcompile.graph.workspace import INLINE_BYTES

DAMAGED = "the file is damaged: download or export it again"
_CHUNK = 1 << 20  # elements looked at in one go
_WEIGHT_USERS = ("MatMul", "Gemm", "Conv", "LayerNormalization", "RMSNormalization", "Transpose")
_FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def check_tensors(model: ir.Model) -> None:
    """Every tensor's bytes must be there, inside the model's folder, and fit its type and shape.

    Only sizes are looked at: nothing is read, mapped or allocated. Raises UserError naming tensor and file.
    """
    for name, tensor in _tensors(model):
        _check_shape(name, tensor)
        if isinstance(tensor, ir.ExternalTensor):
            _check_external(name, tensor)
        elif isinstance(tensor, ir.serde.TensorProtoTensor):
            _check_inline(name, tensor)


def inline_small(model: ir.Model) -> None:
    """Copy the external tensors that the workspace leaves where they are: small ones, and in attributes."""
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor) and value.const_value.nbytes <= INLINE_BYTES:
            value.const_value = _in_memory(value.const_value)
    for node in model.graph.all_nodes():
        for name, attribute in list(node.attributes.items()):
            if attribute.type == ir.AttributeType.TENSOR and isinstance(attribute.value, ir.ExternalTensor):
                node.attributes[name] = ir.AttrTensor(name, _in_memory(attribute.value))


def check_weights(model: ir.Model) -> None:
    """Refuse NaN in any float initializer, and infinities in a weight; -inf in a mask is fine.

    One tensor is mapped at a time, and read in pieces of a million elements.
    """
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is None or tensor.dtype not in _FLOATS or tensor.size < 2:
            continue
        bad = _non_finite(tensor, count_infinite=_is_weight(value))
        if isinstance(tensor, ir.ExternalTensor):
            tensor.release()
        if bad is not None:
            raise UserError(
                f"weight '{original_name(value)}' holds {bad}",
                where=f"shape {list(tensor.shape.numpy())}",
                hint="the checkpoint is damaged, or it overflowed when it was converted to a narrower type",
            )


def _tensors(model: ir.Model) -> Iterator[tuple[str, ir.TensorProtocol]]:
    for graph in (*model.graphs(), *model.functions.values()):
        if isinstance(graph, ir.Graph):
            for value in graph.initializers.values():
                if value.const_value is not None:
                    yield value.name or "", value.const_value
        for node in graph:
            for attribute in node.attributes.values():
                if attribute.type == ir.AttributeType.TENSOR and not attribute.is_ref():
                    yield attribute.as_tensor().name or original_name(node), attribute.as_tensor()


def _in_memory(tensor: ir.ExternalTensor) -> ir.TensorProtocol:
    return ir.Tensor(
        tensor.numpy().copy(), dtype=tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=tensor.name
    )


def _check_shape(name: str, tensor: ir.TensorProtocol) -> None:
    if any(size < 0 for size in tensor.shape.numpy()):
        raise UserError(f"tensor '{name}' has a negative size: {list(tensor.shape.numpy())}", hint=DAMAGED)
    if tensor.dtype == ir.DataType.UNDEFINED:
        raise UserError(f"tensor '{name}' has no type", hint=DAMAGED)


def _bytes(tensor: ir.TensorProtocol) -> int:
    """Size by type and shape in Python integers, which do not overflow as numpy's would."""
    return math.ceil(math.prod(tensor.shape.numpy()) * tensor.dtype.bitwidth / 8)


def _check_external(name: str, tensor: ir.ExternalTensor) -> None:
    path = _contained(name, tensor)
    needed = _bytes(tensor)
    offset = tensor.offset or 0
    length = needed if tensor.length is None else tensor.length
    what = f"tensor '{name}' ({tensor.dtype.name} {list(tensor.shape.numpy())})"
    if length != needed:
        message = f"{what} needs {needed} bytes, but its external data has length {length}"
        raise UserError(message, where=str(path), hint=DAMAGED)
    size = path.stat().st_size
    if offset < 0 or offset + length > size:
        raise UserError(
            f"{what} needs bytes {offset} to {offset + length} of a file with {size} bytes",
            where=str(path),
            hint="the data file is truncated or belongs to another model",
        )


def _contained(name: str, tensor: ir.ExternalTensor) -> Path:
    """The data file, which must be a plain file inside the model's folder, links resolved."""
    location = os.fspath(tensor.location)
    folder = Path(tensor.base_dir)
    what = f"the external data of tensor '{name}'"
    is_absolute = PurePosixPath(location).is_absolute() or PureWindowsPath(location).is_absolute()
    if is_absolute or ".." in PurePosixPath(location.replace("\\", "/")).parts:
        hint = "for safety it must lie beside the .onnx file: onnx.load, then onnx.save with save_as_external_data=True"
        raise UserError(f"{what} is outside the model's folder", where=location, hint=hint)
    path = folder / location
    resolved = path.resolve()
    if not resolved.is_relative_to(folder.resolve()):
        raise UserError(
            f"{what} is a link out of the model's folder",
            where=f"{path} -> {resolved}",
            hint="copy the model and its data into one folder (cp -rL)",
        )
    if not resolved.is_file():
        raise UserError(
            f"{what} is missing", where=str(path), hint="keep the .onnx file beside its data file"
        )
    if resolved.stat().st_nlink > 1:
        raise UserError(
            f"{what} has several hard links, and ONNX tools refuse such files",
            where=str(path),
            hint="copy the file, so that it is the folder's own",
        )
    return resolved


def _check_inline(name: str, tensor: ir.serde.TensorProtoTensor) -> None:
    if tensor.dtype == ir.DataType.STRING:
        return
    proto: onnx.TensorProto = tensor.raw
    if not proto.HasField("raw_data"):
        if math.prod(proto.dims) > 2**31:
            message = f"tensor '{name}' declares {list(proto.dims)} elements, more than a file can hold"
            raise UserError(message, hint=DAMAGED)
        return
    needed = _bytes(tensor)
    if len(proto.raw_data) != needed:
        what = f"tensor '{name}' ({tensor.dtype.name} {list(proto.dims)})"
        message = f"{what} needs {needed} bytes, but the file holds {len(proto.raw_data)}"
        raise UserError(message, hint=DAMAGED)


def _is_weight(value: ir.Value) -> bool:
    return any(node.op_type in _WEIGHT_USERS for node, _ in value.uses())


def _non_finite(tensor: ir.TensorProtocol, count_infinite: bool) -> str | None:
    """``12 NaN`` or ``3 infinite values``, or None."""
    flat = tensor.numpy().reshape(-1)
    nans = infinite = 0
    for start in range(0, flat.size, _CHUNK):
        piece = np.asarray(flat[start : start + _CHUNK], dtype=np.float32 if flat.itemsize < 4 else None)
        if not np.isfinite(piece).all():
            nans += int(np.isnan(piece).sum())
            infinite += int(np.isinf(piece).sum())
    if nans:
        return f"{nans} NaN"
    return f"{infinite} infinite values" if infinite and count_infinite else None
