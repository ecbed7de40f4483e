"""The folder where a compilation keeps its tensors, so that memory stays flat.

Every large initializer lives in one file of the workspace and is memory-mapped; a snapshot of the
model is a small ``.onnx`` beside those files, which ONNX Runtime maps as well.
"""

from __future__ import annotations

import hashlib
import mmap
import shutil
import tempfile
from pathlib import Path
from types import TracebackType

import numpy as np
import onnx_ir as ir

INLINE_BYTES = 4096  # smaller tensors stay in the model's protobuf


class Workspace:
    """Owns the tensor files of one compilation; a context manager that removes them at the end."""

    def __init__(self, parent: Path | None = None) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="qcompile-", dir=parent)).resolve()
        self._written: dict[str, ir.ExternalTensor] = {}

    def __enter__(self) -> Workspace:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove the folder with everything in it."""
        shutil.rmtree(self.root, ignore_errors=True)

    def tensor(self, array: np.ndarray, name: str) -> ir.TensorProtocol:
        """A tensor of the IR with the content of ``array``; large ones go to a file and are mapped."""
        array = np.ascontiguousarray(array)
        if array.nbytes <= INLINE_BYTES:
            return ir.tensor(array.copy(), name=name)
        digest = hashlib.blake2b(array.view(np.uint8).reshape(-1).data, digest_size=16)
        digest.update(f"{array.dtype}{array.shape}".encode())
        key = digest.hexdigest()
        if key not in self._written:
            array.tofile(self.root / f"{key}.bin")
            self._written[key] = self._mapped(array, key)
        return self._mapped(array, key, name)

    def _mapped(self, array: np.ndarray, key: str, name: str = "") -> ir.ExternalTensor:
        return ir.ExternalTensor(
            f"{key}.bin",
            0,
            array.nbytes,
            ir.DataType.from_numpy(array.dtype),
            shape=ir.Shape(array.shape),
            name=name,
            base_dir=self.root,
        )

    def adopt(self, model: ir.Model) -> None:
        """Move every large initializer of ``model`` into the workspace, one at a time."""
        for name, value in model.graph.initializers.items():
            held = value.const_value
            if held is None or held.dtype == ir.DataType.STRING or self._owns(held):
                continue
            value.const_value = self._adopted(held, name)

    def clone(self, model: ir.Model) -> ir.Model:
        """A copy of ``model`` with maps of its own: what is read of the one stays out of memory for the other."""
        clone = model.clone()
        for name, value in clone.graph.initializers.items():
            held = value.const_value
            if isinstance(held, ir.ExternalTensor):
                value.const_value = ir.ExternalTensor(
                    held.location, held.offset, held.length, held.dtype,
                    shape=ir.Shape(held.shape.numpy()), name=name, base_dir=held.base_dir,
                )  # fmt: skip
        return clone

    def let_go(self, model: ir.Model) -> None:
        """Take the mapped tensors of ``model`` out of memory; what is read again comes back from their files."""
        for value in model.graph.initializers.values():
            held = value.const_value
            if isinstance(held, ir.ExternalTensor) and held.raw is not None and hasattr(mmap, "MADV_DONTNEED"):
                held.raw.madvise(mmap.MADV_DONTNEED)

    def _owns(self, held: ir.TensorProtocol) -> bool:
        if isinstance(held, ir.ExternalTensor):
            return Path(held.base_dir) == self.root
        return held.nbytes <= INLINE_BYTES

    def _adopted(self, held: ir.TensorProtocol, name: str) -> ir.TensorProtocol:
        if held.dtype.bitwidth < 8:  # packed types: keep the packed bytes
            packed = np.frombuffer(held.tobytes(), dtype=np.uint8)
            file = f"packed-{hashlib.blake2b(packed.data, digest_size=16).hexdigest()}.bin"
            packed.tofile(self.root / file)
            return ir.ExternalTensor(
                file, 0, packed.nbytes, held.dtype,
                shape=ir.Shape(held.shape.numpy()), name=name, base_dir=self.root,
            )  # fmt: skip
        moved = self.tensor(held.numpy(), name)
        if isinstance(held, ir.ExternalTensor):
            held.release()
        return moved

    def save(self, model: ir.Model, stem: str) -> Path:
        """Write ``model`` as ``<stem>.onnx`` beside the tensor files; cheap, since tensors are references."""
        self.adopt(model)
        path = self.root / f"{stem}.onnx"
        ir.save(model, path)
        return path
