"""The workspace: large tensors in mapped files, small ones inline, nothing left behind."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qcompile.graph.workspace import INLINE_BYTES, Workspace

LARGE = np.arange(INLINE_BYTES, dtype=np.float32).reshape(-1, 32)


def files(workspace: Workspace) -> list[Path]:
    return sorted(workspace.root.glob("*.bin"))


@pytest.mark.parametrize(
    "array",
    [
        np.float32(3.0),
        np.zeros((0, 5), np.float32),
        np.arange(INLINE_BYTES, dtype=np.uint8),
        LARGE,
        LARGE.T,
        LARGE.astype(np.float16),
        LARGE.astype(ml_dtypes.bfloat16),
        LARGE > 7,
        LARGE.astype(np.int64),
    ],
    ids=lambda a: f"{a.dtype}{list(a.shape)}",
)
def test_a_tensor_holds_its_array(tmp_path: Path, array: np.ndarray) -> None:
    with Workspace(tmp_path) as workspace:
        held = workspace.tensor(array, "name")
        assert isinstance(held, ir.ExternalTensor) == (array.nbytes > INLINE_BYTES) == bool(files(workspace))
        assert held.name == "name" and held.numpy().dtype == array.dtype
        np.testing.assert_array_equal(held.numpy(), array)


def test_equal_content_is_stored_once_and_different_types_apart(tmp_path: Path) -> None:
    with Workspace(tmp_path) as workspace:
        first, second = workspace.tensor(LARGE, "a"), workspace.tensor(LARGE.copy(), "b")
        assert first is not second and (first.name, second.name) == ("a", "b") and len(files(workspace)) == 1
        workspace.tensor(LARGE.view(np.int32), "c")
        workspace.tensor(LARGE.reshape(32, -1), "d")
        assert len(files(workspace)) == 3


def test_the_array_may_change_afterwards(tmp_path: Path) -> None:
    with Workspace(tmp_path) as workspace:
        for array in (LARGE.copy(), np.ones(4, np.float32)):
            before = array.copy()
            held = workspace.tensor(array, "w")
            array[:] = -1
            np.testing.assert_array_equal(held.numpy(), before)


def model_with(tensor: ir.TensorProtocol) -> ir.Model:
    value = ir.Value(
        name="w", const_value=tensor, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype)
    )
    node = ir.Node("", "Identity", [value], num_outputs=1)
    node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = "y", value.type, value.shape
    graph = ir.Graph([], node.outputs, nodes=[node], initializers=[value], opset_imports={"": 21}, name="g")
    return ir.Model(graph, ir_version=10)


def test_a_saved_model_is_small_and_runs_beside_its_tensors(tmp_path: Path) -> None:
    import onnxruntime

    with Workspace(tmp_path) as workspace:
        path = workspace.save(model_with(ir.tensor(LARGE)), "model")
        assert path.stat().st_size < INLINE_BYTES and len(files(workspace)) == 1
        (y,) = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {})
        np.testing.assert_array_equal(y, LARGE)
        workspace.save(model_with(ir.tensor(LARGE)), "again")
        assert len(files(workspace)) == 1


def test_a_clone_has_maps_of_its_own() -> None:
    with Workspace() as workspace:
        value = ir.Value(name="w", const_value=workspace.tensor(np.ones(INLINE_BYTES, np.float32), "w"))
        graph = ir.Graph([], [], nodes=[], initializers=[value], opset_imports={"": 21})
        model = ir.Model(graph, ir_version=10)
        clone = workspace.clone(model)
        held = clone.graph.initializers["w"].const_value
        assert isinstance(held, ir.ExternalTensor) and held is not value.const_value
        value.const_value.numpy()  # type: ignore[union-attr]
        assert held.raw is None and (held.numpy() == 1).all()


def test_packed_types_keep_their_bytes(tmp_path: Path) -> None:
    codes = (np.arange(4 * INLINE_BYTES) % 16).astype(ml_dtypes.uint4)
    with Workspace(tmp_path) as workspace:
        path = workspace.save(model_with(ir.tensor(codes, dtype=ir.DataType.UINT4)), "model")
        assert [file.stat().st_size for file in files(workspace)] == [codes.size // 2]
        loaded = onnx.numpy_helper.to_array(onnx.load(path).graph.initializer[0])
        np.testing.assert_array_equal(loaded.astype(np.int32), codes.astype(np.int32))


def test_external_data_of_the_user_is_moved_and_released(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    ir.save(model_with(ir.tensor(LARGE, name="w")), source / "m.onnx", external_data="m.data")
    model = ir.load(source / "m.onnx")
    with Workspace(tmp_path) as workspace:
        workspace.adopt(model)
        (source / "m.data").unlink()
        held = model.graph.initializers["w"].const_value
        assert isinstance(held, ir.ExternalTensor)
        np.testing.assert_array_equal(held.numpy(), LARGE)


def test_nothing_is_left_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), Workspace(tmp_path) as workspace:
        workspace.tensor(LARGE, "w")
        _ = 1 / 0
    assert not list(tmp_path.iterdir())
