"""load_onnx: what it repairs, what it keeps and what it refuses, with the words it refuses it in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from qcompile.capture.onnx_file import load_onnx
from qcompile.errors import UserError
from qcompile.graph.provenance import layer_name, original_name
from qcompile.graph.workspace import Workspace

WEIGHT = (
    np.random.default_rng(0).standard_normal((40, 32)).astype(np.float32)
)  # 5 kB: larger than what stays inline
FEEDS = {"x": np.random.default_rng(1).standard_normal((2, 3, 40)).astype(np.float32)}


@pytest.fixture
def workspace(tmp_path: Path) -> Iterator[Workspace]:
    with Workspace(tmp_path) as held:
        yield held


def proto(nodes: list[onnx.NodeProto], opset: int = 17, **weights: np.ndarray) -> onnx.ModelProto:
    """x float [batch, 3, 40] -> y, with WEIGHT as w."""
    graph = helper.make_graph(
        nodes,
        "main",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, 40])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in ({"w": WEIGHT} | weights).items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def linear(**weights: np.ndarray) -> onnx.ModelProto:
    return proto([helper.make_node("MatMul", ["x", "w"], ["y"], "fc")], 17, **weights)


def saved(model: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def external(folder: Path, location: str = "w.bin", **fields: str) -> Path:
    """linear() with its weight in a file of ``folder`` and the given external-data fields."""
    model = linear()
    tensor = model.graph.initializer[0]
    (folder / "w.bin").write_bytes(WEIGHT.tobytes())
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in ({"location": location} | fields).items():
        tensor.external_data.add(key=key, value=value)
    return saved(model, folder)


def run(path: Path) -> np.ndarray:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, FEEDS)[0])


def assert_same_function(path: Path, model: ir.Model, workspace: Workspace) -> None:
    expected = run(path)
    np.testing.assert_allclose(run(workspace.save(model, "loaded")), expected, rtol=1e-5, atol=1e-6)


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


# --------------------------------------------------------------------------- what it keeps and repairs


def test_weights_are_mapped_from_the_workspace(workspace: Workspace, tmp_path: Path) -> None:
    path = external(tmp_path)
    model = load_onnx(path, workspace)
    held = model.graph.initializers["w"].const_value
    assert isinstance(held, ir.ExternalTensor) and Path(held.base_dir) == workspace.root
    assert (model.opset_imports[""], model.ir_version) == (21, 10)
    assert_same_function(path, model, workspace)


def test_the_interface_keeps_names_types_and_axes(workspace: Workspace, tmp_path: Path) -> None:
    model = load_onnx(saved(linear(), tmp_path), workspace)
    (taken,), (given_back,) = model.graph.inputs, model.graph.outputs
    assert (taken.name, str(taken.shape), taken.dtype) == ("x", "[batch,3,40]", ir.DataType.FLOAT)
    assert given_back.name == "y"


def test_axes_that_inference_knows_better_stay_as_the_caller_named_them(
    workspace: Workspace, tmp_path: Path
) -> None:
    model = linear()
    declared = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "rows", "columns"])
    model.graph.output[0].CopyFrom(declared)
    loaded = load_onnx(saved(model, tmp_path), workspace)
    assert str(loaded.graph.outputs[0].shape) == "[batch,rows,columns]"


def test_old_spellings_become_one(workspace: Workspace, tmp_path: Path) -> None:
    """Weights listed as inputs, unsorted and nameless nodes, Constant nodes, Identity and Dropout."""
    two = helper.make_node("Constant", [], ["two"], value=numpy_helper.from_array(np.array(2, np.float32)))
    train = helper.make_node("Constant", [], ["train"], value=numpy_helper.from_array(np.array(False)))
    model = proto(
        [
            helper.make_node("Mul", ["h", "two"], ["y"]),
            helper.make_node("Dropout", ["i", "", "train"], ["h", "dropped"]),
            helper.make_node("Identity", ["m"], ["i"]),
            helper.make_node("MatMul", ["x", "w"], ["m"]),
            two,
            train,
        ],
    )
    model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [40, 32]))
    broken, mended = saved(model, tmp_path), linear()
    del mended.graph.node[:]
    mended.graph.node.extend([two, helper.make_node("MatMul", ["x", "w"], ["m"]), model.graph.node[0]])
    mended.graph.node[-1].input[0] = "m"
    loaded = load_onnx(broken, workspace)
    assert operators(loaded) == ["MatMul", "Mul"]
    assert [value.name for value in loaded.graph.inputs] == ["x"]
    assert all(node.name for node in loaded.graph)
    assert_same_function(saved(mended, tmp_path), loaded, workspace)


def test_training_dropout_goes(workspace: Workspace, tmp_path: Path) -> None:
    model = proto(
        [
            helper.make_node("MatMul", ["x", "w"], ["m"]),
            helper.make_node("Dropout", ["m", "ratio", "train"], ["y"]),
        ],
        ratio=np.array(0.5, np.float32),
        train=np.array(True),
    )
    loaded = load_onnx(saved(model, tmp_path), workspace)
    assert "Dropout" not in operators(loaded)
    assert_same_function(saved(linear(), tmp_path), loaded, workspace)


def test_shape_arithmetic_is_folded_and_weights_are_not(workspace: Workspace, tmp_path: Path) -> None:
    model = proto(
        [
            helper.make_node("Add", ["three", "three"], ["six"]),
            helper.make_node("Sub", ["six", "seven"], ["minus_one"]),
            helper.make_node("Reshape", ["x", "minus_one"], ["flat"]),
            helper.make_node("Reshape", ["flat", "back"], ["again"]),
            helper.make_node("Transpose", ["small"], ["turned"], perm=[1, 0]),
            helper.make_node("MatMul", ["again", "turned"], ["y"]),
        ],
        three=np.array([3]),
        seven=np.array([7]),
        back=np.array([-1, 3, 40]),
        small=WEIGHT[:, :4].T.copy(),
    )
    path = saved(model, tmp_path)
    loaded = load_onnx(path, workspace)
    assert operators(loaded).count("Add") + operators(loaded).count("Sub") == 0
    assert "Transpose" in operators(loaded)
    assert_same_function(path, loaded, workspace)


@pytest.mark.parametrize("stale", [False, True])
def test_heads_and_halves_of_older_exports_are_numbers(stale: bool, workspace: Workspace, tmp_path: Path) -> None:
    """x.view(*x.shape[:-1], -1, 8)[..., : 8 // 2]; ``stale``: shapes in the file that say nothing, or what is wrong."""
    text = """<ir_version: 8, opset_import: ["": 17]> main (float[batch, seq, 40] x) => (float[b, s, h, 4] y)
        <int64[1] three, float[unk__1, unk__2, unk__3, unk__4] h> {
        s = Shape(x) n = Gather(s, zero) l = Gather(s, one) n1 = Unsqueeze(n, first) l1 = Unsqueeze(l, first)
        t = Concat <axis = 0> (n1, l1, minus, eight) h = Reshape(x, t)
        hs = Shape(h) w = Gather(hs, three) half = Div(w, two) end = Unsqueeze(half, first)
        y = Slice(h, first, end, last)
    }"""
    model = onnx.parser.parse_model(text)
    if not stale:
        del model.graph.value_info[:]
    numbers = {"zero": 0, "one": 1, "two": 2, "three": 3, "first": [0], "last": [3], "minus": [-1], "eight": [8]}
    model.graph.initializer.extend(numpy_helper.from_array(np.array(n), name) for name, n in numbers.items())
    loaded = load_onnx(saved(model, tmp_path), workspace)
    heads, half = (next(n for n in loaded.graph if n.op_type == kind) for kind in ("Reshape", "Slice"))
    assert str(heads.outputs[0].shape) == "[batch,seq,5,8]"
    assert half.inputs[2].const_value.numpy() == [4]  # type: ignore[union-attr]


def test_heads_that_are_joined_are_as_wide_as_the_matrix_behind_them(workspace: Workspace, tmp_path: Path) -> None:
    """x.transpose(1, 2).reshape(batch, tokens, -1) @ w; nothing but w (12, 5) says how many channels there are."""
    text = """<ir_version: 8, opset_import: ["": 17]> main (float[b, h, s, d] x) => (float[b, s, 5] y) {
        t = Transpose <perm = [0, 2, 1, 3]> (x) r = Reshape(t, target) y = MatMul(r, w)
    }"""
    model = onnx.parser.parse_model(text)
    constants = {"target": np.array([0, 0, -1]), "w": np.ones((12, 5), np.float32)}
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in constants.items())
    loaded = load_onnx(saved(model, tmp_path), workspace)
    joined = next(node for node in loaded.graph if node.op_type == "Reshape")
    assert str(joined.outputs[0].shape) == "[b,s,12]"


def test_an_axis_with_a_name_names_what_meets_it(workspace: Workspace, tmp_path: Path) -> None:
    """x + cut, cut as long as nobody knows; heads joined by a Reshape that says only the sizes of that sum."""
    text = """<ir_version: 8, opset_import: ["": 17]>
    main (float[batch, 3, tokens, 4] x, float[1, 1, n, 4] c, int64[1] end) => (float[b, s, 5] y) {
        cut = Slice(c, zero, end, two) sum = Add(x, cut)
        s = Shape(sum) b = Gather(s, zero) t = Gather(s, two) target = Concat <axis = 0> (b, minus, t, four)
        same = Reshape(sum, target) turned = Transpose <perm = [0, 2, 1, 3]> (same)
        rows = Concat <axis = 0> (b, t, minus) joined = Reshape(turned, rows) y = MatMul(joined, w)
    }"""
    model = onnx.parser.parse_model(text)
    numbers = {"zero": [0], "two": [2], "four": [4], "minus": [-1]}
    model.graph.initializer.extend(numpy_helper.from_array(np.array(n), name) for name, n in numbers.items())
    model.graph.initializer.append(numpy_helper.from_array(np.ones((12, 5), np.float32), "w"))
    loaded = load_onnx(saved(model, tmp_path), workspace)
    shapes = [str(node.outputs[0].shape) for node in loaded.graph if node.op_type in ("Add", "Reshape")]
    assert shapes == ["[batch,3,tokens,4]", "[batch,3,tokens,4]", "[batch,tokens,12]"]


def test_functions_are_inlined(workspace: Workspace, tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["": 18, "local": 1]>
    main (float[batch, 3, 40] x) => (float[batch, 3, 40] y) { y = local.twice(x) }
    <domain: "local", opset_import: ["": 18]> twice (a) => (b) { b = Add(a, a) }"""
    path = saved(onnx.parser.parse_model(text), tmp_path)
    loaded = load_onnx(path, workspace)
    assert operators(loaded) == ["Add"] and not loaded.functions
    assert_same_function(path, loaded, workspace)


AXES = {
    "ReduceMean": lambda: helper.make_node("ReduceMean", ["x"], ["y"], axes=[1, -1], keepdims=0),
    "ReduceMax": lambda: helper.make_node("ReduceMax", ["x"], ["y"], axes=[-1]),
    "ReduceL2": lambda: helper.make_node("ReduceL2", ["x"], ["y"]),
    "ReduceSum": lambda: helper.make_node("ReduceSum", ["x", "last"], ["y"], keepdims=0),
    "Softmax": lambda: helper.make_node("Softmax", ["x"], ["y"], axis=1),
    "Pad": lambda: helper.make_node("Pad", ["x", "pads"], ["y"]),
    "Split": lambda: helper.make_node("Split", ["x"], ["y", "rest"], axis=-1),
}


@pytest.mark.parametrize("opset", [13, 15, 17])
@pytest.mark.parametrize("name", AXES)
def test_old_opsets_are_lifted(name: str, opset: int, workspace: Workspace, tmp_path: Path) -> None:
    constants = {"last": np.array([-1]), "pads": np.array([0, 0, 1, 0, 0, 1])}
    path = saved(proto([AXES[name]()], opset, **constants), tmp_path)
    loaded = load_onnx(path, workspace)
    assert loaded.opset_imports[""] == 21
    assert_same_function(path, loaded, workspace)


def test_a_newer_opset_is_kept(workspace: Workspace, tmp_path: Path) -> None:
    model = proto([helper.make_node("Swish", ["x"], ["y"])], opset=24)
    loaded = load_onnx(saved(model, tmp_path), workspace)
    assert (loaded.opset_imports[""], loaded.ir_version) == (24, 12)


def test_names_survive_conversion_and_saving(workspace: Workspace, tmp_path: Path) -> None:
    node = helper.make_node("MatMul", ["x", "w"], ["y"], "/model/layers.3/mlp/up_proj/MatMul")
    loaded = load_onnx(saved(proto([node], 14), tmp_path), workspace)
    again = ir.load(workspace.save(loaded, "named"))
    assert layer_name(again.graph[0]) == "model.layers.3.mlp.up_proj"
    assert original_name(again.graph[0]) == "/model/layers.3/mlp/up_proj/MatMul"


# --------------------------------------------------------------------------- what it refuses


def refusal(path: Path, workspace: Workspace) -> str:
    with pytest.raises(UserError) as caught:
        load_onnx(path, workspace)
    return str(caught.value)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"location": "../w.bin"}, "the external data of tensor 'w' is outside the model's folder"),
        ({"location": "/etc/passwd"}, "outside the model's folder\n  where: /etc/passwd"),
        ({"location": "sub/../../w.bin"}, "outside the model's folder"),
        ({"location": "gone.bin"}, "the external data of tensor 'w' is missing"),
        ({"location": "link.bin"}, "is a link out of the model's folder"),
        ({"location": "hard.bin"}, "has several hard links"),
        (
            {"length": "12"},
            "tensor 'w' (FLOAT [40, 32]) needs 5120 bytes, but its external data has length 12",
        ),
        ({"offset": "4096"}, "needs bytes 4096 to 9216 of a file with 5120 bytes"),
        ({"offset": "-8"}, "the external data of tensor 'w' has offset '-8'"),
    ],
)
def test_unsafe_external_data(
    fields: dict[str, str], words: str, workspace: Workspace, tmp_path: Path
) -> None:
    (tmp_path / "outside.bin").write_bytes(WEIGHT.tobytes())
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "link.bin").symlink_to(tmp_path / "outside.bin")
    (folder / "hard.bin").hardlink_to(tmp_path / "outside.bin")
    assert words in refusal(external(folder, **fields), workspace)


def test_a_link_inside_the_folder_is_fine(workspace: Workspace, tmp_path: Path) -> None:
    path = external(tmp_path, location="link.bin")
    (tmp_path / "link.bin").symlink_to("w.bin")
    assert load_onnx(path, workspace).graph.initializers["w"].const_value is not None


def test_absurd_sizes_are_refused_before_allocation(workspace: Workspace, tmp_path: Path) -> None:
    path = external(tmp_path)
    model = onnx.load(path, load_external_data=False)
    model.graph.initializer[0].dims[:] = [2**40, 2**40]
    assert "bytes" in refusal(saved(model, tmp_path), workspace)
    inline = linear()
    inline.graph.initializer[0].dims[:] = [2**40]
    assert "but the file holds 5120" in refusal(saved(inline, tmp_path), workspace)
    inline.graph.initializer[0].dims[:] = [-1, 32]
    assert "negative size" in refusal(saved(inline, tmp_path), workspace)


BROKEN: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda data: b"", "the file is empty"),
    "cut": (lambda data: data[: len(data) // 2], "not an ONNX model, or it is truncated"),
    "text": (lambda data: b"hello, world\n" * 9, "not an ONNX model, or it is truncated"),
    "zip": (lambda data: b"PK\x03\x04" + bytes(64), "not an ONNX model, or it is truncated"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_files_that_are_no_model(kind: str, workspace: Workspace, tmp_path: Path) -> None:
    damage, words = BROKEN[kind]
    path = tmp_path / "model.onnx"
    path.write_bytes(damage(linear().SerializeToString()))
    assert words in refusal(path, workspace)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 400), flip=st.integers(0, 400), bit=st.integers(0, 7))
def test_damage_never_ends_in_a_traceback(
    cut: int, flip: int, bit: int, workspace: Workspace, tmp_path: Path
) -> None:
    """Any cut or flipped bit in the graph's part of the file either loads or is refused in words."""
    model = linear()
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(WEIGHT[:, :1], "w"))
    data = bytearray(model.SerializeToString())
    data[flip % len(data)] ^= 1 << bit
    path = tmp_path / "damaged.onnx"
    path.write_bytes(data[: len(data) - cut % len(data)])
    try:
        load_onnx(path, workspace)
    except UserError as error:
        assert str(error)


def test_names_that_are_no_text(workspace: Workspace, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(linear().SerializeToString().replace(b"fc", b"\xff\xfe"))
    assert "where: " + str(path) in refusal(path, workspace)


def test_missing_file_and_folder(workspace: Workspace, tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "no.onnx", workspace)
    assert "is a folder" in refusal(tmp_path, workspace)


@pytest.mark.parametrize("opset", [12, 27])
def test_opsets_outside_the_range(opset: int, workspace: Workspace, tmp_path: Path) -> None:
    path = saved(proto([helper.make_node("MatMul", ["x", "w"], ["y"])], opset), tmp_path)
    text = refusal(path, workspace)
    assert f"opset {opset}" in text and "26" in text and "hint: export it again with opset 21" in text


def test_broken_wiring(workspace: Workspace, tmp_path: Path) -> None:
    lost = proto([helper.make_node("MatMul", ["x", "lost"], ["y"], "fc")])
    assert "node 'fc' (MatMul) reads 'lost', which nothing makes" in refusal(saved(lost, tmp_path), workspace)
    no_output = proto([helper.make_node("MatMul", ["x", "w"], ["z"], "fc")])
    assert "output 'y' is made by no node" in refusal(saved(no_output, tmp_path), workspace)
    twice = proto([helper.make_node("Neg", ["x"], ["y"]), helper.make_node("Abs", ["x"], ["y"])])
    assert "Output 'y' is redeclared" in refusal(saved(twice, tmp_path), workspace)
    double = linear()
    double.graph.initializer.append(numpy_helper.from_array(WEIGHT, "w"))
    assert "two initializers have the name 'w'" in refusal(saved(double, tmp_path), workspace)


def test_a_negative_size_is_one_that_is_not_known(workspace: Workspace, tmp_path: Path) -> None:
    """Older exporters write -1 for a free axis."""
    model = linear()
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = -1
    loaded = load_onnx(saved(model, tmp_path), workspace)
    assert str(loaded.graph.inputs[0].shape) == "[None,3,40]"


def test_an_output_that_is_no_tensor_is_refused(workspace: Workspace, tmp_path: Path) -> None:
    model = proto([helper.make_node("SequenceConstruct", ["x", "x"], ["y"])])
    kind = helper.make_sequence_type_proto(helper.make_tensor_type_proto(TensorProto.FLOAT, None))
    model.graph.output[0].CopyFrom(helper.make_value_info("y", kind))
    with pytest.raises(UserError, match="'y' is no tensor but a SequenceType"):
        load_onnx(saved(model, tmp_path), workspace)


def test_weights_that_are_not_finite(workspace: Workspace, tmp_path: Path) -> None:
    for bad, words in ((np.nan, "weight 'w' holds 2 NaN"), (np.inf, "weight 'w' holds 2 infinite values")):
        weight = WEIGHT.copy()
        weight[3, :2] = bad
        assert words in refusal(saved(linear(w=weight), tmp_path), workspace)


def test_a_mask_of_minus_infinity_is_fine(workspace: Workspace, tmp_path: Path) -> None:
    mask = np.triu(np.full((3, 3), -np.inf, np.float32), 1)[None]
    model = proto(
        [
            helper.make_node("MatMul", ["x", "w"], ["q"]),
            helper.make_node("Transpose", ["q"], ["k"], perm=[0, 2, 1]),
            helper.make_node("MatMul", ["q", "k"], ["scores"]),
            helper.make_node("Add", ["scores", "mask"], ["masked"]),
            helper.make_node("Softmax", ["masked"], ["y"]),
        ],
        mask=mask,
    )
    path = saved(model, tmp_path)
    assert_same_function(path, load_onnx(path, workspace), workspace)


@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.BFLOAT16])
def test_half_precision_becomes_float32_inside_only(kind: int, workspace: Workspace, tmp_path: Path) -> None:
    name = TensorProto.DataType.Name(kind)
    text = f"""<ir_version: 8, opset_import: ["": 18]>
    main ({name.lower()}[batch, 3, 40] x) => ({name.lower()}[batch, 3, 32] y) {{
        h = MatMul(x, w)
        f = Cast <to = 1> (h)
        g = Add(f, f)
        y = Cast <to = {kind}> (g)
    }}"""
    model = onnx.parser.parse_model(text)
    half = ir.tensor(WEIGHT).numpy().astype(ir.DataType(kind).numpy())
    model.graph.initializer.append(ir.to_proto(ir.tensor(half, dtype=ir.DataType(kind), name="w")))
    loaded = load_onnx(saved(model, tmp_path), workspace)
    assert loaded.graph.initializers["w"].dtype == ir.DataType.FLOAT
    assert {v.dtype.name for v in (*loaded.graph.inputs, *loaded.graph.outputs) if v.dtype} == {name}
    assert operators(loaded) == ["Cast", "MatMul", "Add", "Cast"]
    if kind == TensorProto.FLOAT16:
        assert_runs_in_half(workspace.save(loaded, "loaded"), half)


def test_a_factor_of_a_gelu_that_was_rounded_with_the_weights_is_itself_again(
    workspace: Workspace, tmp_path: Path
) -> None:
    text = """<ir_version: 8, opset_import: ["": 18]>
    main (bfloat16[batch] x) => (bfloat16[batch] y, bfloat16[batch] z) { y = Div(x, root) z = Div(x, other) }"""
    model = onnx.parser.parse_model(text)
    for name, number in (("root", 2**0.5), ("other", 1.5)):
        held = ir.tensor(np.array(number).astype(ir.DataType.BFLOAT16.numpy()), dtype=ir.DataType.BFLOAT16, name=name)
        model.graph.initializer.append(ir.to_proto(held))
    loaded = load_onnx(saved(model, tmp_path), workspace).graph.initializers
    assert loaded["root"].const_value.numpy() == np.float32(2**0.5)  # type: ignore[union-attr]
    assert loaded["other"].const_value.numpy() == 1.5  # type: ignore[union-attr]


def assert_runs_in_half(path: Path, weight: np.ndarray) -> None:
    import onnxruntime

    x = FEEDS["x"].astype(np.float16)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {"x": x})
    assert result.dtype == np.float16
    np.testing.assert_allclose(
        result, 2 * (x.astype(np.float32) @ weight.astype(np.float32)), rtol=2e-3, atol=2e-2
    )
