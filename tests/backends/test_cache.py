"""The key/value cache in ONNX Runtime: attention that joins past and new tokens, and caches of 8- and 4-bit codes."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

import qcompile
from qcompile.calibration.caches import encode
from qcompile.calibration.runner import open_session
from qcompile.driver import CompiledModel
from qcompile.generation import Decoder
from qcompile.models.architectures import VOCAB, cached_export
from qcompile.pipeline import Arrays
from qcompile.quant.numerics import fake_quantize_per_token
from qcompile.quant.schemes import ActivationScheme
from qcompile.recipe import Recipe, Rule
from tests.text import logits

HEADS, WIDTH = 2, 16
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
    expected = encode(values, bits)
    assert codes.shape == (2, HEADS, 12, byte) and codes.dtype == np.uint8
    assert np.mean(codes != expected[0]) < 0.01  # the last bit of a float may turn a rounding
    np.testing.assert_allclose(scale, expected[1], rtol=1e-5)
    np.testing.assert_array_equal(zero, expected[2])


def test_encoded_values_are_those_of_the_runtime_function() -> None:
    values = np.random.default_rng(1).standard_normal((2, 3, 5, 8)).astype(np.float32)
    for bits in (8, 4):
        codes, scale, zero = encode(values, bits)
        if bits == 4:
            codes = np.concatenate([codes & 15, codes >> 4], axis=-1)
        decoded = (codes.astype(np.float32) - zero) * scale
        np.testing.assert_allclose(decoded, fake_quantize_per_token(values, bits, symmetric=False), atol=1e-6)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_program_takes_a_float_past_where_samples_hold_one(bits: int) -> None:
    generator = np.random.default_rng(3)
    past = {
        f"past_key_values.{layer}.{part}": generator.standard_normal((2, HEADS, 3, WIDTH)).astype(np.float32)
        for layer in (0, 1)
        for part in ("key", "value")
    }
    ids, mask = IDS[:, :4], np.ones((2, 7), np.int64)
    places = np.tile(np.arange(3, 7), (2, 1))
    feeds: Arrays = {"input_ids": ids, "attention_mask": mask, "position_ids": places, **past}
    rounded = {name: fake_quantize_per_token(x, bits, symmetric=False) for name, x in past.items()}
    with compiled("llama", bits) as found:
        given, same = found.run(feeds)["logits"], found.run(feeds | rounded)["logits"]
    np.testing.assert_allclose(given, same, rtol=0, atol=1e-3)


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
