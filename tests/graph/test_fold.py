"""Folds keep the function: on every architecture, each pattern alone, and where other tools break."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from qcompile.errors import ContractError, UserError
from qcompile.graph.edits import constant_array, is_tied
from qcompile.graph.fold import fold, insert
from qcompile.graph.sites import describe, find_sites
from qcompile.graph.workspace import Workspace
from qcompile.models.architectures import ARCHITECTURES
from qcompile.models.fused import FUSED
from tests.graph.models import Library, canonicalised, difference, operators, relative_error, session, spelled
from tests.graph.small import (
    KINDS,
    PATTERNS,
    TOLERANCE,
    WIDTH,
    fold_all,
    held_pattern,
    random_transform,
    vector,
    weight,
)

# --------------------------------------------------------------------------- architectures


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_folds_of_an_architecture(name: str, library: Library, workspace: Workspace) -> None:
    """All sites at once, then each kind alone (T1, T7, T8, T9, T14, T17 on real graphs)."""
    canonical = library.architecture(name)
    before = session(canonical.path)
    for kinds in (KINDS, *((kind,) for kind in KINDS)):
        model = canonical.load(workspace)
        if fold_all(model, workspace, kinds):
            error = difference(before, session(workspace.save(model, "-".join(kinds))))
            assert error <= TOLERANCE, kinds


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_powers_of_two_fold_without_any_error(name: str, library: Library, workspace: Workspace) -> None:
    """Such scales round nothing, so every other difference would be a mistake of the algebra."""
    canonical = library.architecture(name)
    model = canonical.load(workspace)
    for number, site in enumerate(site for site in find_sites(model) if not site.reason):
        scale, _ = random_transform(site, number)
        fold(model, site, 2 ** np.round(np.log2(scale)), np.zeros(site.channels), workspace)
    assert difference(session(canonical.path), session(workspace.save(model, "exact"))) == 0


@pytest.mark.parametrize("name", FUSED)
def test_folds_of_files_with_fused_operators(name: str, library: Library, workspace: Workspace) -> None:
    canonical = library.fused(name)
    model = canonical.load(workspace)
    assert fold_all(model, workspace, KINDS, seed=7) >= 8
    assert difference(session(canonical.path), session(workspace.save(model, "folded"))) <= TOLERANCE


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5"])
def test_inserted_instead_of_folded(name: str, library: Library, workspace: Workspace) -> None:
    """Every site but q_k, those that cannot be folded (GELU) included."""
    canonical = library.architecture(name)
    model = canonical.load(workspace)
    nodes, added = len(model.graph), 0
    for number, site in enumerate(find_sites(model)):
        readers = {id(linear.x) for linear in site.linears}
        if site.kind != "q_k" and len(readers) == 1:
            scale, _ = random_transform(dataclasses.replace(site, ties=None), number)
            shift = np.linspace(-0.5, 0.5, scale.size)
            added += insert(model, site, scale, shift, workspace)
    biases = len(model.graph) - nodes - added  # a shift needs a bias
    assert biases >= 0
    error = difference(session(canonical.path), session(workspace.save(model, "inserted")))
    assert error <= TOLERANCE


def test_layer_norms_that_feed_only_linears_need_no_node(library: Library, workspace: Workspace) -> None:
    """But a tied head: what its table looks up is divided again, and the shift gives it a bias."""
    model = library.architecture("gpt2").load(workspace)
    before = operators(model)
    fold_all(model, workspace, ("norm",))
    assert operators(model) == before | {"Mul": before["Mul"] + 1, "Add": before["Add"] + 1}


def test_a_tied_head_and_its_embedding_keep_one_table(library: Library, workspace: Workspace) -> None:
    canonical = library.architecture("gpt2")
    model = canonical.load(workspace)
    (site,) = (site for site in find_sites(model) if site.linears[0].is_head)
    table = site.linears[0].weight
    before = np.array(constant_array(table))
    fold(model, site, np.linspace(0.5, 2, site.channels), np.zeros(site.channels), workspace)
    after = constant_array(table)
    assert is_tied(table) and after is not None and not np.array_equal(before, after)
    assert difference(session(canonical.path), session(workspace.save(model, "tied"))) <= TOLERANCE


# --------------------------------------------------------------------------- more that breaks tools


def test_gain_stored_as_weight_minus_one(tmp_path: Path, workspace: Workspace) -> None:
    """Gemma: the gain 1 + weight is still an Add of constants when it is wide."""
    body = PATTERNS["b_rms_norm"][1].replace("n = Mul (d, g)", "k = Add (g, one) n = Mul (d, k)")
    body = body.replace("[b, s, 8]", "[b, s, 2048]")
    weights = dict(PATTERNS["b_rms_norm"][2])
    weights |= {"g": vector(1, 2048) - 1, "w": weight(3, 2048, 2048), "one": np.array(1, np.float32)}
    source = spelled(tmp_path / "m.onnx", f"g (float[b, s, 2048] x) {body}", weights)
    model = canonicalised(source, workspace)[0]
    site = next(site for site in find_sites(model) if site.kind == "norm")
    gain = np.asarray(constant_array(site.producer.inputs[1]))
    np.testing.assert_allclose(gain, weights["g"] + 1, rtol=1e-6)
    fold(model, site, *random_transform(site, 1), workspace)
    x = np.random.default_rng(0).normal(size=(1, 3, 2048)).astype(np.float32)
    assert relative_error(session(source), session(workspace.save(model, "a")), {"x": x}) <= TOLERANCE


def test_shift_after_an_rms_norm_is_one_add(tmp_path: Path, workspace: Workspace) -> None:
    held = held_pattern("b_rms_norm", tmp_path, workspace)
    before = operators(held.model)
    site = held.site("norm")
    assert fold(held.model, site, np.ones(WIDTH), np.ones(WIDTH), workspace) == 1
    assert operators(held.model)["Add"] == before.get("Add", 0) + 2  # the shift, and the bias
    assert held.error() <= TOLERANCE


@pytest.mark.parametrize("kind", ["up_down", "q_k"])
def test_only_attention_and_norms_shift(kind: str, library: Library, workspace: Workspace) -> None:
    model = library.architecture("llama").load(workspace)
    site = next(site for site in find_sites(model) if site.kind == kind)
    with pytest.raises(UserError, match=r"only attention|only be scaled"):
        fold(model, site, np.ones(site.channels), np.ones(site.channels), workspace)


def test_a_site_with_a_reason_is_refused(library: Library, workspace: Workspace) -> None:
    model = library.architecture("bert").load(workspace)
    site = next(site for site in find_sites(model) if site.reason)
    with pytest.raises(ContractError, match="does not commute"):
        fold(model, site, np.ones(site.channels), np.zeros(site.channels), workspace)


def test_a_weight_that_overflows_is_refused(tmp_path: Path, workspace: Workspace) -> None:
    held = held_pattern("a_layer_norm", tmp_path, workspace)
    with pytest.raises(UserError, match="non-finite"):
        fold(held.model, held.site("norm"), np.full(WIDTH, 1e39), np.zeros(WIDTH), workspace)


def test_sites_survive_a_fold(library: Library, workspace: Workspace) -> None:
    """A second round of folds finds the same sites, with the biases that the first has made."""
    canonical = library.architecture("qwen3")
    model = canonical.load(workspace)
    before = [describe(site) for site in find_sites(model) if site.kind != "norm"]
    fold_all(model, workspace, KINDS)
    assert [describe(site) for site in find_sites(model) if site.kind != "norm"] == before
    fold_all(model, workspace, ("v_o", "up_down"), seed=50)
    assert difference(session(canonical.path), session(workspace.save(model, "twice"))) <= TOLERANCE
