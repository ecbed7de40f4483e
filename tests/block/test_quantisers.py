"""Fake quantisation in torch gives the numbers of ``quant/numerics.py``, and gradients that move what they should."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from qcompile.block.quantisers import REACH, START, WeightClip, fake_quantize, fake_quantize_per_token, round_through
from qcompile.quant import numerics
from qcompile.quant.schemes import WeightScheme

SCHEMES = [
    scheme
    for bits in (2, 3, 4, 8)
    for symmetric in (True, False)
    for scheme in (
        WeightScheme(bits=bits, symmetric=symmetric),
        WeightScheme(bits=bits, symmetric=symmetric, granularity="per_tensor"),
        WeightScheme(bits=bits, symmetric=symmetric, granularity="group", group_size=8),
        WeightScheme(bits=bits, symmetric=symmetric, granularity="group", group_size=64),
    )
]
K, N = 45, 20


def weight(seed: int = 0) -> np.ndarray:
    """(K, N): heavy tails, a column of zeros, one of only positive and one of tiny numbers."""
    w = np.random.default_rng(seed).standard_t(3, size=(K, N)).astype(np.float32)
    w[:, 3], w[:, 4], w[:, 5] = 0, np.abs(w[:, 4]) + 1, w[:, 5] * 1e-38
    return w


def everything(clip: WeightClip) -> WeightClip:
    """Without a clip: the fractions are exactly one."""
    ones = torch.ones_like(clip.low), torch.ones_like(clip.high)
    clip.fractions = lambda: ones  # type: ignore[method-assign]
    return clip


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_an_open_clip_is_min_max(scheme: WeightScheme) -> None:
    w = weight()
    clip = everything(WeightClip(K, N, scheme))
    expected = numerics.quantize_weight(w, scheme.model_copy(update={"clip": "minmax"}))
    assert np.array_equal(clip(torch.from_numpy(w)).detach().numpy(), expected.dequantized())
    codes = clip.codes(torch.from_numpy(w))
    assert np.array_equal(codes.codes, expected.codes)
    assert np.array_equal(codes.scale, expected.scale)
    assert np.array_equal(codes.zero_point, expected.zero_point)
    assert codes.group_size == expected.group_size


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_codes_are_what_was_learned(scheme: WeightScheme) -> None:
    w = weight(1)
    clip = WeightClip(K, N, scheme)
    with torch.no_grad():
        for part in (clip.low, clip.high):
            part.copy_(torch.from_numpy(np.random.default_rng(2).normal(1, 2, part.shape)))
    learned = clip(torch.from_numpy(w)).detach().numpy()
    codes = clip.codes(torch.from_numpy(w))
    assert np.array_equal(learned, codes.dequantized())
    low, high = numerics.code_range(scheme.bits, scheme.symmetric, signed=True)
    for array in (codes.codes, codes.zero_point):
        assert array.min() >= low
        assert array.max() <= high
    assert (codes.codes == high).any() or (codes.codes == low).any()


def test_it_starts_as_omniquant_does_or_where_it_is_told() -> None:
    scheme = WeightScheme(bits=4, granularity="group", group_size=16, symmetric=False)
    for fractions in WeightClip(40, 6, scheme).fractions():
        assert fractions.detach().numpy() == pytest.approx(START, rel=1e-6)
    assert pytest.approx(0.98201, abs=1e-4) == START
    start = np.random.default_rng(0).uniform(0.3, 1.2, (2, 3, 6))
    for fractions, wanted in zip(WeightClip(40, 6, scheme, start).fractions(), start, strict=True):
        assert fractions[:, 0].detach().numpy() == pytest.approx(wanted, rel=1e-6)
    far, _ = WeightClip(40, 6, scheme, np.full((2, 3, 6), 9.0)).fractions()
    assert 0.999 * REACH < far.min().item() < REACH


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_tokens_are_quantised_as_in_numerics(bits: int, symmetric: bool) -> None:
    x = np.random.default_rng(bits).standard_t(2, size=(3, 70, 33)).astype(np.float32)
    x[0, 0], x[0, 1], x[0, 2] = 0, np.abs(x[0, 1]), x[0, 2] * 1e-38
    expected = numerics.fake_quantize_per_token(x, bits, symmetric)
    assert np.array_equal(fake_quantize_per_token(torch.from_numpy(x), bits, symmetric).numpy(), expected)


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_static_range_is_that_of_numerics(symmetric: bool) -> None:
    x = np.random.default_rng(0).normal(size=(50, 40)).astype(np.float32) * 3
    lo, hi = np.float32(-1.7), np.float32(2.9)
    expected = numerics.fake_quantize(x, numerics.affine_from_range(lo, hi, 4, symmetric, signed=False))
    actual = fake_quantize(torch.from_numpy(x), torch.tensor(lo), torch.tensor(hi), 4, symmetric)
    assert np.array_equal(actual.numpy(), expected)


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_fused_gradient_is_that_of_its_parts(symmetric: bool) -> None:
    """The same expression, spelled in torch operators with straight-through rounding."""

    def spelled(x: torch.Tensor, lo: torch.Tensor, hi: torch.Tensor) -> torch.Tensor:
        if symmetric:
            scale, first = torch.maximum(-lo, hi) / 7, torch.full_like(lo, -7.0)
        else:
            scale = (hi - lo) / 15
            first = round_through(lo / scale)
        last = first + (14 if symmetric else 15)
        return torch.clamp(round_through(x / scale), first, last) * scale

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 20, generator=generator, dtype=torch.float64)
    direction = torch.randn(30, 20, generator=generator, dtype=torch.float64)
    slopes = []
    for function in (spelled, functools.partial(fake_quantize, bits=4, symmetric=symmetric)):
        leaves = [x.clone(), (x.amin(0, True) * 0.7), (x.amax(0, True) * 0.6)]
        for leaf in leaves:
            leaf.requires_grad_()
        slopes.append(torch.autograd.grad((function(*leaves) * direction).sum(), leaves))
    for expected, actual in zip(*slopes, strict=True):
        assert float(expected.abs().max()) > 0.1
        assert torch.allclose(actual, expected, rtol=1e-9, atol=1e-9)


def test_an_end_moves_what_it_clips() -> None:
    """A value beyond the upper end follows that end alone; one inside follows itself."""
    x = torch.tensor([[-9.0, 9.0, 0.31]], requires_grad=True)
    lo, hi = torch.tensor([[-1.0]], requires_grad=True), torch.tensor([[2.0]], requires_grad=True)
    y = fake_quantize(x, lo, hi, 8, symmetric=False)
    for place, expected in ((0, (0, 1, 0)), (1, (0, 0, 1)), (2, (1, 0, 0))):
        slopes = torch.autograd.grad(y[0, place], (x, lo, hi), retain_graph=True)
        found = (slopes[0][0, place], slopes[1], slopes[2])
        assert [float(slope) for slope in found] == pytest.approx(expected, abs=0.01)


def test_rounding_is_half_to_even_with_the_gradient_of_the_identity() -> None:
    x = torch.tensor([0.5, 1.5, -2.5, 0.2, torch.inf], requires_grad=True)
    y = round_through(x)
    assert y.tolist() == [0.0, 2.0, -2.0, 0.0, torch.inf]
    (slope,) = torch.autograd.grad((y * torch.arange(5)).sum(), x)
    assert slope.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
