"""Formats: what may be said, and the names that stand for them."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from qcompile.quant.schemes import OBSERVERS, ActivationScheme, Observer, WeightScheme, parse_name


@pytest.mark.parametrize(
    ("name", "weights", "activations"),
    [
        ("w8a8_static", (8, "per_channel", None, True), (8, "per_tensor")),
        ("w8a8", (8, "per_channel", None, True), (8, "per_token")),
        ("w6a6_static", (6, "per_channel", None, True), (6, "per_tensor")),
        ("w4a4", (4, "per_channel", None, True), (4, "per_token")),
        ("w8a16", (8, "per_channel", None, True), None),
        ("w4a16", (4, "per_channel", None, False), None),
        ("w4a16_g128", (4, "group", 128, False), None),
        ("w2a16_g64", (2, "group", 64, False), None),
        ("w4a8_static_g64", (4, "group", 64, True), (8, "per_tensor")),
    ],
)
def test_names_mean_what_the_interface_says(
    name: str, weights: tuple[int, str, int | None, bool], activations: tuple[int, str] | None
) -> None:
    parsed = parse_name(name)
    assert parsed is not None
    w, a = parsed
    assert (w.bits, w.granularity, w.group_size, w.symmetric) == weights
    assert (None if a is None else (a.bits, a.granularity)) == activations


@pytest.mark.parametrize(
    "name", ("", "w8", "w9a8", "w1a8", "w8a9", "w8a1", "w4a16_static", "w4a16_g4", "w8a8_statik", "xw8a8")
)
def test_other_names_are_none(name: str) -> None:
    assert parse_name(name) is None


@pytest.mark.parametrize(
    "fields",
    (
        {"bits": 9},
        {"bits": 1},
        {"bits": 4, "granularity": "group"},
        {"bits": 4, "group_size": 32},
        {"bits": 4, "granularity": "group", "group_size": 4},
        {"bits": 4, "granulrity": "group"},
    ),
)
def test_weights_that_make_no_sense_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        WeightScheme(**fields)


@pytest.mark.parametrize(
    "fields",
    ({"bits": 8, "observer": "entropy"}, {"bits": 8, "groups": 0}, {"bits": 8, "outlier_threshold": 0}),
)
def test_activations_that_make_no_sense_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ActivationScheme(**fields)


def test_every_observer_is_described() -> None:
    assert set(OBSERVERS) == set(Observer.__args__)  # type: ignore[attr-defined]


def test_schemes_are_written_out_for_reports() -> None:
    assert (
        str(WeightScheme(bits=4, granularity="group", group_size=64, symmetric=False))
        == "int4 g64 asymmetric"
    )
    assert str(WeightScheme(bits=8)) == "int8 per_channel symmetric"
    assert str(ActivationScheme(bits=8)) == "uint8 per_tensor asymmetric static token_wise"
    assert str(ActivationScheme(bits=6, granularity="per_token")) == "uint6 per_token asymmetric dynamic"


def test_only_one_scale_for_the_whole_tensor_is_plain() -> None:
    assert ActivationScheme(bits=8).plain
    assert not ActivationScheme(bits=8, granularity="per_token").plain
    assert not ActivationScheme(bits=8, granularity="channel_group").plain
    assert not ActivationScheme(bits=8, outlier_threshold=6.0).plain
