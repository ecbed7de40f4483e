"""Samples that the caller holds, and random ones."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from qcompile.calibration.given import GivenSamples
from qcompile.errors import UserError
from qcompile.intake import take_samples


def masked_model(mask: str) -> ir.Model:
    """y = x * mask over (batch, sequence), the mask under a name of its own."""
    value = helper.make_tensor_value_info
    types = {"x": TensorProto.FLOAT, mask: TensorProto.INT64}
    inputs = [value(name, kind, ["batch", "sequence"]) for name, kind in types.items()]
    nodes = [
        helper.make_node("Cast", [mask], ["m"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["x", "m"], ["y"]),
    ]
    graph = helper.make_graph(nodes, "masked", inputs, [value("y", TensorProto.FLOAT, ["batch", "sequence"])])
    proto: onnx.ModelProto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return ir.from_proto(proto)


@pytest.mark.parametrize("name", ("attention_mask", "input_mask"))
def test_padding_is_known_whatever_the_mask_is_called(name: str) -> None:
    mask = np.array([[1, 1, 0]])
    (sample,) = GivenSamples([{"x": np.ones((1, 3), np.float32), name: mask}], masked_model(name))
    assert sample.mask is not None and sample.mask.tolist() == [[True, True, False]]


def test_an_empty_list_and_a_list_of_arrays_are_refused() -> None:
    with pytest.raises(UserError, match="calibration list is empty"):
        GivenSamples([], masked_model("mask"))
    with pytest.raises(UserError, match="sample 0 is a ndarray"):
        GivenSamples([np.ones(3)], masked_model("mask"))  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("shape", "words"),
    [((3,), r"'x' is float32 \[3\], but the model takes"), ((1, 0), "'x' is empty"), ((0, 3), "'x' is empty")],
)
def test_a_sample_that_cannot_run_is_named(shape: tuple[int, ...], words: str) -> None:
    good: dict[str, np.ndarray] = {"x": np.ones((1, 3), np.float32), "mask": np.ones((1, 3), np.int64)}
    with pytest.raises(UserError, match=words) as caught:
        GivenSamples([good, {"x": np.ones(shape, np.float32)}], masked_model("mask"))
    assert caught.value.where == "calibration sample 1"


def test_only_a_mask_may_hold_minus_infinity() -> None:
    model = masked_model("mask")
    model.graph.inputs[1].dtype = ir.DataType.FLOAT
    ones, hidden = np.ones((1, 2), np.float32), np.array([[0, -np.inf]], np.float32)
    assert len(GivenSamples([{"x": ones, "mask": hidden}], model)) == 1
    for x, mask in ((hidden, ones), (ones, -hidden), (ones, np.float32(np.nan) * ones)):
        with pytest.raises(UserError, match=r"holds (nan|-?inf)"):
            GivenSamples([{"x": x, "mask": mask}], model)


def test_a_misspelt_name_is_refused() -> None:
    misspelt: dict[str, np.ndarray] = {"x": np.ones((1, 3), np.float32), "maks": np.ones((1, 3), np.int64)}
    with pytest.raises(UserError, match="unknown calibration key 'maks'"):
        GivenSamples([misspelt], masked_model("mask"))


def test_the_digest_tells_samples_apart() -> None:
    def digest(number: float) -> str:
        feeds: dict[str, np.ndarray] = {"x": np.full((1, 2), number, np.float32), "mask": np.ones((1, 2), np.int64)}
        return GivenSamples([feeds], masked_model("mask")).digest()

    assert digest(1) == digest(1) != digest(2)


def test_random_data_follows_the_seed() -> None:
    def drawn(seed: int) -> np.ndarray:
        samples, _ = take_samples(masked_model("codes"), None, None, 4, 8, seed)
        return np.concatenate([sample.feeds["x"] for sample in samples], axis=1)

    assert np.array_equal(drawn(3), drawn(3)) and not np.array_equal(drawn(3), drawn(4))


def test_the_manifest_counts_what_was_held_out() -> None:
    _, described = take_samples(masked_model("codes"), None, None, 4, 8)
    assert described == {"kind": "random", "samples": 4, "held_out": 2, "max_length": 8}
