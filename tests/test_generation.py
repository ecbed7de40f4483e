"""Generation: with a cache and without, greedy and drawn, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import qcompile
from qcompile.errors import UserError
from qcompile.generation import Decoder, choose, generate
from qcompile.models.architectures import VOCAB, cached_export
from tests.text import logits

PROMPT = [17, 45, 9, 101, 30]


def ids_of(program: Path, **options: float) -> list[int]:
    return [token.id for token in generate(program, PROMPT, max_tokens=20, **options)]  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_greedy_tokens_are_the_same_with_a_cache_and_without(name: str) -> None:
    found = ids_of(cached_export(name, with_past=True))
    assert found == ids_of(cached_export(name))
    assert len(found) == 20


def test_a_seed_draws_the_same_tokens_again_and_another_seed_others() -> None:
    path = cached_export("llama", with_past=True)
    first = ids_of(path, temperature=2.0, seed=1)
    assert first == ids_of(path, temperature=2.0, seed=1) != ids_of(path, temperature=2.0, seed=2)


def test_temperature_flattens_the_draw() -> None:
    scores, generator = np.array([0.0, 1.0, 3.0]), np.random.default_rng(0)
    drawn = [choose(scores, 1.0, generator) for _ in range(2000)]
    expected = np.exp(scores) / np.exp(scores).sum()
    np.testing.assert_allclose(np.bincount(drawn, minlength=3) / 2000, expected, atol=0.03)
    assert {choose(scores, 0.01, generator) for _ in range(50)} == {2} == {choose(scores, 0.0, generator)}


def test_a_stop_token_is_given_out_and_ends_the_text() -> None:
    path = cached_export("llama", with_past=True)
    all_of_them = ids_of(path)
    stop = all_of_them[7]
    assert ids_of(path, stop={stop}) == all_of_them[: all_of_them.index(stop) + 1]  # type: ignore[arg-type]


def test_the_cache_is_counted_in_bytes() -> None:
    decoder = Decoder.open(cached_export("llama", with_past=True))
    decoder.feed(np.array([PROMPT]))
    assert decoder.cache_bytes == 2 * 2 * len(PROMPT) * 2 * 16 * 4  # layers, keys and values, tokens, heads, width


@pytest.mark.parametrize("recipe", ["float", "w8a8"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_compiled_program_with_a_cache_decodes_as_it_prefills(name: str, recipe: str) -> None:
    ids = np.random.default_rng(2).integers(3, VOCAB, (2, 12))
    path = cached_export(name, with_past=True)
    with qcompile.compile(path, recipe=recipe, passes=[], max_samples=2, max_length=16) as compiled:
        program = compiled.folder / "model.onnx"
        whole, pieces = (logits(program, ids, split) for split in ([12], [5, 1, 1, 5]))
        (lower,) = (entry for entry in compiled.manifest["passes"] if entry["name"] == "lower")
        tokens = [token.id for token in compiled.generate(PROMPT, max_tokens=5)]
    assert not lower["skips"]
    # 8-bit activations may round a last bit the other way, one step of a layer's input
    np.testing.assert_allclose(pieces, whole, rtol=0, atol=1e-4 if recipe == "float" else 0.3)
    reference = logits(path, ids, [12])
    assert np.linalg.norm(whole - reference) < 0.2 * np.linalg.norm(reference)
    assert len(tokens) == 5 and set(tokens) <= set(range(VOCAB))


@pytest.mark.parametrize(
    ("name", "prompt", "options", "message"),
    [
        ("bert", PROMPT, {}, "no causal language model|cannot run"),
        ("vit", PROMPT, {}, "no causal language model"),
        ("llama", [], {}, "holds no token"),
        ("llama", PROMPT, {"temperature": -1.0}, "temperature is -1"),
        ("llama", PROMPT, {"seed": -1}, "seed is -1"),
        ("gpt2", [5] * 100, {}, "cannot run the model"),
    ],
)
def test_what_cannot_be_continued_is_refused(
    name: str, prompt: list[int], options: dict[str, float], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        list(generate(cached_export(name), prompt, **options))  # type: ignore[arg-type]
