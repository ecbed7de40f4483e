"""Attention in integers beside the float operator: masks, groups, and heads that are not alike."""

from __future__ import annotations

import numpy as np
import pytest

from qcompile.integer.convert import Settings
from tests.integer.graphs import Array, Outcome, converted, drawn

HEADS, WIDTH, LENGTH = 4, 8, 7
FAR = np.float32(-3e38)
PORTS = f"float[B, {HEADS}, S, {WIDTH}] q, float[B, %d, S, {WIDTH}] k, float[B, %d, S, {WIDTH}] v, bool[B, 1, S, S] m"
SCALE = WIDTH**-0.5


def attended(
    feeds: dict[str, Array], mask: str, constants: dict[str, Array] | None = None, settings: Settings | None = None
) -> Outcome:
    """``mask``: the fourth operand and the nodes that make it."""
    heads = feeds["k"].shape[1]
    op = f"GroupedAttention <scale = {SCALE}, groups = {HEADS // heads}>" if heads < HEADS else (
        f"Attention <scale = {SCALE}>")  # fmt: skip
    nodes, operand = mask.rsplit(maxsplit=1) if " " in mask else ("", mask)
    made = f"a = qcompile.{op} (q, k, v, {operand})"
    text = f"g ({PORTS % (heads, heads)}) => (float[B, {HEADS}, S, {WIDTH}] y) {{ {nodes} {made} y = Neg (a) }}"
    held = {"zero": np.zeros((1, 1, 1, 1), np.float32), "nought": np.float32(0), "far": FAR, **(constants or {})}
    return converted(text, held, [feeds], settings)


def case(heads: int = HEADS, reach: float = 2.0, seed: int = 0) -> dict[str, Array]:
    feeds = {
        name: drawn(2, count, LENGTH, WIDTH, reach=reach, seed=seed + i)
        for i, (name, count) in enumerate((("q", HEADS), ("k", heads), ("v", heads)))
    }
    return {**feeds, "m": np.tril(np.ones((2, 1, LENGTH, LENGTH), bool))}


@pytest.mark.parametrize("bits", (8, 16))
@pytest.mark.parametrize("heads", (4, 2, 1))
@pytest.mark.parametrize("mask", ("zero", "b = Where (m, nought, far) b"))
def test_close_to_floats(heads: int, mask: str, bits: int) -> None:
    feeds = case(heads)
    done = attended(feeds, mask, settings=Settings(64, bits))
    assert not done.skips and not done.inside()
    assert done.error(feeds) <= 2.0 / 127 + 0.03  # a code of the values, and of the scores


@pytest.mark.parametrize(("positions", "least", "most"), ((64, 0, 0.02), (2**15, 0.3, 4)))
def test_values_have_room_beyond_calibration(positions: int, least: float, most: float) -> None:
    """Longer texts leave no room in 32 bits for values of 16 bits: there they saturate."""
    feeds = case()
    done = attended(feeds, "zero", settings=Settings(positions))
    ends = [end(feeds["v"], axis=(0, 2), keepdims=True) for end in (np.min, np.max)]
    wider = {**feeds, "v": feeds["v"] + 0.9 * (feeds["v"] - (ends[0] + ends[1]) / 2)}
    assert not done.skips
    assert least < done.error(wider) < most


@pytest.mark.parametrize("heads", (4, 2))
def test_slopes_of_positions(heads: int) -> None:
    """The bias of ALiBi: what each head adds for each key grows with its position."""
    slopes = 2.0 ** -np.arange(1, HEADS + 1)[:, None]
    ids = "i = Shape (m) n = Slice (i, two, three) z = Constant <value_ints = [0]> () s = Squeeze (n, z) "
    ids += "o = Constant <value_int = 1> () p = Constant <value_int = 0> () t = Range (p, s, o) "
    ids += "u = Constant <value_ints = [0, 1]> () w = Unsqueeze (t, u) "
    sum_ = "f = Cast <to = 1> (w) g = Mul (slopes, f) x = Constant <value_ints = [2]> () h = Unsqueeze (g, x) "
    constants = {"slopes": slopes, "two": np.array([2]), "three": np.array([3])}
    feeds = case(heads)
    done = attended(feeds, f"{ids}{sum_} b = Where (m, nought, far) c = Add (h, b) c", constants)
    if heads < HEADS:
        assert any("depends on positions" in skip.reason for skip in done.skips)
        return
    assert not done.skips and not done.inside()
    assert done.error(feeds) <= 0.03
    flat = attended(feeds, "b = Where (m, nought, far) b")
    assert np.abs(flat.run(feeds)[1][0] - done.run(feeds)[1][0]).max() > 0.1  # the slopes count


@pytest.mark.parametrize("heads", (4, 2))
def test_a_constant_bias_of_each_head(heads: int) -> None:
    feeds = case(heads)
    bias = drawn(1, HEADS, LENGTH, LENGTH, reach=3.0, seed=9)
    bias[:, :, np.triu(np.ones((LENGTH, LENGTH), bool), 1)] = FAR
    if heads < HEADS:  # a mask for each head is refused there, a bias with the same flags is not
        done = attended(
            feeds, "mask = Where (m, nought, far) b = Add (mask, bias) b", {"bias": np.where(bias < -9, 0, bias)}
        )
    else:
        done = attended(feeds, "bias", {"bias": bias})
    assert not done.skips and not done.inside()
    assert done.error(feeds) <= 2.0 / 127 + 0.03


@pytest.mark.parametrize("reach", (4.0, 4.5, 5.0, 5.6))
def test_heads_of_very_different_sizes(reach: float) -> None:
    """The periods of all heads share one lift: none may leave its 16 bits."""
    feeds = case(reach=reach, seed=3)
    feeds["v"] = case()["v"]
    for ratio in (3.0, 5.8, 30.0, 1000.0):
        uneven = feeds | {"q": feeds["q"] / np.array([1, ratio, ratio, ratio], np.float32)[:, None, None]}
        before, after = (outputs[0] for outputs in attended(uneven, "zero").run(uneven))
        assert np.abs(before - after)[:, 1:].max() <= 0.02, ratio


@pytest.mark.parametrize("reach", (1e-3, 0.02, 0.1, 6.0))
def test_scores_that_are_nearly_all_alike_or_steep(reach: float) -> None:
    feeds = case(reach=reach)
    feeds["v"] = case()["v"]
    done = attended(feeds, "zero")
    before, after = (outputs[0] for outputs in done.run(feeds))
    assert np.abs(before - after).max() <= 2.0 / 127 + 0.05 * min(reach, 1) + 0.15 * (reach > 1)


def test_values_wider_than_keys_in_groups() -> None:
    text = """g (float[B, 4, S, 8] q, float[B, 2, S, 8] k, float[B, 2, S, 12] v) => (float[B, 4, S, 12] y) {
        a = qcompile.GroupedAttention <scale = 0.3, groups = 2> (q, k, v, zero) y = Neg (a) }"""
    feeds = {"q": drawn(2, 4, 5, 8), "k": drawn(2, 2, 5, 8, seed=1), "v": drawn(2, 2, 5, 12, seed=2)}
    done = converted(text, {"zero": np.zeros((1, 1, 1, 1))}, [feeds])
    assert not done.skips
    assert done.error(feeds) <= 4 / 127 + 0.1


@pytest.mark.parametrize("shape", ((LENGTH, LENGTH), (1, LENGTH, LENGTH), (1, 1, LENGTH, LENGTH)))
@pytest.mark.parametrize("heads", (4, 2))
def test_masks_of_fewer_axes(heads: int, shape: tuple[int, ...]) -> None:
    feeds = case(heads)
    mask = np.triu(np.full((LENGTH, LENGTH), FAR), 1).reshape(shape)
    done = attended(feeds, "mask", {"mask": mask})
    assert not done.skips
    assert done.error(feeds) <= 2.0 / 127 + 0.03


@pytest.mark.parametrize(
    ("mask", "constants", "reason"),
    [
        ("f = Cast <to = 1> (m) f", {}, "Cast is in the way to the mask's flags"),
        ("b = Where (m, nought, near) b", {"near": np.float32(-2)}, "neither 0 nor far below it"),
    ],
)
def test_masks_that_keep_it_in_floats(mask: str, constants: dict[str, Array], reason: str) -> None:
    feeds = case()
    done = attended(feeds, mask, constants)
    assert any(reason in skip.reason for skip in done.skips)
    assert done.error(feeds) <= 1e-4


def test_a_mask_for_each_head_of_a_group_keeps_it_in_floats() -> None:
    feeds = case(2)
    mask = np.zeros((1, HEADS, 1, LENGTH), np.float32)
    mask[:, 1, :, 3] = FAR
    done = attended(feeds, "mask", {"mask": mask})
    assert any("each head has a mask of its own" in skip.reason for skip in done.skips)
