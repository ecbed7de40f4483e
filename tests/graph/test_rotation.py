"""Rotations keep the function: on every architecture where they fold, and refused with a reason where not."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qcompile.graph.fold import fold
from qcompile.graph.functions import is_op
from qcompile.graph.linears import find_linears
from qcompile.graph.residual import find_streams
from qcompile.graph.rotation import (
    balancing_matrix,
    blocked_rotation,
    hadamard,
    insert_rotation,
    power_of_two_in,
    random_rotation,
    rotate_streams,
    rotate_values,
)
from qcompile.graph.sites import find_sites
from qcompile.graph.workspace import Workspace
from qcompile.models.architectures import ARCHITECTURES
from tests.graph.models import Library, difference, operators, session
from tests.graph.small import fold_all, random_transform

TOLERANCE = 1e-5
POST_LN = ("bert", "roberta", "distilbert", "opt_post_ln")


@pytest.mark.parametrize("name", sorted(set(ARCHITECTURES) - {*POST_LN, "bloom"}))
def test_a_rotated_stream_computes_the_same(name: str, library: Library, workspace: Workspace) -> None:
    canonical = library.architecture(name)
    model = canonical.load(workspace)
    streams = find_streams(model)
    assert streams and not any(stream.reason for stream in streams)
    rotate_streams(model, streams, random_rotation(64, np.random.default_rng(3)), workspace)
    assert difference(session(canonical.path), session(workspace.save(model, "rotated"))) <= TOLERANCE


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_turned_values_and_inputs_compute_the_same(name: str, library: Library, workspace: Workspace) -> None:
    canonical = library.architecture(name)
    model = canonical.load(workspace)
    random = np.random.default_rng(4)
    sites = [s for s in find_sites(model) if s.kind == "v_o" and not s.reason]
    for site in sites:
        assert site.heads is not None
        heads, d = site.heads[0].shape
        stretch = random.uniform(0.5, 2.0, d)
        rotate_values(model, site, np.stack([stretch * random_rotation(d, random) for _ in range(heads)]), workspace)
    downs = [s for s in find_sites(model) if s.kind == "up_down" and not s.linears[0].chosen]
    for site in downs:
        insert_rotation(model, site.linears[0], hadamard(32), workspace)
    assert sites and (downs or name == "mixtral")
    assert difference(session(canonical.path), session(workspace.save(model, "turned"))) <= TOLERANCE


@pytest.mark.parametrize("name", POST_LN)
def test_a_post_ln_stream_is_refused(name: str, library: Library, workspace: Workspace) -> None:
    streams = find_streams(library.architecture(name).load(workspace))
    assert streams and all("(post-LN)" in stream.reason and stream.node is not None for stream in streams)


def test_a_post_ln_stream_is_named_so_behind_a_fold(library: Library, workspace: Workspace) -> None:
    model = library.architecture("bert").load(workspace)
    assert fold_all(model, workspace, ("norm",))
    assert all("(post-LN)" in stream.reason for stream in find_streams(model))


def test_a_norm_of_the_embeddings_is_named_so(library: Library, workspace: Workspace) -> None:
    (stream,) = find_streams(library.architecture("bloom").load(workspace))
    assert "a norm with a gain writes it (behind the embeddings)" in stream.reason


@pytest.mark.parametrize("name", ["falcon", "gemma", "opt"])
def test_a_stream_rotates_after_a_fold_for_its_tied_head(name: str, library: Library, workspace: Workspace) -> None:
    """The fold divides what the embedding looks up; the table takes that in when the head gets its own."""
    canonical = library.architecture(name)
    model = canonical.load(workspace)
    (site,) = (one for one in find_sites(model) if one.kind == "norm" and one.linears[0].transposed)
    scale, shift = random_transform(site, 6)
    fold(model, site, scale, shift if name != "gemma" else np.zeros_like(shift), workspace)
    before = operators(model)
    (stream,) = find_streams(model)
    assert not stream.reason and len(stream.scaled) == 1
    rotate_streams(model, [stream], random_rotation(64, np.random.default_rng(3)), workspace)
    assert operators(model)["Mul"] == before["Mul"] - 1
    assert difference(session(canonical.path), session(workspace.save(model, "rotated"))) <= TOLERANCE


def test_layer_norms_become_rms_norms(library: Library, workspace: Workspace) -> None:
    """ViT: a patch convolution, a class token and positions write the stream; the mean goes off all of them."""
    model = library.architecture("vit").load(workspace)
    (stream,) = find_streams(model)
    assert (len(stream.patches), len(stream.constants), len(stream.linears), stream.centred) == (1, 2, 4, True)
    rotate_streams(model, [stream], random_rotation(64, np.random.default_rng(3)), workspace)
    count = operators(model)
    assert "LayerNormalization" not in count and count["RMSNormalization"] == 5
    (again,) = find_streams(model)
    assert not again.reason and not again.centred


def test_a_tied_head_gets_a_table_of_its_own(library: Library, workspace: Workspace) -> None:
    """T5's encoder and decoder look up one table, which is turned once; the head alone is copied."""
    model = library.architecture("t5").load(workspace)
    assert rotate_streams(model, find_streams(model), random_rotation(64, np.random.default_rng(3)), workspace) == 1
    lookups = {id(node.inputs[0]) for node in model.graph if is_op(node, "Gather") and _is_table(node)}
    assert len(lookups) == 1
    assert not any(linear.transposed for linear in find_linears(model.graph))


def _is_table(node: ir.Node) -> bool:
    table = node.inputs[0]
    return table is not None and table.shape is not None and list(table.shape) == [256, 64]


@pytest.mark.parametrize("size", [1, 2, 9, 64, 96, 576])
def test_a_random_rotation_is_orthogonal_and_repeatable(size: int) -> None:
    first, second = (random_rotation(size, np.random.default_rng(7)) for _ in range(2))
    assert np.allclose(first @ first.T, np.eye(size), rtol=0, atol=1e-12)
    assert np.array_equal(first, second)
    assert np.abs(first).max() < 0.5 or size < 64


def test_the_power_of_two_in_a_size() -> None:
    assert [power_of_two_in(n) for n in (1, 2, 9, 576, 1536, 11008)] == [1, 2, 1, 64, 512, 256]


def test_a_blocked_rotation_mixes_neighbours_in_the_order_alone() -> None:
    order = np.random.default_rng(1).permutation(20)
    rotation = blocked_rotation(order, 8, np.random.default_rng(7))
    assert np.allclose(rotation @ rotation.T, np.eye(20), rtol=0, atol=1e-12)
    for start, stop in ((0, 8), (8, 16), (16, 20)):
        inside = np.isin(np.arange(20), order[start:stop])
        assert (rotation[inside, start:stop] != 0).all() and (rotation[~inside, start:stop] == 0).all()


def test_a_balancing_matrix_leaves_the_least_product() -> None:
    """|x T|^2 |T^-1 W|^2 has no smaller value: (trace of (H^1/2 M H^1/2)^1/2)^2."""
    random = np.random.default_rng(5)
    x, w = random.standard_normal((64, 8)) * np.geomspace(1, 30, 8), random.standard_normal((8, 64))
    h, m = x.T @ x / 64, w @ w.T / 64
    turn = balancing_matrix(h, m, random)
    back = np.linalg.inv(turn)
    inputs, weights = turn.T @ h @ turn, back @ m @ back.T
    least = np.sqrt(np.linalg.eigvals(h @ m).real).sum() ** 2
    assert np.trace(h) * np.trace(m) > 2 * least
    assert np.trace(inputs) * np.trace(weights) < 1.02 * least  # but for the damping
    assert np.allclose(np.diag(inputs), np.diag(inputs).mean(), rtol=0.05, atol=0)  # and evenly spread
