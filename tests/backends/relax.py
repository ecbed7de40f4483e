"""Small models through TVM, in memory: what ONNX Runtime and TVM make of the same graph."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import tvm
from tvm import relax

from qcompile.backends.tvm.pipeline import build
from qcompile.backends.tvm.translate import translated
from qcompile.calibration.runner import open_session
from qcompile.graph.functions import DOMAIN, use

Array = np.ndarray


class Both:
    """``model`` in ONNX Runtime, literally, and compiled by TVM."""

    def __init__(self, model: ir.Model, tiles: bool = True, target: Any = None, accuracy_level: int = 1) -> None:
        self.session = open_session(ir.to_proto(model).SerializeToString(), threads=1, literal_qdq=True)
        self.names = [port.name for port in self.session.get_outputs()]
        self.found = translated(model, tiles=tiles, target=target, accuracy_level=accuracy_level)
        executable = build(self.found.module, target or tvm.target.Target("llvm"))
        self._machine = relax.VirtualMachine(executable, tvm.cpu())
        self._held = [tvm.runtime.tensor(np.asarray(a, order="C")) for a in self.found.parameters.values()]
        self._inputs = [str(value.name) for value in model.graph.inputs]

    def run(self, **feeds: Array) -> tuple[dict[str, Array], dict[str, Array]]:
        """The outputs of ONNX Runtime and of TVM."""
        expected = dict(zip(self.names, self.session.run(None, feeds), strict=True))
        given = [tvm.runtime.tensor(np.asarray(feeds[name], order="C")) for name in self._inputs]
        made: Any = self._machine["main"](*given, *self._held)
        results = [made] if len(self.names) == 1 else list(made)
        return expected, {name: r.numpy() for name, r in zip(self.names, results, strict=True)}

    def same(self, **feeds: Array) -> None:
        """Types, shapes and bits of every output."""
        expected, found = self.run(**feeds)
        for name, array in expected.items():
            assert found[name].dtype == array.dtype, name
            np.testing.assert_array_equal(found[name], array, err_msg=name)

    def close(self, tolerance: float, **feeds: Array) -> None:
        """Every output up to ``tolerance`` of the largest value."""
        expected, found = self.run(**feeds)
        for name, array in expected.items():
            assert found[name].shape == array.shape
            assert np.abs(found[name] - array).max() <= tolerance * np.abs(array).max(), name


def both(text: str, weights: dict[str, Array] | None = None, **options: Any) -> Both:
    """From the text of a graph, its constants in ``weights``; ``options`` of ``Both``."""
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21, "{DOMAIN}" : 1]>\n{text}')
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(a, n) for n, a in (weights or {}).items())
    model = ir.from_proto(proto)
    for name in {node.op_type for node in model.graph if node.domain == DOMAIN}:
        use(model, name)
    return Both(model, **options)
