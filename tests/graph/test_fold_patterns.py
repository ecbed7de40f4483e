"""Each fold pattern alone, and the oracles T1 to T18 of the method that concern folds."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qcompile.errors import UserError
from qcompile.graph.edits import constant_array
from qcompile.graph.fold import compensate, fold, insert
from qcompile.graph.sites import find_linears, find_sites
from qcompile.graph.workspace import Workspace
from tests.graph.models import Library, difference, operators, session
from tests.graph.small import (
    PATTERNS,
    TOLERANCE,
    WIDTH,
    WRONG,
    Y,
    held_pattern,
    random_transform,
    small,
    vector,
    weight,
)

# --------------------------------------------------------------------------- the patterns, small


@pytest.mark.parametrize("name", PATTERNS)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10_000))
def test_each_pattern(name: str, seed: int, tmp_path: Path) -> None:
    """T1: with and without biases, random s and z."""
    kind, body, weights = PATTERNS[name]
    with Workspace(tmp_path) as workspace:
        held = small(body, tmp_path, workspace, **weights)
        site = held.site(kind)
        fold(held.model, site, *random_transform(site, seed), workspace)
        assert held.error() <= TOLERANCE


def test_bias_takes_the_unscaled_weight(tmp_path: Path, workspace: Workspace) -> None:
    """b' = b + z W with W before it is scaled; W' = diag(s) W."""
    held = held_pattern("a_layer_norm", tmp_path, workspace)
    linear = find_linears(held.model.graph)[0]
    w, b = linear.w.copy(), np.array(linear.bias)
    s, z = np.linspace(0.5, 2, WIDTH), np.linspace(-1, 1, WIDTH)
    compensate(held.model, linear, s, z, workspace)
    np.testing.assert_allclose(linear.w, w * s[:, None], rtol=1e-6)
    np.testing.assert_allclose(np.asarray(linear.bias), b + z @ w, rtol=1e-5)


def test_shift_centres_every_channel(tmp_path: Path, workspace: Workspace) -> None:
    """T2: with z the centre, each channel has max = -min, and the range is that of the widest channel."""
    held = held_pattern("a_layer_norm", tmp_path, workspace)
    site = held.site("norm")
    held.model.graph.outputs.append(site.tensor)
    x = np.random.default_rng(1).normal(size=(4, 6, WIDTH)).astype(np.float32)
    before = session(workspace.save(held.model, "n")).run(None, {"x": x})[1].reshape(-1, WIDTH)
    held.model.graph.outputs.pop()
    low, high = before.min(0), before.max(0)
    fold(held.model, site, np.ones(WIDTH), (low + high) / 2, workspace)
    held.model.graph.outputs.append(site.tensor)
    after = session(workspace.save(held.model, "m")).run(None, {"x": x})[1].reshape(-1, WIDTH)
    np.testing.assert_allclose(after.max(0), -after.min(0), atol=1e-5)
    assert after.max() == pytest.approx((high - low).max() / 2, abs=1e-5)


def test_residual_gets_one_multiply_and_one_add(tmp_path: Path, workspace: Workspace) -> None:
    """T7: the branch beside the linears reads x~ s + z."""
    held = held_pattern("c_post_ln_residual", tmp_path, workspace)
    site = held.site("norm")
    before = operators(held.model)
    assert fold(held.model, site, *random_transform(site, 1), workspace) == 2
    after = operators(held.model)
    assert after["Mul"] == before.get("Mul", 0) + 1
    assert after["Add"] == before["Add"] + 2  # and the bias that the linear lacked


def test_tiled_heads_are_wrong(library: Library, workspace: Workspace) -> None:
    """T8: grouped value heads repeat as 0 0 1 1."""
    canonical = library.architecture("llama")
    model = canonical.load(workspace)
    site = next(site for site in find_sites(model) if site.kind == "v_o")
    tiled = np.tile(np.arange(32), 2)
    fold(model, dataclasses.replace(site, expand=tiled), *random_transform(site, 1), workspace)
    assert difference(session(canonical.path), session(workspace.save(model, "tiled"))) > WRONG


def test_untied_rotary_channels_are_refused_and_wrong(library: Library, workspace: Workspace) -> None:
    """T9: a rotation mixes channels i and i + d/2, so their scale is one."""
    canonical = library.architecture("llama")
    model = canonical.load(workspace)
    site = next(site for site in find_sites(model) if site.kind == "q_k")
    scale = np.linspace(0.5, 2, site.channels)
    with pytest.raises(UserError, match="mixes need one scale"):
        fold(model, site, scale, np.zeros(site.channels), workspace)
    fold(model, dataclasses.replace(site, ties=None), scale, np.zeros(site.channels), workspace)
    assert difference(session(canonical.path), session(workspace.save(model, "untied"))) > WRONG


SHARED = (
    f"{Y} {{ n = LayerNormalization (x, g, h) m = MatMul (n, w) a = Add (m, c) r = Relu (a)"
    " o = LayerNormalization (r, g, h) p = MatMul (o, w) d = Add (p, c) y = Relu (d) }"
)


def test_shared_constants_are_cloned(tmp_path: Path, workspace: Workspace) -> None:
    """T10: two norms with one gamma, two linears with one weight and one bias."""
    weights = {"g": vector(1), "h": vector(2), "w": weight(3), "c": vector(4)}
    held = small(SHARED, tmp_path, workspace, **weights)
    first, second = (site for site in find_sites(held.model) if site.kind == "norm")
    fold(held.model, first, *random_transform(first, 1), workspace)
    assert held.error() <= TOLERANCE
    untouched = [constant_array(second.producer.inputs[i]) for i in (1, 2)]
    np.testing.assert_array_equal(untouched, [weights["g"], weights["h"]])
    np.testing.assert_array_equal(second.linears[0].w, weights["w"])
    np.testing.assert_array_equal(second.linears[0].bias, weights["c"])


EXTRA = {
    "another operator": f"{Y} {{ n = LayerNormalization (x, g, h) t = Tanh (n)"
    " m = MatMul (n, w) y = Add (m, t) }",
    "an output of the graph": "=> (float[b, s, 8] y, float[b, s, 8] n)"
    " { n = LayerNormalization (x, g, h) m = MatMul (n, w) y = Relu (m) }",
    "a view that mixes channels": "=> (float[b, s, 8] y, float[b, t, 4] v)"
    " { n = LayerNormalization (x, g, h) v1 = Reshape (n, half) v = Relu (v1)"
    " m = MatMul (n, w) y = Relu (m) }",
}


@pytest.mark.parametrize("what", EXTRA)
@pytest.mark.parametrize("mode", [fold, insert])
def test_extra_readers_see_what_they_saw(mode: Any, what: str, tmp_path: Path, workspace: Workspace) -> None:
    """T16."""
    weights = {"g": vector(1), "h": vector(2), "w": weight(3)}
    if "half" in EXTRA[what]:
        weights["half"] = np.array([0, -1, 4])
    held = small(EXTRA[what], tmp_path, workspace, **weights)
    names = [output.name for output in held.model.graph.outputs]
    site = held.site("norm")
    assert mode(held.model, site, *random_transform(site, 3), workspace) == 2
    assert held.error() <= TOLERANCE
    assert [output.name for output in held.model.graph.outputs] == names


def test_every_reader_of_a_mixture_is_compensated(library: Library, workspace: Workspace) -> None:
    """T17: leaving out the router, or the experts, is wrong; a shift is refused."""
    canonical = library.architecture("mixtral")
    before = session(canonical.path)
    for left_out in ({"linears": ()}, {"experts": ()}):
        model = canonical.load(workspace)
        site = next(site for site in find_sites(model) if site.experts)
        scale, shift = random_transform(site, 1)
        fold(model, dataclasses.replace(site, **left_out), scale, shift, workspace)  # type: ignore[arg-type]
        assert difference(before, session(workspace.save(model, "partly"))) > WRONG, left_out
    with pytest.raises(UserError, match="a bias for each expert"):
        fold(model, site, scale, shift + 1, workspace)


SPELLINGS = {
    "MatMul of rank 3": "m = MatMul (n, w) y1 = Add (m, c)",
    "bias first": "m = MatMul (n, w) y1 = Add (c, m)",
    "transposed table": "t = Transpose <perm = [1, 0]> (v) m = MatMul (n, t) y1 = Add (m, c)",
    "Gemm": "f = Reshape (n, flat) m = Gemm (f, w, c) y1 = Reshape (m, whole)",
    "Gemm transB": "f = Reshape (n, flat) m = Gemm <transB = 1> (f, v, c) y1 = Reshape (m, whole)",
    "Gemm alpha beta": "f = Reshape (n, flat) m = Gemm <alpha = 0.5, beta = 2.0> (f, w, c)"
    " y1 = Reshape (m, whole)",
    "MatMul of rank 2": "f = Reshape (n, flat) m = MatMul (f, w) k = Add (m, c) y1 = Reshape (k, whole)",
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings_of_a_linear(name: str, tmp_path: Path, workspace: Workspace) -> None:
    """T18."""
    text = SPELLINGS[name]
    body = f"{Y} {{ n = LayerNormalization (x, g, h) {text} y = Relu (y1) }}"
    shapes = {"flat": np.array([-1, 8]), "whole": np.array([2, 6, 8])}
    weights = {"g": vector(1), "h": vector(2), "c": vector(4)}
    weights |= {name: weight(3) for name in "wv" if f", {name}" in text or f"({name})" in text}
    weights |= {name: value for name, value in shapes.items() if name in text}
    held = small(body, tmp_path, workspace, **weights)
    site = held.site("norm")
    assert site.linears[0].add is not None
    fold(held.model, site, *random_transform(site, 3), workspace)
    assert held.error() <= TOLERANCE
