"""Blocks cut out of every architecture, run one after another, are the whole model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import pytest

from qcompile.block.cut import Cut, Part, cut, extract
from qcompile.calibration.samples import Sample
from qcompile.errors import ContractError
from qcompile.graph.linears import find_linears
from qcompile.graph.provenance import LAYER, ORIGIN
from qcompile.models.architectures import ARCHITECTURES, LAYERS, cached_export
from tests.block.stacks import planted, samples
from tests.passes.planted import Bench, bench

TOLERANCE = 1e-5  # measured: at most 4e-7


def in_turn(found: Bench, parts: Sequence[Part], sample: Sample) -> dict[str, np.ndarray]:
    """Every value between the parts, each made by the part that gives it."""
    values = dict(sample.feeds)
    for part in parts:
        with found.ctx.runner.opened(extract(found.model, part), part.gives) as run:
            values.update(run({name: values[name] for name in part.needs}))
    return values


def difference(found: Bench, parts: Sequence[Part]) -> float:
    """max|parts in turn - whole| / max|whole|, the worst output of the worst sample."""
    names = [str(value.name) for value in found.model.graph.outputs]
    worst = 0.0
    for sample, whole in found.ctx.runner.stream(found.model, list(found.ctx.samples)[:2], names):
        values = in_turn(found, parts, sample)
        worst = max([worst, *(float(np.abs(values[n] - whole[n]).max() / np.abs(whole[n]).max()) for n in names)])
    return worst


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_blocks_in_turn_are_the_model(name: str) -> None:
    with bench(cached_export(name)) as found:
        made = cut(found.model)
        assert not made.uncut
        assert len(made.blocks) == (2 * LAYERS if name == "t5" else LAYERS)
        assert difference(found, made.parts) < TOLERANCE


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_blocks_follow_one_another_and_hold_their_linears(name: str) -> None:
    with bench(cached_export(name)) as found:
        blocks = cut(found.model).blocks
        inside = [linear.name for part in blocks for linear in find_linears(extract(found.model, part).graph)]
        known = [linear.name for linear in find_linears(found.model.graph)]
        outside = [linear for linear in known if linear not in inside]
        assert sorted(inside + outside) == sorted(known)
        assert len(outside) <= 1, "only the head lies outside"
        stacks = [blocks[:LAYERS], blocks[LAYERS:]]
        for stack in stacks:
            assert [part.input for part in stack[1:]] == [part.output for part in stack[:-1]]


def operator(model: ir.Model, name: str) -> str:
    return next(node.op_type for node in model.graph if node.outputs[0].name == name)


@pytest.mark.parametrize(
    ("name", "end"), [("bert", "LayerNormalization"), ("opt_post_ln", "LayerNormalization"), ("llama", "Add")]
)
def test_a_block_ends_at_the_residual_stream(name: str, end: str) -> None:
    with bench(cached_export(name)) as found:
        assert {operator(found.model, part.output) for part in cut(found.model).blocks} == {end}


@pytest.mark.parametrize("name", ["bert", "opt_post_ln", "llama", "falcon"])
def test_blocks_without_names_have_the_same_borders(name: str) -> None:
    with bench(cached_export(name)) as found:
        named = cut(found.model).blocks
        for number, node in enumerate(found.model.graph):
            node.metadata_props[LAYER] = node.metadata_props[ORIGIN] = f"node_{number}"
        made = cut(found.model)
        assert [(part.needs, part.gives) for part in made.blocks] == [(part.needs, part.gives) for part in named]
        assert [part.name for part in made.blocks] == ["block.0", "block.1"]


def test_an_encoder_gives_its_states_to_every_block_of_the_decoder() -> None:
    with bench(cached_export("t5")) as found:
        *_, before, first, second, _ = cut(found.model).parts
        assert (before.name, before.is_block) == ("before decoder.block.0", False)
        shared = set(before.gives) & set(first.extra) & set(second.extra)
        assert "RMSNormalization" in {operator(found.model, name) for name in shared}


def test_a_block_keeps_the_weights_that_the_model_has() -> None:
    """Nothing is copied at the cut, and an edit of the model is in the next cut."""
    with bench(cached_export("llama")) as found:
        part = cut(found.model).blocks[0]
        linear = find_linears(found.model.graph)[0]
        assert find_linears(extract(found.model, part).graph)[0].weight.const_value is linear.weight.const_value
        linear.weight.const_value = ir.tensor(np.zeros_like(linear.w), name=linear.weight.name)
        assert not find_linears(extract(found.model, part).graph)[0].w.any()


# --------------------------------------------------------------------------- planted graphs


def checked(model: ir.Model) -> Cut:
    """The cut of ``model``, whose parts in turn compute what it does."""
    with bench(model, samples()) as found:
        made = cut(found.model)
        assert difference(found, made.parts) < TOLERANCE
        return made


def test_two_plain_blocks_and_what_lies_around_them() -> None:
    made = checked(planted("x1 = Add (x0, b0)"))
    assert [part.name for part in made.parts] == ["before layers.0", "layers.0", "layers.1", "the rest"]
    assert [(part.needs, part.gives) for part in made.blocks] == [(("x0",), ("x1",)), (("x1",), ("x2",))]


@pytest.mark.parametrize(
    ("middle", "reason", "node"),
    [
        ("x1 = Identity (b0)", "no residual passes by its linears", "b0"),
        ("x1 = Sum (b0, x0, z)", "its residual has several sources: x0, z", "b0"),
    ],
)
def test_a_block_that_cannot_be_cut_says_why_and_the_other_works(middle: str, reason: str, node: str) -> None:
    made = checked(planted(middle))
    assert [(one.name, one.reason, one.node) for one in made.uncut] == [("layers.0", reason, node)]
    assert [part.name for part in made.parts] == ["before layers.1", "layers.1", "the rest"]


def test_linears_that_never_meet_make_no_block() -> None:
    """The first linear of layers.0 also goes past the residual stream, into the second block."""
    model = planted("x1 = Add (x0, b0)")
    late = next(node for node in model.graph if node.outputs[0].name == "r1")
    early = next(node for node in model.graph if node.outputs[0].name == "a0")
    product = ir.node("Add", [late.outputs[0], early.outputs[0]], name="late")
    product.outputs[0].name, product.outputs[0].type = "late", late.outputs[0].type
    model.graph.insert_after(late, product)
    next(node for node in model.graph if node.outputs[0].name == "b1").replace_input_with(0, product.outputs[0])
    made = checked(model)
    assert [(one.name, one.reason) for one in made.uncut] == [
        ("layers.0", "what its linears make does not meet in one value again")
    ]


def test_the_shape_of_a_value_inside_a_block_may_serve_a_later_one() -> None:
    """Exporters compute a shape once; the first block gives it beside the stream."""
    middle = "shape = Shape (r0)\n flat = Reshape (b0, shape)\n h = Reshape (x0, shape)\n x1 = Add (h, flat)"
    model = planted(middle)
    shape = next(node for node in model.graph if node.op_type == "Shape").outputs[0]
    late = next(node for node in model.graph if node.outputs[0].name == "b1")
    again = ir.node("Reshape", [late.outputs[0], shape], name="again")
    again.outputs[0].name, again.outputs[0].type = "again", late.outputs[0].type
    model.graph.insert_after(late, again)
    next(node for node in model.graph if node.outputs[0].name == "x2").replace_input_with(1, again.outputs[0])
    first, second = checked(model).blocks
    assert first.gives == ("x1", "shape")
    assert second.needs == ("x1", "shape")


def test_an_edit_that_moves_a_border_is_seen() -> None:
    model = planted("x1 = Add (x0, b0)")
    part = cut(model).blocks[0]
    next(node for node in model.graph if node.outputs[0].name == "x1").outputs[0].name = "moved"
    with pytest.raises(ContractError, match=r"borders of 'layers.0' have moved"):
        extract(model, part)
