"""The key/value cache in ONNX Runtime: attention that joins past and new tokens, and caches of 8- and 4-bit codes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import qcompile
from qcompile.calibration.runner import open_session
from qcompile.driver import CompiledModel
from qcompile.errors import UserError
from qcompile.generation import Decoder
from qcompile.models.architectures import VOCAB, cached_export
from qcompile.quant.numerics import affine_from_range, quantize
from qcompile.quant.schemes import ActivationScheme
from qcompile.recipe import Recipe, Rule
from tests.text import logits

HEADS, WIDTH = 2, 16
PER_TOKEN_4 = ActivationScheme(bits=4, granularity="per_token")
IDS = np.random.default_rng(0).integers(3, VOCAB, (2, 12))


def compiled(name: str, bits: int | None) -> CompiledModel:
    """``name`` with its cache at ``bits`` (None: float), all else float."""
    scheme = ActivationScheme(bits=bits, granularity="per_token") if bits else None
    recipe = Recipe(name="cache", rules=(Rule(op="cache", activations=scheme),) if scheme else ())
    path = cached_export(name, with_past=True)
    return qcompile.compile(path, recipe=recipe, passes=[], max_samples=2, max_length=12)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_past_goes_into_the_attention_and_is_never_transposed(name: str) -> None:
    with compiled(name, None) as found:
        graph = onnx.load(found.folder / "model.onnx").graph
    attentions = [node for node in graph.node if node.op_type == "Attention"]
    assert [node.input[4] for node in attentions] == ["past_key_values.0.key", "past_key_values.1.key"]
    assert [node.output[1] for node in attentions] == ["present.0.key", "present.1.key"]
    transposed = {node.input[0] for node in graph.node if node.op_type == "Transpose"}
    assert not any("past" in name or "present" in name for name in transposed)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_any_split_of_a_text_gives_the_same_with_a_cache_of_codes(name: str, bits: int) -> None:
    with compiled(name, bits) as found:
        program = found.folder / "model.onnx"
        whole = logits(program, IDS, [12])
        for split in ([5, 1, 1, 5], [1] * 12):
            np.testing.assert_allclose(logits(program, IDS, split), whole, rtol=0, atol=1e-4)
    reference = logits(cached_export(name), IDS, [12])
    error = float(np.linalg.norm(whole - reference) / np.linalg.norm(reference))
    low, high = {8: (1e-4, 0.02), 4: (1e-2, 0.3)}[bits]
    assert low < error < high


@pytest.mark.parametrize(("bits", "byte"), [(8, WIDTH), (4, WIDTH // 2)])
def test_codes_scales_and_zero_points_are_those_of_the_numerics(bits: int, byte: int) -> None:
    """The first layer's values depend on nothing quantised: the program's codes are those of its float ones."""
    name = "present.0.value"
    with compiled("llama", bits) as found:
        session = open_session(found.folder / "model.onnx", threads=1)
        outputs = [item.name for item in session.get_outputs()]
        assert outputs[4:7] == [name, f"{name}_scale", f"{name}_zero_point"]
        decoder = Decoder(session)
        decoder.feed(IDS)
        assert decoder.cache_bytes == 4 * IDS.size * HEADS * (byte + 5)
        again = Decoder(session)
        again.feed(IDS[:, :7])
        again.feed(IDS[:, 7:])
        codes, scale, zero = (again.past(n.replace("present", "past_key_values")) for n in outputs[4:7])
    exact = Decoder.open(cached_export("llama", with_past=True))
    exact.feed(IDS)
    values = exact.past("past_key_values.0.value")
    affine = affine_from_range(values.min(-1, keepdims=True), values.max(-1, keepdims=True), bits, False, False)
    expected = quantize(values, affine)
    if bits == 4:
        codes = np.concatenate([codes & 15, codes >> 4], axis=-1)
    assert codes.dtype == np.uint8 and np.mean(codes != expected) < 0.01  # a float's last bit may turn a rounding
    np.testing.assert_allclose(scale, affine.scale, rtol=1e-5)
    np.testing.assert_array_equal(zero, affine.zero_point)


def test_a_float_past_of_some_tokens_is_refused() -> None:
    """Calibration data may hold one, but only the program can make its codes."""
    past = {
        f"past_key_values.{layer}.{part}": np.ones((2, HEADS, 3, WIDTH), np.float32)
        for layer in (0, 1)
        for part in ("key", "value")
    }
    places = np.tile(np.arange(3, 7), (2, 1))
    feeds = {"input_ids": IDS[:, :4], "attention_mask": np.ones((2, 7), np.int64), "position_ids": places}
    with compiled("llama", 8) as found:
        with pytest.raises(UserError, match="float past of 3 tokens"):
            found.run(feeds | past)
        empty = {name: array[:, :, :0] for name, array in past.items()}
        feeds |= {"attention_mask": np.ones((2, 4), np.int64), "position_ids": places - 3}
        assert found.run(feeds | empty)["present.0.key"].shape == (2, HEADS, 4, WIDTH)


def with_key_biases(path: Path, size: float) -> Path:
    """GPT-2 at ``path`` with random numbers of ``size`` added to the biases of all keys, which changes nothing."""
    proto = onnx.load(cached_export("gpt2", with_past=True))
    generator = np.random.default_rng(0)
    biases = [tensor for tensor in proto.graph.initializer if tensor.name.endswith("c_attn.bias")]
    assert len(biases) == 2
    for tensor in biases:
        held = numpy_helper.to_array(tensor).copy()
        keys = np.split(held, 3)[1]
        keys += size * generator.standard_normal(keys.shape).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(held, tensor.name))
    onnx.save(proto, path)
    return path


@pytest.mark.parametrize("size", [0.0, 20.0])
def test_keys_of_few_bits_leave_their_mean_out_of_the_codes(size: float, tmp_path: Path) -> None:
    model = with_key_biases(tmp_path / "biased.onnx", size)
    expected = logits(cached_export("gpt2", with_past=True), IDS, [12])
    recipe = Recipe(name="cache", rules=(Rule(op="cache", activations=PER_TOKEN_4),))
    with qcompile.compile(model, recipe=recipe, passes=[], max_samples=8, max_length=12) as found:
        got = logits(found.folder / "model.onnx", IDS, [5, 1, 6])
    assert np.linalg.norm(got - expected) < 0.2 * np.linalg.norm(expected)


def test_the_interface_of_the_manifest_is_that_of_the_program() -> None:
    with compiled("llama", 4) as found:
        ports = {port["name"]: port for port in found.manifest["interface"]["inputs"]}
        (quantise,) = (entry for entry in found.manifest["passes"] if entry["name"] == "quantise")
    assert ports["past_key_values.0.key"]["type"] == "UINT8"
    assert ports["past_key_values.0.key"]["shape"] == ["batch", HEADS, "past_sequence", WIDTH // 2]
    assert ports["past_key_values.1.value_zero_point"]["shape"][-1] == 1
    assert {s["site"] for s in quantise["sites"]} >= {"past_key_values.0.key", "past_key_values.1.value"}


def test_a_cache_in_the_recipe_of_a_graph_without_one_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with qcompile.compile(cached_export("llama"), recipe="w8a8kv8", passes=[], max_samples=2, max_length=12):
        assert "no key/value cache to quantise" in capsys.readouterr().err
