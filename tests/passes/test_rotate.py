"""Rotate: the same function, chosen where the quantised model gains, refused with a reason where not."""

from __future__ import annotations

import collections

import numpy as np
import pytest

from qcompile.calibration.trial import Trials
from qcompile.errors import UserError
from qcompile.graph.edits import constant_array
from qcompile.graph.linears import find_linears
from qcompile.models.architectures import ARCHITECTURES, cached_export
from qcompile.passes.rotate import Rotate
from tests.passes.planted import Bench, bench, difference

TOLERANCE = 1e-5
POST_LN = ("bert", "roberta", "distilbert", "opt_post_ln", "bloom")


def operators(held: Bench) -> collections.Counter[str]:
    return collections.Counter(node.op_type for node in held.model.graph)


def measured(monkeypatch: pytest.MonkeyPatch, before: float, after: float) -> None:
    """The losses that the quantised model is said to have, not rotated and rotated."""
    losses = iter((before, after))
    monkeypatch.setattr(Trials, "loss", lambda self, model: next(losses))


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rotation is taken for an improvement."""
    measured(monkeypatch, 0.2, 0.1)
    monkeypatch.setattr("qcompile.passes.rotate._better", lambda site, objective, turn, ctx, **facts: True)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_all_rotations_together_keep_the_function(name: str) -> None:
    with bench(cached_export(name), recipe="w4a4") as held:
        before = held.outputs()
        usual = 4 if name in POST_LN else 5  # two value paths, two down projections, and a stream
        assert held.run("rotate{online=1}").rewrites == {"mixtral": 3, "t5": 12}.get(name, usual)
        assert difference(before, held.outputs()) <= TOLERANCE


def test_what_is_rotated_has_a_smaller_error() -> None:
    with bench(cached_export("phi"), recipe="w4a4") as held:
        before = operators(held)
        entry = held.run("rotate{scales=0}")
        found = {site["site"]: site for site in entry.sites}
        stream = found["residual:model.layers.0.input_layernorm"]
        assert stream["loss_after"] < 0.85 * stream["loss_before"]
        assert (stream["writers"], stream["readers"], stream["tables_added"]) == (5, 9, 0)
        values = [found[f"v_o:model.layers.{i}.self_attn.dense"] for i in (0, 1)]
        assert all(site["loss_after"] < 0.5 * site["loss_before"] for site in values)
        assert operators(held) - before == {"RMSNormalization": 3}  # nothing more is done at run time


def test_scales_are_folded_beside_a_rotation() -> None:
    with bench(cached_export("phi"), recipe="w4a4") as held:
        before = held.outputs()
        entry = held.run("rotate{v_o=0}")
        scaled = [site["site"] for site in entry.sites if site.get("scaled")]
        norms = [*(f"layers.{i}.input_layernorm" for i in (0, 1)), "final_layernorm"]
        assert entry.rewrites == 1 and scaled == [f"norm:model.{name}" for name in norms]
        nodes = [node for node in held.model.graph if node.op_type == "RMSNormalization"]
        gains = [constant_array(node.inputs[1]) for node in nodes]
        assert all(gain is not None and gain.std() > 0.01 for gain in gains)  # a rotated norm's own gain is one
        assert difference(before, held.outputs()) <= TOLERANCE


def test_outliers_that_channel_scales_remove_need_no_rotation() -> None:
    """The planted outliers are one channel of each norm: judged with a transform's scales, no rotation is better."""
    with bench(cached_export("llama"), recipe="w4a4") as held:
        before = held.outputs()
        entry = held.run("rotate{v_o=0}")
        assert entry.rewrites == 0 and "no better when it is rotated" in entry.skips[0].reason
        assert difference(before, held.outputs()) == 0  # the scales were folded into copies


def test_a_rotation_that_does_not_help_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    measured(monkeypatch, 0.1, 0.2)
    with bench(cached_export("llama"), recipe="w4a4") as held:
        before = [linear.w.copy() for linear in find_linears(held.model.graph)]
        entry = held.run("rotate{v_o=0}")
        why = "the quantised model is no better when it is rotated: 0.2 against 0.1"
        assert [(s.site, s.reason) for s in entry.skips] == [("residual:model.layers.0.input_layernorm", why)]
        assert entry.rewrites == 0
        after = [linear.w for linear in find_linears(held.model.graph)]
        assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("name", POST_LN)
def test_post_ln_is_refused_with_a_reason(name: str) -> None:
    with bench(cached_export(name), recipe="w4a4") as held:
        entry = held.run("rotate{v_o=0}")
        assert entry.rewrites == 0 and entry.skips
        why = "(behind the embeddings)" if name == "bloom" else "(post-LN)"
        assert all(skip.site.startswith("residual:") and why in skip.reason for skip in entry.skips)


@pytest.mark.usefixtures("always")
def test_online_turns_the_input_of_each_down_projection() -> None:
    with bench(cached_export("gemma"), recipe="w4a4") as held:
        assert operators(held)["RotateBlocks"] == 0
        held.run("rotate{online=1 residual=0 v_o=0 block=100}")
        assert operators(held)["RotateBlocks"] == 2
        blocks = [constant_array(node.inputs[1]) for node in held.model.graph if node.op_type == "RotateBlocks"]
        assert all(block is not None and block.shape == (64, 64) for block in blocks)


def test_untie_off_leaves_a_tied_head_alone() -> None:
    with bench(cached_export("gpt2"), recipe="w4a4") as held:
        entry = held.run("rotate{untie=0 v_o=0}")
        assert [skip.reason for skip in entry.skips] == [
            "the head shares its table with an embedding, and untie is off"
        ]


def test_the_seed_decides() -> None:
    def weights(seed: int) -> list[np.ndarray]:
        with bench(cached_export("phi"), recipe="w4a4") as held:
            held.ctx.seed = seed
            assert held.run("rotate{v_o=0 scales=0}").rewrites == 1
            return [linear.w.copy() for linear in find_linears(held.model.graph)]

    first, second, other = weights(1), weights(1), weights(0)
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert not np.array_equal(first[0], other[0])


def test_nothing_is_rotated_for_a_float_recipe() -> None:
    with bench(cached_export("llama"), recipe="float") as held:
        entry = held.run("rotate")
        assert entry.rewrites == 0 and "quantises nothing" in entry.notes[0]


def test_a_block_too_small_is_refused() -> None:
    with pytest.raises(UserError, match="block is 4"):
        Rotate(block=4)
