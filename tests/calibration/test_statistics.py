"""Streaming statistics against NumPy and SciPy on the whole tensor, and the verdict on hand-made figures."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from qcompile.calibration.samples import Sample
from qcompile.calibration.statistics import (
    ChannelStatistics,
    QuantizerLoss,
    Sequence,
    TokenStatistics,
    jaccard,
    real_sequences,
)
from qcompile.calibration.verdict import Figures, needs

Array = np.ndarray


def planted(tokens: int = 200, channels: int = 40) -> Array:
    """Normal rows with channel 4 in (-97, -58) and channel 9 in (5.7, 43)."""
    rows = np.random.default_rng(0).standard_normal((tokens, channels)).astype(np.float32)
    rows[:, 4] = np.linspace(-97, -58, tokens)
    rows[:, 9] = np.linspace(5.7, 43, tokens)
    return rows


def streamed(rows: Array, pieces: int) -> ChannelStatistics:
    found = ChannelStatistics(top=2, threshold=6.0)
    for piece in np.array_split(rows, pieces):
        found.update(piece)
    return found


@pytest.mark.parametrize("pieces", (1, 7, 200))
def test_streaming_gives_what_the_whole_tensor_gives(pieces: int) -> None:
    rows = planted()
    found = streamed(rows, pieces)
    wide = rows.astype(np.float64)
    np.testing.assert_array_equal(found.lo, rows.min(axis=0))
    np.testing.assert_array_equal(found.absmax, np.abs(rows).max(axis=0))
    np.testing.assert_allclose(found.mean, wide.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(found.std, wide.std(axis=0), rtol=1e-5)
    np.testing.assert_array_equal(found.large, (np.abs(rows) >= 6).sum(axis=0))
    assert found.kurtosis == pytest.approx(scipy.stats.kurtosis(wide, axis=None, fisher=False), rel=1e-4)
    assert found.tokens == 200 and found.sequences == pieces
    assert found.steadiness == (None if pieces == 1 else 1.0)  # the same two channels in every piece


def test_the_asymmetric_channels_of_the_paper() -> None:
    found = streamed(planted(), 4)
    assert found.asymmetry[4] == pytest.approx(155 / 39, rel=1e-5)  # 3.97: never crosses zero
    assert found.asymmetry[9] == pytest.approx(48.7 / 37.3, rel=1e-5)  # 1.31
    assert found.sign_consistency[4] == 1.0 and found.sign_consistency[0] < 0.7
    energy = np.square(planted().astype(np.float64)).sum(axis=0)
    assert found.energy_share(0.05) == pytest.approx(np.sort(energy)[-2:].sum() / energy.sum(), rel=1e-5)


def test_a_constant_channel_has_no_asymmetry_and_no_rows_change_nothing() -> None:
    found = ChannelStatistics(top=1, threshold=6.0)
    found.update(np.full((5, 2), 3.0, np.float32))
    found.update(np.zeros((0, 2), np.float32))
    assert found.tokens == 5 and (found.asymmetry == 0).all() and found.kurtosis == 0


def sink(position: int = 0) -> list[Sequence]:
    """Two sequences of normal tokens; one token of each holds 500 in channel 3."""
    found = []
    for seed in (0, 1):
        rows = np.random.default_rng(seed).standard_normal((150, 8)).astype(np.float32)
        rows[position, 3] = 500.0 + seed
        found.append(Sequence(rows, np.arange(150), np.arange(150) + 1000))
    return found


@pytest.mark.parametrize(("position", "first"), ((0, True), (37, False)))
def test_tokens_that_own_the_range_are_named(position: int, first: bool) -> None:
    found = TokenStatistics(top=3)
    for sequence in sink(position):
        found.update(sequence)
    assert found.share_of_few() > 0.98
    assert found.share_of_first() > 0.98 if first else found.share_of_first() == pytest.approx(0, abs=1e-6)
    one, other, third = found.largest
    assert (one.value, one.channel, one.position, one.id, one.sequence) == (
        501,
        3,
        position,
        1000 + position,
        1,
    )
    assert (other.value, other.sequence) == (500, 0) and third.size < 5


def test_where_positions_are_unknown_no_token_is_a_first_one() -> None:
    found = TokenStatistics(top=1)
    found.update(Sequence(sink()[0].rows))
    assert found.share_of_first() == 0 and found.largest[0].position == -1


def test_padding_is_left_out_and_positions_count_real_tokens() -> None:
    value = np.arange(2 * 4 * 3, dtype=np.float32).reshape(2, 4, 3)
    mask = np.array([[0, 0, 1, 1], [1, 1, 1, 0]])
    ids = np.arange(8).reshape(2, 4)
    sample = Sample({"input_ids": ids, "attention_mask": mask}, mask.astype(bool))
    for form in (value, value.reshape(8, 3)):
        left, right = real_sequences(form, sample)
        np.testing.assert_array_equal(left.rows, value[0, 2:])
        np.testing.assert_array_equal(right.rows, value[1, :3])
        assert left.positions is not None and left.ids is not None and right.ids is not None
        assert left.positions.tolist() == [0, 1] and left.ids.tolist() == [2, 3] and right.ids.tolist() == [4, 5, 6]
    heads = value.reshape(2, 4, 1, 3).transpose(0, 2, 1, 3)
    np.testing.assert_array_equal(next(real_sequences(heads, sample)).rows, value[0, 2:])
    (pooled,) = real_sequences(np.ones((2, 3), np.float32), sample)
    assert pooled.positions is None and pooled.rows.shape == (2, 3)


def test_a_sink_token_hides_in_the_signal_but_not_in_the_tokens() -> None:
    lost = QuantizerLoss(np.full(8, -4.0, np.float32), np.full(8, 501.0, np.float32))
    for sequence in sink():
        lost.update(sequence)
    assert lost.sqnr()["per_tensor_8"] > 20
    assert lost.token_sqnr()["per_tensor_8"] < 5  # every ordinary token is lost
    assert lost.token_sqnr()["per_token_8"] > 35
    assert lost.sqnr()["per_tensor_8"] > lost.sqnr()["per_tensor_4"]


def test_channels_of_their_own_lose_least() -> None:
    rows = planted()
    lost = QuantizerLoss(rows.min(axis=0), rows.max(axis=0))
    lost.update(Sequence(rows))
    figures = lost.sqnr()
    assert figures["per_channel_8"] > figures["per_token_8"] > figures["per_tensor_8"] - 1


def test_jaccard() -> None:
    assert jaccard(frozenset({1, 2}), frozenset({2, 3})) == pytest.approx(1 / 3)
    assert jaccard(frozenset(), frozenset()) == 1.0


@pytest.mark.parametrize(
    ("sink_", "gain", "spread", "shiftable", "obstacle", "expected"),
    [
        ("", 1.1, 2.5, True, "", []),
        ("", 3.0, 9.0, True, "", ["shift"]),
        ("", 3.0, 30.0, True, "", ["shift", "scale"]),
        ("", 1.1, 30.0, True, "", ["scale"]),
        ("", 3.0, 9.0, False, "", ["scale"]),
        ("", 3.0, 9.0, True, "Gelu", ["higher precision"]),
        ("first token", 1.0, 2.0, True, "Gelu", ["per token (first token)"]),
        ("few tokens", 1.0, 9.0, False, "", ["per token (few tokens)", "scale"]),
    ],
)
def test_the_verdict_follows_the_figures(
    sink_: str, gain: float, spread: float, shiftable: bool, obstacle: str, expected: list[str]
) -> None:
    assert needs(Figures(10.0, 8.0, sink_, gain, spread, 0.0, 0.0), shiftable, obstacle) == expected
