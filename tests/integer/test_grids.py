"""Which values share a grid, how fine it is, and what limits it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompile.integer.grids import CACHE_BITS, HEADROOM, NARROW_BITS, WIDE_BITS, Grids, find_grids
from tests.integer.graphs import context, drawn, parsed

X, Z = drawn(2, 3, 16, reach=4.0), drawn(2, 3, 16, reach=100.0)
PORTS = "g (float[B, S, 16] x, float[B, S, 16] z) => (float[B, S, 16] y)"


def grids(text: str, constants: dict[str, object] | None = None) -> Grids:
    model: ir.Model = parsed(text, constants)
    known = {str(port.name) for port in model.graph.inputs}
    feeds = {name: array for name, array in (("x", X), ("z", Z)) if name in known}
    with context([feeds]) as ctx:
        return find_grids(ctx, model)


def test_values_that_are_added_joined_or_moved_share_a_grid_where_they_are_alike() -> None:
    found = grids(
        PORTS
        + """ { s = Add (x, z) t = Transpose <perm = [0, 2, 1]> (s) u = Transpose <perm = [0, 2, 1]> (t)
        n = Neg (u) c = Clip (n) j = Concat <axis = 1> (c, z) y = Neg (j) }"""
    )
    assert {found.places[name] for name in "stuncjyz"} == {found.places["z"]}
    assert found.places["x"] > found.places["z"] + 3  # 25 times smaller
    assert all(found.bound(name) == 2**WIDE_BITS for name in found.places)


def test_a_product_has_a_grid_of_its_own() -> None:
    found = grids(PORTS + " { y = Mul (x, z) }")
    assert found.places["x"] - found.places["z"] in (4, 5)  # 100 / 4
    assert found.places["y"] < found.places["z"]


def test_calibration_has_its_headroom_and_no_more_than_twice_that() -> None:
    found = grids(PORTS + " { y = Mul (x, z) }")
    for name, reach in (("x", 4.0), ("z", 100.0)):
        assert reach * HEADROOM <= 2.0 ** (WIDE_BITS - found.places[name]) <= 2 * reach * HEADROOM


def test_a_mask_among_scores_leaves_them_a_grid_that_tells_them_apart() -> None:
    text = "g (float[B, S, 16] x) => (float[B, S, 16] y) { w = Where (seen, x, far) y = Add (w, x) }"
    found = grids(text, {"seen": np.arange(16) % 2 == 0, "far": np.finfo(np.float32).min})
    assert found.places["w"] == found.places["x"] == WIDE_BITS - 18  # 2^16 with headroom
    assert found.extremes["w"][0] == -(2.0**16)


def test_who_reads_a_value_limits_its_grid() -> None:
    tiny = drawn(2, 3, 16, reach=1e-6)
    model = parsed(
        PORTS
        + """ { a = Mul (x, c) g = Gelu (a) d = Mul (x, c) l = LayerNormalization <epsilon = 0.01> (d, e)
        m = Mul (x, c) s = Add (l, g) t = Add (s, m) o = Mul (z, z) y = Add (t, o) }""",
        {"c": 1e-6, "e": tiny[0, 0]},
    )
    with context([{"x": X, "z": Z}]) as ctx:
        found = find_grids(ctx, model)
    assert found.places["d"] == (29 + 6) // 2  # epsilon in units squared is below 2^29
    alone = grids("g (float[B, S, 16] x) => (float[B, S, 16] y) { a = Mul (x, c) g = Gelu (a) y = Mul (g, g) }",
                  {"c": 1e-6})  # fmt: skip
    assert alone.places["a"] == alone.places["g"] == 24
    assert alone.places["y"] == 30


def test_what_a_rotary_embedding_reads_or_makes_is_narrow() -> None:
    text = """g (float[B, H, S, 16] x, float[B, 1, S, 16] z) => (float[B, H, S, 16] y) {
        n = Neg (x) r = qcompile.RotaryEmbedding (n, z, z) y = Mul (r, r) }"""
    model = parsed(text)
    with context([{"x": X[:, None], "z": Z[:, None] / 100}]) as ctx:
        found = find_grids(ctx, model)
    assert found.bits["n"] == found.bits["r"] == NARROW_BITS < found.bits["y"]
    assert found.bound("n") == 2**15
    assert 4.0 * 2 * 2.0 ** found.places["n"] <= 2**15 * 2**0.5


def test_a_cache_fits_float32_and_may_be_empty() -> None:
    text = """g (float[B, P, 16] z, float[B, S, 16] x) => (float[B, T, 16] c, float[B, T, 16] y) {
        c = Concat <axis = 1> (z, x) y = Mul (c, c) }"""
    model = parsed(text)
    with context([{"x": X, "z": Z[:, :0]}]) as ctx:
        found = find_grids(ctx, model)
    assert found.places["z"] == found.places["c"] == found.places["x"]
    assert found.bits["c"] == CACHE_BITS < found.bits["y"]
    assert 4.0 * HEADROOM <= 2.0 ** (CACHE_BITS - found.places["c"]) <= 2 * 4.0 * HEADROOM
    assert "z" not in found.extremes


def test_masks_weights_and_positions_have_no_grid() -> None:
    text = """g (float[B, 2, S, 8] q, bool[B, 1, 1, S] m) => (float[B, 2, S, 8] y) {
        b = Where (m, zero, far) y = qcompile.Attention <scale = 1.0> (q, q, q, b) }"""
    model = parsed(text, {"zero": 0.0, "far": -1e30})
    feeds = {"q": drawn(1, 2, 3, 8), "m": drawn(1, 1, 1, 3) > -9}
    with context([feeds]) as ctx:
        found = find_grids(ctx, model)
    assert set(found.places) == {"q", "y"}
    assert found.extremes["q"][0].shape == (2, 8) and found.extremes["y"][0].shape == ()
