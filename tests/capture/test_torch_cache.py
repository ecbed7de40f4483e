"""Decoders exported with their key/value cache: one graph for the prompt and for each token after it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from qcompile.capture.torch_model import capture_with_past
from qcompile.errors import UserError
from qcompile.generation import Decoder
from qcompile.models.architectures import ARCHITECTURES, LAYERS, VOCAB, cached_export
from tests.text import logits

DECODERS = ("llama", "qwen2", "qwen3", "gemma", "phi", "gpt2", "opt", "bloom", "falcon", "mixtral")


@pytest.mark.parametrize("name", DECODERS)
def test_any_split_of_a_text_gives_the_logits_of_the_whole(name: str) -> None:
    ids = np.random.default_rng(0).integers(3, VOCAB, (2, 12))
    expected = logits(cached_export(name), ids, [12])
    path = cached_export(name, with_past=True)
    for split in ([12], [5, 1, 1, 5], [1] * 12):
        np.testing.assert_allclose(logits(path, ids, split), expected, rtol=0, atol=1e-4)


def test_inputs_and_outputs_have_the_names_of_optimum() -> None:
    graph = onnx.load(cached_export("llama", with_past=True)).graph
    parts = [f"{layer}.{part}" for layer in range(LAYERS) for part in ("key", "value")]
    pasts = [f"past_key_values.{part}" for part in parts]
    assert [v.name for v in graph.input] == ["input_ids", "attention_mask", "position_ids", *pasts]
    assert [v.name for v in graph.output] == ["logits", *(f"present.{part}" for part in parts)]
    axes = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in graph.input}
    assert axes["attention_mask"] == ["batch", "past_sequence + sequence"]
    assert axes[pasts[0]] == ["batch", 2, "past_sequence", 16]
    scopes = [prop.value for node in graph.node for prop in node.metadata_props if "name_scopes" in prop.key]
    assert any("'model.layers.0.mlp.up_proj'" in scope for scope in scopes)  # names as without a cache


def test_positions_come_from_the_caller_so_that_padding_on_the_left_is_exact() -> None:
    path = cached_export("llama", with_past=True)
    ids = np.random.default_rng(1).integers(3, VOCAB, (1, 6))
    decoder = Decoder.open(path)
    expected = decoder.feed(ids)
    padded = np.concatenate([np.zeros((1, 2), np.int64), ids], axis=1)
    decoder.reset()
    mask = np.array([[0, 0, 1, 1, 1, 1, 1, 1]])
    np.testing.assert_allclose(decoder.feed(padded, mask)[:, 2:], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("name", "reason"), [("bert", "no decoder"), ("t5", "no decoder")])
def test_a_model_without_such_a_cache_is_refused(name: str, reason: str, tmp_path: Path) -> None:
    module = ARCHITECTURES[name]()
    forward = module.forward
    with pytest.raises(UserError, match=reason):
        capture_with_past(module, tmp_path)
    assert module.forward == forward
