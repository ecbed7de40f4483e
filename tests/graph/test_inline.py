"""Our inliner writes out what onnx_ir's does, with each constant once."""

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from qcompile.calibration.runner import open_session
from qcompile.graph.functions import DOMAIN, use
from qcompile.graph.inline import inline
from qcompile.graph.workspace import Workspace

TEXT = f"""<ir_version: 10, opset_import: ["" : 21, "{DOMAIN}" : 1]>
calls (int32[N, C] a, int32[N, C] b) => (int32[N, C] y) {{
    s = {DOMAIN}.IntegerSilu <unit = 65536> (a)
    t = {DOMAIN}.IntegerSilu <unit = 65536> (b)
    p = {DOMAIN}.MultiplyWide <narrow = 16, divisor = 8, low = -1000, high = 1000> (s, t)
    q = {DOMAIN}.MultiplyWide <narrow = 16, divisor = 8, low = -7, high = 7> (s, t)
    y = Add (p, q)
}}"""


@pytest.fixture
def model() -> ir.Model:
    found = ir.from_proto(onnx.parser.parse_model(TEXT))
    for name in ("IntegerSilu", "MultiplyWide"):
        use(found, name)
    return found


def test_outputs_are_those_of_the_calls_and_constants_stand_once(model: ir.Model, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    feeds = {name: generator.integers(-(2**22), 2**22, (5, 7), np.int32) for name in "ab"}
    before = open_session(ir.to_proto(model).SerializeToString(), threads=1).run(None, feeds)[0]
    with Workspace(tmp_path) as workspace:
        assert inline(model, workspace) == 4
        assert not [node for node in model.graph if node.domain == DOMAIN or node.op_type == "Constant"]
        held = [value.const_value.numpy() for value in model.graph.initializers.values()]  # type: ignore[union-attr]
        keys = [(a.dtype, a.shape, a.tobytes()) for a in held]
        assert len(keys) == len(set(keys))
        names = [value.name for node in model.graph for value in node.outputs]
        assert len(names) == len(set(names))
        path = workspace.save(model, "inlined")
        after = open_session(path, threads=1).run(None, feeds)[0]
    np.testing.assert_array_equal(after, before)
    assert np.abs(after).max() > 7  # the attributes of each call are its own


def test_functions_to_keep_are_kept(model: ir.Model, tmp_path: Path) -> None:
    with Workspace(tmp_path) as workspace:
        assert inline(model, workspace, keep=["IntegerSilu", "RequantizeSigned"]) == 2
    kept = [node.op_type for node in model.graph if node.domain == DOMAIN]
    assert kept.count("IntegerSilu") == 2
    assert set(kept) == {"IntegerSilu", "RequantizeSigned"}  # one that a body calls stays a call
