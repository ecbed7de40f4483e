"""Learned clips: their gradients against finite differences, the grid that ships, and how they start."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from qcompile.errors import UserError
from qcompile.quant.numerics import affine_from_range, fake_quantize
from qcompile.training import clips
from qcompile.training.clips import QUANTISERS, ActClip, Lsq, Pact

STEP = 1e-6


def values(seed: int = 0, count: int = 400) -> torch.Tensor:
    return torch.randn(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 1.5


def surrogate(x: torch.Tensor, low: float, high: float, levels: int) -> Callable[..., torch.Tensor]:
    """ActClip's function with every round(u) replaced by u plus what rounding adds at the given point."""
    scale = (high - low) / levels
    zero_part = round(-low / scale) - (-low / scale)
    zero = -low / scale + zero_part
    clipped = x.clamp(-zero * scale, (levels - zero) * scale)
    part = torch.round(clipped / scale) - clipped / scale

    def function(x: torch.Tensor, low: float, high: float) -> torch.Tensor:
        scale = (high - low) / levels
        zero = -low / scale + zero_part
        return (x.clamp(-zero * scale, (levels - zero) * scale) / scale + part) * scale

    return function


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("low", "high"), [(-1.3, 2.1), (-0.17, 3.0), (-2.0, 0.4), (0.0, 1.0)])
def test_gradients_are_those_of_the_surrogate(bits: int, low: float, high: float) -> None:
    clip = ActClip(bits).double()
    clip.start(torch.tensor([low]), torch.tensor([high]))
    clip.mark_started()
    low, high = (float(end.detach()) for end in clip.learned_ends())
    slopes = [float((clip.unit * torch.cosh(p.detach())).item()) for p in (clip.c_minus, clip.c_plus)]
    x, weights = values().requires_grad_(), values(seed=1)
    y = clip(x)
    (y * weights).sum().backward()
    function = surrogate(x.detach(), low, high, 2**bits - 1)

    def loss(x: torch.Tensor, low: float, high: float) -> float:
        return float((function(x, low, high) * weights).sum())

    torch.testing.assert_close(y.detach(), function(x.detach(), low, high), rtol=0, atol=1e-12)
    assert x.grad is not None and clip.c_plus.grad is not None and clip.c_minus.grad is not None
    shift = torch.full_like(x, STEP)
    found = (function(x + shift, low, high) - function(x - shift, low, high)).detach() / (2 * STEP) * weights
    torch.testing.assert_close(x.grad, found, rtol=0, atol=1e-4)
    d_high = (loss(x.detach(), low, high + STEP) - loss(x.detach(), low, high - STEP)) / (2 * STEP)
    assert abs(float(clip.c_plus.grad) - d_high * slopes[1]) < 1e-4
    if low < 0:  # at 0 the range ends there
        d_low = (loss(x.detach(), low + STEP, high) - loss(x.detach(), low - STEP, high)) / (2 * STEP)
        assert abs(float(clip.c_minus.grad) - d_low * slopes[0]) < 1e-4


@pytest.mark.parametrize("bits", [4, 8])
def test_the_grid_is_the_compilers(bits: int) -> None:
    clip = ActClip(bits)
    clip.start(torch.tensor([-0.63]), torch.tensor([2.41]))
    clip.mark_started()
    affine = affine_from_range(-0.63, 2.41, bits, symmetric=False, signed=False)
    scale, zero = (float(part) for part in clip.grid())
    assert abs(scale - float(affine.scale)) < 1e-6 * scale and zero == float(affine.zero_point)
    x = values().float()
    expected = fake_quantize(x.numpy(), affine)
    np.testing.assert_allclose(clip(x).detach().numpy(), expected, rtol=0, atol=1e-6)
    assert len(np.unique(expected)) <= 2**bits
    assert float(clip(torch.zeros(1)).detach()) == 0.0


def test_an_end_on_the_wrong_side_of_zero_counts_as_zero() -> None:
    clip = ActClip(4)
    clip.start(torch.tensor([0.5]), torch.tensor([2.0]))
    clip.mark_started()
    assert clip.ends() == pytest.approx((0.0, 2.0))


@pytest.mark.parametrize("size", [0.01, 1.0, 100.0])
def test_a_step_of_the_optimizer_is_a_share_of_the_range(size: float) -> None:
    clip = ActClip(4)
    clip.start(torch.tensor([-0.5 * size]), torch.tensor([size]))
    clip.mark_started()
    optimizer = torch.optim.Adam(clip.parameters(), lr=0.02)
    for _ in range(30):
        optimizer.zero_grad()
        (clip(values().float() * 10 * size) ** 2).sum().neg().backward()  # wider is better
        optimizer.step()
    low, high = clip.ends()
    assert 1.5 < high / size < 2.2 and 1.5 < low / (-0.5 * size) < 2.2


def test_pact_learns_from_what_it_clips() -> None:
    clip = Pact(4)
    clip.start(torch.tensor([-1.0]), torch.tensor([1.0]))
    clip.mark_started()
    x = torch.tensor([-3.0, -0.4, 0.3, 2.0, 5.0], requires_grad=True)
    clip(x).sum().backward()
    assert clip.alpha.grad is not None and x.grad is not None
    assert float(clip.alpha.grad) == pytest.approx(-1 + 1 + 1)
    assert x.grad.tolist() == [0, 1, 1, 0, 0]


def test_lsq_scales_the_gradient_of_its_step() -> None:
    clip = Lsq(4)
    clip.start(torch.tensor([-0.7]), torch.tensor([0.7]))
    clip.mark_started()
    x = torch.tensor([-3.0, 0.13, 5.0], requires_grad=True)
    clip(x).sum().backward()
    assert clip.step.grad is not None and x.grad is not None
    plain = -8 + (round(1.3) - 1.3) + 7  # low code, rounding inside, high code
    assert float(clip.step.grad) == pytest.approx(plain / (3 * 7) ** 0.5, abs=1e-5)
    assert x.grad.tolist() == [0, 1, 0]


@pytest.mark.parametrize("name", QUANTISERS)
def test_a_clip_starts_on_the_first_batch(name: str) -> None:
    clip = QUANTISERS[name](4)
    assert not clip.has_started()
    x = values().float()
    y = clip(x).detach()
    assert clip.has_started()
    low, high = clip.ends()
    assert low <= float(x.min()) * 0.9 and high >= float(x.max()) * 0.9
    before = clip.ends()
    clip(10 * x)
    assert clip.ends() == before
    assert float((y - x).abs().max()) <= (high - low) / 15 / 2 + 0.05 * float(x.abs().max())


def test_a_silent_input_gives_a_range_all_the_same() -> None:
    clip = ActClip(4)
    assert float(clip(torch.zeros(8)).detach().abs().max()) == 0.0
    assert clip.ends()[1] > 0


def test_half_precision_in_half_precision_out() -> None:
    clip = ActClip(8)
    x = values().to(torch.bfloat16).requires_grad_()
    y = clip(x)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and x.grad is not None and x.grad.dtype == torch.bfloat16
    assert clip.c_plus.grad is not None and clip.c_plus.grad.dtype == torch.float32


@pytest.mark.parametrize("bits", [1, 9])
def test_other_widths_are_refused(bits: int) -> None:
    with pytest.raises(UserError, match=f"activations of {bits} bits"):
        ActClip(bits)


def gradients(x: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
    clip = ActClip(4)
    clip.start(torch.tensor([-1.1]), torch.tensor([1.9]))
    clip.mark_started()
    x = x.clone().requires_grad_()
    y = clip(x)
    y.backward(weights.to(y.dtype))
    assert x.grad is not None and clip.c_minus.grad is not None and clip.c_plus.grad is not None
    return y.detach(), x.grad, clip.c_minus.grad, clip.c_plus.grad


def test_blocks_are_of_no_consequence(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weights = values().float().view(20, 20).T, values(seed=1).float().view(20, 20)
    whole = gradients(x, weights)
    monkeypatch.setattr(clips, "BLOCK", 64)
    for found, expected in zip(gradients(x, weights), whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_under_autocast_the_output_is_what_a_linear_casts_to() -> None:
    x, weights = values().float(), values(seed=1).bfloat16()
    plain = gradients(x, weights)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = gradients(x, weights)
    assert cast[0].dtype == torch.bfloat16 and torch.equal(cast[0], plain[0].bfloat16())
    for found, expected in zip(cast[1:], plain[1:], strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size, narrowed", [(1.0, True), (0.01, False)])
def test_a_narrow_range_is_not_narrowed_further(size: float, narrowed: bool) -> None:
    clip = ActClip(4)
    clip.start(torch.tensor([-1.0]), torch.tensor([1.0]))
    clip.mark_started()
    for part in clip.parameters():
        part.data.mul_(size)
    clip(torch.full((64,), 2.0)).sum().backward()
    assert (float(clip.c_plus.grad) > 0) == narrowed, "the loss falls where c_plus does"  # type: ignore[arg-type]
    clip.zero_grad()
    (-clip(torch.full((64,), 2.0))).sum().backward()
    assert float(clip.c_plus.grad) < 0, "it may grow"  # type: ignore[arg-type]
