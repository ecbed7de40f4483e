"""The outlier analysis finds what was planted, says what it needs, and touches nothing."""

from __future__ import annotations

import json

import numpy as np
import onnx_ir as ir
import pytest

from qcompile import manifest
from qcompile.calibration.samples import Sample
from qcompile.ledger import Entry
from qcompile.models.architectures import OUTLIER_CHANNEL, cached_export
from tests.passes.planted import Array, bench, inputs, normed, wide

WIDTH = 48


def calm(channels: int = WIDTH) -> tuple[Array, Array]:
    """gamma and beta without an outlier."""
    generator = np.random.default_rng(7)
    return generator.uniform(0.8, 1.2, channels), generator.normal(0, 0.1, channels)


def analysed(model: ir.Model, samples: list[Sample]) -> Entry:
    """The pass's entry; the graph is the same before and after."""
    with bench(model, samples) as found:
        before = contents(found.model)
        entry = found.run("outliers")
        assert contents(found.model) == before
    assert entry.rewrites == 0
    return entry


def contents(model: ir.Model) -> list[object]:
    """The nodes with their wiring, and the bytes of every constant."""
    nodes = [(n.op_type, [v.name for v in n.inputs if v], [v.name for v in n.outputs]) for n in model.graph]
    held = model.graph.initializers.items()
    return [*nodes, *((name, v.const_value.tobytes()) for name, v in held if v.const_value is not None)]


def verdicts(entry: Entry) -> dict[str, str]:
    return {site["site"]: site["needs"] for site in entry.sites}


def test_ordinary_activations_need_nothing() -> None:
    entry = analysed(normed(*calm()), inputs(channels=WIDTH))
    assert verdicts(entry) == {"norm:norm": "per tensor"}
    assert not entry.facts["outliers"]["persistent"]


@pytest.mark.parametrize(
    ("gain", "offset", "expected"),
    [(1.0, 40.0, "shift"), (12.0, 0.0, "scale"), (10.0, -60.0, "shift + scale")],
)
def test_an_outlier_channel_is_named_with_what_it_needs(gain: float, offset: float, expected: str) -> None:
    gamma, beta = calm()
    gamma[5], beta[5] = gain, offset
    entry = analysed(normed(gamma, beta), inputs(channels=WIDTH))
    assert verdicts(entry) == {"norm:norm": expected}
    site = entry.facts["outliers"]["sites"]["norm:norm"]
    largest = site["top_channels"][0]
    assert largest["channel"] == 5 and not largest["first_token_only"] and largest["sequences"] == 1.0
    assert (largest["asymmetry"] > 1) == (offset != 0) and (largest["sign_consistency"] == 1) == (offset != 0)
    assert largest["half_range"] == pytest.approx((largest["hi"] - largest["lo"]) / 2)
    assert site["outlier_channels"] == 1 and site["energy_of_top_channels"] > 0.5
    assert [c["channel"] for c in entry.facts["outliers"]["persistent"]] == [5]
    assert [c["channel"] for c in entry.facts["outliers"]["features"]] == [5]
    assert entry.notes[0].endswith("or more: 5 (100%)")


def test_an_outlier_that_gamma_makes_is_told_from_one_of_the_residual() -> None:
    gamma, beta = calm()
    gamma[5] = 12.0
    site = analysed(normed(gamma, beta), inputs(channels=WIDTH)).facts["outliers"]["sites"]["norm:norm"]
    assert site["gamma_correlation"] > 0.9 and site["absmax_without_gamma"] < 5


def first_token_samples(where: int) -> list[Sample]:
    """The token ``where`` of each sequence drives unit 3 of ``up`` to hundreds."""
    samples = inputs(4, 128, 16)
    for sample in samples:
        sample.feeds["x"][..., 0] *= 0.1  # elsewhere unit 3 is as small as the others
        sample.feeds["x"][0, where] = 0
        sample.feeds["x"][0, where, 0] = 100.0
    return samples


@pytest.mark.parametrize(("where", "words"), ((0, "first token"), (50, "few tokens")))
def test_a_sink_token_is_told_from_an_outlier_channel(where: int, words: str) -> None:
    generator = np.random.default_rng(0)
    up, down = generator.standard_normal((16, 32)) / 4, generator.standard_normal((32, 16)) / 6
    up[0] = 0
    up[0, 3] = 8.0
    up[1:, 3] = 0
    entry = analysed(wide("Relu", up, down), first_token_samples(where))
    assert verdicts(entry)["up_down:down"] == f"per token ({words})"
    site = entry.facts["outliers"]["sites"]["up_down:down"]
    token, channel = site["top_tokens"][0], site["top_channels"][0]
    assert (token["position"], token["channel"], token["value"]) == (where, 3, pytest.approx(800))
    assert channel["channel"] == 3 and channel["first_token_only"] == (where == 0)
    assert site["ordinary"] < 40 < 700 < site["range"]
    assert site["token_sqnr_db"]["per_tensor_8"] + 15 < site["token_sqnr_db"]["per_token_8"]
    owed = {"first token": "the first token", "few tokens": "a few tokens"}[words]
    assert f"tensors that owe most of their range to {owed}: 2" in entry.notes  # x itself and up's output


def test_a_channel_that_no_transform_reaches_needs_precision() -> None:
    generator = np.random.default_rng(0)
    up, down = generator.standard_normal((16, 32)) / 4, generator.standard_normal((32, 16)) / 6
    up[:, 7] *= 30
    entry = analysed(wide("Gelu", up, down), inputs(channels=16))
    assert verdicts(entry)["up_down:down"] == "higher precision"
    assert (
        entry.facts["outliers"]["sites"]["up_down:down"]["obstacle"] == "Gelu does not commute with a scale"
    )
    assert set(verdicts(entry)) == {"up_down:down", "linear:up"}  # every input of a linear, once


def test_padding_is_not_counted() -> None:
    plain = inputs(length=16, channels=WIDTH)
    padded = []
    for sample in plain:
        x = np.full((1, 24, WIDTH), 0.0, np.float32)
        x[:, 8:] = sample.feeds["x"]
        x[:, :8, 0] = 1e4
        padded.append(Sample({"x": x}, np.arange(24)[None] >= 8))
    one, other = (analysed(normed(*calm()), samples) for samples in (plain, padded))
    assert one.facts == other.facts and one.sites == other.sites


def test_the_facts_are_json_and_name_no_more_than_they_should() -> None:
    entry = analysed(normed(*calm()), inputs(channels=WIDTH))
    site = entry.facts["outliers"]["sites"]["norm:norm"]
    assert len(site["top_channels"]) == len(site["top_tokens"]) == 8
    assert site["channels_seen"] == WIDTH and site["tokens_seen"] == 72
    lo, hi = entry.facts["channel_ranges"]["norm:norm"]["before"]
    assert len(lo) == len(hi) == WIDTH
    assert json.loads(json.dumps(manifest.plain(entry), allow_nan=False))["name"] == "outliers"


@pytest.mark.parametrize("name", ("bert", "llama", "mixtral"))
def test_architectures_show_their_planted_channel_in_every_layer(name: str) -> None:
    with bench(cached_export(name)) as found:
        entry = found.run("outliers")
    persistent = {c["channel"]: c["share_of_layers"] for c in entry.facts["outliers"]["persistent"]}
    assert persistent[OUTLIER_CHANNEL] >= 0.75
    assert len({site["site"] for site in entry.sites}) == len(entry.sites) >= 8
