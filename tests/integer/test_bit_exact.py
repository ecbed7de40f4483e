"""An integer-only program gives the same bits wherever and however it runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from qcompile.proof.prove import prove
from tests.emulated.digests import digest, outputs
from tests.integer.programs import Array, compiled, exposed, in_numpy, texts

RECIPES = ("w8a8_static", "w8a8")
NAMES = ("bert", "gpt2", "llama")
programs = pytest.mark.parametrize(("name", "recipe"), [(n, r) for n in NAMES for r in RECIPES])


def same(found: dict[str, Array], expected: dict[str, Array]) -> None:
    """Every output, integers and floats, by its digest."""
    assert found.keys() == expected.keys()
    assert {array.dtype.name for array in expected.values()} == {"float32", "int32"}
    for name, array in expected.items():
        assert digest([found[name]]) == digest([array]), name


def padded(feeds: dict[str, Array], left: int = 0, right: int = 0) -> dict[str, Array]:
    """Ids 0 that the mask leaves out."""
    return {name: np.pad(array, ((0, 0), (left, right))) for name, array in feeds.items()}


def cut(found: dict[str, Array], rows: slice = slice(None), tokens: slice = slice(None)) -> dict[str, Array]:
    return {name: array[rows, tokens] for name, array in found.items()}


@programs
def test_optimised_unoptimised_and_in_numpy(name: str, recipe: str) -> None:
    program, feeds = exposed(name, recipe), padded(texts(2, 11), right=3)
    feeds["attention_mask"][1, 6:] = 0
    expected = in_numpy(program, feeds)
    for optimised, threads in ((True, 1), (True, 2), (False, 1)):
        same(outputs(program, feeds, optimised=optimised, threads=threads), expected)


@programs
def test_one_text_at_a_time_and_four_at_once(name: str, recipe: str) -> None:
    program, feeds = exposed(name, recipe), texts(4, 17)
    together = outputs(program, feeds)
    for row in range(4):
        rows = slice(row, row + 1)
        same(outputs(program, cut(feeds, rows)), cut(together, rows))


@programs
@pytest.mark.parametrize("more", (1, 7, 40))
def test_padding_on_the_right(name: str, recipe: str, more: int) -> None:
    program, feeds = exposed(name, recipe), texts(2, 9)
    same(cut(outputs(program, padded(feeds, right=more)), tokens=slice(9)), outputs(program, feeds))


@pytest.mark.parametrize("recipe", RECIPES)
def test_padding_on_the_left_where_positions_come_from_the_mask(recipe: str) -> None:
    program, feeds = exposed("opt", recipe), texts(2, 9)
    same(cut(outputs(program, padded(feeds, left=5)), tokens=slice(5, None)), outputs(program, feeds))


@pytest.mark.parametrize("name", ("gpt2", "llama"))
def test_a_causal_text_does_not_see_what_follows(name: str) -> None:
    program, feeds = exposed(name, "w8a8_static"), texts(2, 16)
    first = {key: array[:, :7] for key, array in feeds.items()}
    same(cut(outputs(program, feeds), tokens=slice(7)), outputs(program, first))


@pytest.mark.parametrize(("name", "recipe"), [("gpt2", "w8a8_static"), ("llama", "w8a8"), ("opt", "w8a8")])
def test_a_prompt_at_once_and_token_by_token_with_a_cache(name: str, recipe: str) -> None:
    program, feeds, tokens = exposed(name, recipe, with_past=True), texts(2, 9), 9
    feeds["position_ids"] = np.tile(np.arange(tokens), (2, 1))
    past = empty_past(program, rows=2)
    together = outputs(program, feeds | past)
    for token in range(tokens):
        now = {key: array[:, token : token + 1] for key, array in feeds.items()}
        now["attention_mask"] = feeds["attention_mask"][:, : token + 1]
        found = outputs(program, now | past)
        for key in ("logits", "logits.integers"):
            assert digest([found[key]]) == digest([together[key][:, token : token + 1]]), (key, token)
        past = {f"past_key_values.{key.removeprefix('present.')}": found[key] for key in found if is_present(key)}
    for key in filter(is_present, found):
        assert digest([found[key]]) == digest([together[key]]), key


def test_a_program_with_a_cache_is_proven() -> None:
    found = prove(compiled("llama", "w8a8", with_past=True).folder / "model.onnx", levels=("all",))
    assert found.holds and found.grade == "A", found.findings
    assert {one.value for one in found.boundary if one.side == "in"} >= {"past_key_values.0.key"}


def is_present(name: str) -> bool:
    return name.startswith("present.") and not name.endswith(".integers")


def empty_past(program: Path, rows: int) -> dict[str, Array]:
    ports = [port for port in onnx.load(program).graph.input if "past" in port.name]
    sizes = {port.name: [dim.dim_value for dim in port.type.tensor_type.shape.dim] for port in ports}
    return {name: np.zeros((rows, heads, 0, width), np.float32) for name, (_, heads, _, width) in sizes.items()}
