"""The walk over the blocks: both streams are what whole models compute, and a killed run goes on."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qcompile.block import cache
from qcompile.block.cut import cut
from qcompile.block.stream import reconstruct
from qcompile.calibration.draft import Draft
from qcompile.calibration.samples import Sample
from qcompile.graph.edits import new_initializer, replace_constant
from qcompile.graph.grids import forget_grids, grid_of, remember_grid
from qcompile.graph.linears import Linear, find_linears
from qcompile.ledger import Skip
from qcompile.models.architectures import ARCHITECTURES, cached_export
from qcompile.quant.numerics import quantize_weight
from qcompile.quant.schemes import WeightScheme
from tests.block.stacks import planted, samples, stack
from tests.passes.planted import Bench, bench

EXACT = 1e-5  # relative to the largest: the same graph, run in pieces
LABEL = "edit{factor=1.1}"
Arrays = dict[str, np.ndarray]


def edit(found: Bench, linears: Iterable[Linear], factor: float = 1.1) -> None:
    """What a learning pass does: give linears other weights."""
    for linear in linears:
        replace_constant(linear.weight, np.asarray(linear.w * factor, np.float32), found.ctx.workspace)


def whole(found: Bench, model: ir.Model, names: Sequence[str]) -> list[Arrays]:
    return [values for _, values in found.ctx.runner.stream(model, found.ctx.samples, names)]


def drafted(found: Bench) -> ir.Model:
    """The whole model as it is now, with the recipe's formats."""
    return Draft(found.model, found.ctx.recipe, found.ctx.workspace).build()


def distance(actual: np.ndarray, expected: np.ndarray) -> float:
    assert actual.shape == expected.shape
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


# --------------------------------------------------------------------------- the two streams


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_streams_are_those_of_whole_models(name: str) -> None:
    """The float one of the model as it came, the quantised one of the edited model with the recipe's formats."""
    with bench(cached_export(name), recipe="w8a16") as found:
        parts = cut(found.model).blocks
        floats = whole(found, found.model, [n for part in parts for n in (part.input, part.output)])
        seen: dict[str, list[np.ndarray]] = {}
        for step in reconstruct(found.ctx, found.model, LABEL):
            for sample, values in enumerate(floats):
                assert distance(step.inputs_float[sample], values[step.part.input]) < EXACT
                assert distance(step.targets[sample], values[step.part.output]) < EXACT
            seen[step.part.input] = [np.array(x) for x in step.inputs]
            edit(found, step.linears)
        assert list(seen) == [part.input for part in parts]
        expected = whole(found, drafted(found), list(seen))
        for place, (value, arrays) in enumerate(seen.items()):
            for x, quantised, plain in zip(arrays, expected, floats, strict=True):
                assert distance(x, quantised[value]) < EXACT
                assert place == 0 or distance(x, plain[value]) > 100 * EXACT


def test_activations_are_quantised_as_well() -> None:
    """Nearer to the whole quantised model than that is to the float one; a last bit may move a code."""
    with bench(cached_export("llama"), recipe="w8a8") as found:
        value = cut(found.model).blocks[-1].input
        floats = whole(found, found.model, [value])
        *_, inputs = ([np.array(x) for x in step.inputs] for step in reconstruct(found.ctx, found.model, LABEL))
        for x, quantised, plain in zip(inputs, whole(found, drafted(found), [value]), floats, strict=True):
            assert np.square(x - quantised[value]).sum() < 0.1 * np.square(plain[value] - quantised[value]).sum()


@pytest.mark.parametrize("recipe", ["w8a8_static", "w4a4_static", "w4a16_g32", "float"])
def test_ranges_are_those_of_the_quantised_stream(recipe: str) -> None:
    """Post-LN: the linears read the block's own input."""
    with bench(cached_export("bert"), recipe=recipe) as found:
        errors = {step.name: step.error() for step in reconstruct(found.ctx, found.model, LABEL)}
        assert all(math.isfinite(error) for error in errors.values())
        assert all((error < 1e-9) == (recipe == "float") for error in errors.values())
        operators = {node.op_type for step in reconstruct(found.ctx, found.model, "again") for node in
                     step.quantised().graph}  # fmt: skip
        assert ("QuantizeLinear" in operators) == recipe.endswith("static")


def test_a_decoder_meets_the_quantised_states_of_its_encoder() -> None:
    with bench(cached_export("t5"), recipe="w4a16") as found:
        made = cut(found.model)
        (before,) = (part for part in made.parts if part.name == "before decoder.block.0")
        inside = {str(node.outputs[0].name): node.op_type for node in found.model.graph}
        (states,) = (n for n in before.gives if inside[n] == "RMSNormalization")
        checked = 0
        for step in reconstruct(found.ctx, found.model, LABEL):
            if not step.name.startswith("decoder"):
                continue
            quantised, plain = step.feeds(0), step.feeds_float(0)
            assert list(quantised) == list(plain) == list(step.part.needs)
            assert distance(quantised[states], plain[states]) > 1e-3
            masks = [n for n in step.part.extra if quantised[n].ndim == 4]
            assert masks and all(np.array_equal(quantised[n], plain[n]) for n in masks)
            checked += 1
        assert checked == 2


# --------------------------------------------------------------------------- the error of a block


def padded(count: int = 3, length: int = 12) -> list[Sample]:
    """Two rows of token ids each, the second of them half padding."""
    generator, found = np.random.default_rng(0), []
    for _ in range(count):
        mask = np.ones((2, length), np.int64)
        mask[1, length // 2 :] = 0
        feeds = {"input_ids": generator.integers(3, 256, (2, length)), "attention_mask": mask}
        found.append(Sample(feeds, mask.astype(bool)))
    return found


def test_the_error_is_the_mean_square_over_real_tokens() -> None:
    with bench(cached_export("bert"), padded(), recipe="w4a8") as found:
        step = next(reconstruct(found.ctx, found.model, LABEL))
        total, count = 0.0, 0
        for sample, output in enumerate(step.outputs(step.quantised())):
            mask = step.mask(sample)
            assert mask is not None and mask.sum() == 18
            real = np.square(np.float64(output) - step.targets[sample])[mask]
            total, count = total + real.sum(), count + real.size
        assert step.error() == pytest.approx(total / count, rel=1e-6)
        assert step.error(step.block()) < 1e-9


def test_an_output_that_is_not_finite_has_an_infinite_error() -> None:
    with bench(cached_export("gpt2"), recipe="w4a8") as found:
        for step in reconstruct(found.ctx, found.model, LABEL):
            good = step.block()
            assert math.isfinite(step.error(good))
            bias = next(linear.add for linear in step.linears if linear.add is not None).inputs[1]
            assert bias is not None and bias.const_value is not None
            kept = bias.const_value
            bias.const_value = ir.tensor(np.full(kept.numpy().shape, np.nan, np.float32), name=bias.name)
            assert step.error(step.block()) == math.inf
            bias.const_value = kept


# --------------------------------------------------------------------------- a killed run


class Killed(BaseException):
    """Nothing in the code under test may catch it."""


def walked(folder: Path | None, kill_in: int = 0, label: str = LABEL, recipe: str = "w4a8") -> tuple[Any, ...]:
    """A walk over T5's four blocks that edits each, killed in the block ``kill_in`` after its edit.

    Gives the numbers of the blocks that it saw, all weights at the end, and what the ledger holds.
    """
    with bench(cached_export("t5"), recipe=recipe) as found:
        seen = []
        try:
            for step in reconstruct(found.ctx, found.model, label, folder=folder):
                seen.append(step.number)
                edit(found, step.linears, 1 + step.number / 10)
                step.facts["mark"] = f"{step.number}"
                if step.number == kill_in:
                    raise Killed
        except Killed:
            pass
        weights = {linear.name: np.array(linear.w) for linear in find_linears(found.model.graph)}
        return seen, weights, found.ctx.ledger.current.sites


@functools.cache
def undisturbed() -> tuple[Any, ...]:
    return walked(None)


def equal(first: Arrays, second: Arrays) -> bool:
    return first.keys() == second.keys() and all(np.array_equal(first[name], second[name]) for name in first)


def test_a_run_goes_on_behind_the_last_finished_block(tmp_path: Path) -> None:
    _, weights, records = undisturbed()
    assert [record["mark"] for record in records] == ["1", "2", "3", "4"]
    assert all(record["error"] > 0 for record in records)
    assert walked(tmp_path, kill_in=3)[0] == [1, 2, 3]
    for expected in ([3, 4], []):
        seen, again, repeated = walked(tmp_path)
        assert seen == expected
        assert equal(again, weights)
        assert repeated == records


def dying(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int) -> None:
    """Let the process die at the start of a call of ``owner.name``."""
    calls, whole = itertools.count(1), getattr(owner, name)

    def call_or_die(*arguments: Any) -> Any:
        if next(calls) == call:
            raise Killed
        return whole(*arguments)

    monkeypatch.setattr(owner, name, call_or_die)


@pytest.mark.parametrize(
    ("owner", "name", "call", "next_block"),
    [
        (cache.Cache, "put", 54, 2),
        (cache, "_copy", 12, 2),
        (cache.Cache, "_write_state", 2, 2),
        (cache.Cache, "keep", 2, 3),
    ],
)
def test_a_kill_at_any_moment_leaves_a_state_to_go_on_from(
    owner: Any, name: str, call: int, next_block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, weights, _ = undisturbed()
    with monkeypatch.context() as patch:
        dying(patch, owner, name, call)
        walked(tmp_path)
    seen, again, _ = walked(tmp_path)
    assert seen == list(range(next_block, 5))
    assert equal(again, weights)


def test_another_pass_recipe_or_data_starts_again(tmp_path: Path) -> None:
    walked(tmp_path, kill_in=2)
    assert walked(tmp_path, kill_in=1, label="edit{factor=1.2}")[0] == [1]
    assert walked(tmp_path, kill_in=1, recipe="w8a8")[0] == [1]
    with bench(cached_export("t5"), recipe="w4a8") as found:
        fewer = list(found.ctx.samples)[:2]
        assert next(reconstruct(found.ctx, found.model, LABEL, samples=fewer, folder=tmp_path)).number == 1
    assert walked(tmp_path)[0] == [2, 3, 4]


def test_only_what_later_blocks_read_is_on_disk(tmp_path: Path) -> None:
    with bench(cached_export("t5"), recipe="w4a8") as found:
        made, done = cut(found.model), 0
        for step in reconstruct(found.ctx, found.model, LABEL, folder=tmp_path):
            later = made.parts[done:-1]
            done = made.parts.index(step.part) + 1
            held = {path.parent.name.rpartition("-")[0] for path in tmp_path.rglob("*.npy")}
            assert {*step.part.needs, step.part.output} <= held
            assert held <= {step.part.output, *(name for part in later for name in part.needs)}
        assert not list(tmp_path.rglob("*.npy"))
        assert len(list(tmp_path.rglob("model-*.onnx"))) == 1


def test_a_change_of_the_graph_inside_a_block_survives_a_kill(tmp_path: Path) -> None:
    model = planted("x1 = Add (x0, b0)")
    with bench(model.clone(), samples(), recipe="w8a8") as found:
        steps = reconstruct(found.ctx, found.model, LABEL, folder=tmp_path)
        assert next(steps).name == "layers.0"
        doubled(found)
        after = np.array(next(steps).inputs[0])
    with bench(model.clone(), samples(), recipe="w8a8") as found:
        (step,) = reconstruct_all(found, tmp_path)
        assert (step[0], step[1]) == ("layers.1", 2)
        assert np.array_equal(step[2], after)
        assert "doubled" in {node.name for node in found.model.graph}


def test_codes_that_were_chosen_survive_a_kill(tmp_path: Path) -> None:
    """The codes here are not what rounding gives, and rounding their values would choose other scales."""
    scheme, chosen, before = WeightScheme(bits=4), {}, {}
    with bench(cached_export("gpt2"), recipe="w4a16") as found:
        for step in reconstruct(found.ctx, found.model, LABEL, folder=tmp_path):
            if step.number == 2:
                break
            for linear in step.linears:
                before[linear.name] = np.array(linear.w)
                rounded = quantize_weight(before[linear.name], scheme)
                chosen[linear.name] = dataclasses.replace(rounded, codes=rounded.codes // 2)
                remember_grid(linear.weight, chosen[linear.name], scheme, found.ctx.workspace)
    with bench(cached_export("gpt2"), recipe="w4a16") as found:
        assert [step[1] for step in reconstruct_all(found, tmp_path)] == [2]
        weights = {linear.name: linear.weight for linear in find_linears(found.model.graph)}
        for name, weight in chosen.items():
            again = grid_of(weights[name], scheme)
            assert again is not None
            assert np.array_equal(again.codes, weight.codes)
        forget_grids(found.model)
        for linear in find_linears(found.model.graph):
            assert linear.name not in before or np.array_equal(linear.w, before[linear.name])


def doubled(found: Bench) -> None:
    """Multiply what the block layers.0 adds to the stream."""
    node = next(node for node in found.model.graph if node.outputs[0].name == "r0")
    two = new_initializer(found.model, "two", np.full(1, 2, np.float32), found.ctx.workspace)
    product = ir.node("Mul", [node.outputs[0], two], name="doubled")
    product.outputs[0].name, product.outputs[0].type = "doubled", node.outputs[0].type
    found.model.graph.insert_after(node, product)
    next(n for n in found.model.graph if n.outputs[0].name == "b0").replace_input_with(0, product.outputs[0])


def test_a_block_that_cannot_be_cut_is_told_and_passed() -> None:
    model = planted("x1 = Identity (b0)")
    with bench(model, samples(), recipe="w8a16") as found:
        (step,) = reconstruct_all(found)
        assert (step[0], step[1]) == ("layers.1", 1)
        assert found.ctx.ledger.current.skips == [Skip("layers.0", "no residual passes by its linears", "b0")]
        quantised = whole(found, drafted(found), ["x1"])
        assert distance(step[2], quantised[0]["x1"]) < EXACT


def reconstruct_all(found: Bench, folder: Path | None = None) -> list[tuple[str, int, np.ndarray]]:
    """The blocks that a walk without edits comes to, and their first input."""
    steps = reconstruct(found.ctx, found.model, LABEL, folder=folder)
    return [(step.name, step.number, np.array(step.inputs[0])) for step in steps]


# --------------------------------------------------------------------------- memory


def resident() -> int:
    """Bytes of this process in memory, mapped files included."""
    status = Path("/proc/self/status").read_text()
    return sum(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith(("RssAnon", "RssFile")))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads what Linux tells of a process")
def test_memory_is_that_of_a_few_blocks() -> None:
    """Six more blocks hold 6 * 2 * 2.25 MB of weights, and as much again when edited."""
    held: list[int] = []
    with bench(stack(depth=9, channels=768), samples(channels=768), recipe="w8a16") as found:
        for step in reconstruct(found.ctx, found.model, LABEL):
            edit(found, step.linears)
            assert math.isfinite(step.error())
            held.append(resident())
    assert held[-1] - held[2] < 20 << 20, [f"{size >> 20} MB" for size in held]
