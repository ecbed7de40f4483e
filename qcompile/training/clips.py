"""Quantisers of activations with a learned range: the layers that training sees, and the grid that ships.

    y = s * clamp(round(x / s), low - z, high - z)        s and z are scalars: static when the program runs
Zero is always a code, so what training sees is exactly what QuantizeLinear and DequantizeLinear do later.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any, ClassVar, cast

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from qcompile.capture.torch_clip import static_clip
from qcompile.errors import UserError
from qcompile.quant.numerics import SCALE_FLOOR

Pair = tuple[torch.Tensor, torch.Tensor]
START_QUANTILE = 1e-4  # of the first batch's values lies outside the first range, on either side
START_VALUES = 1 << 16
UNITS = 16  # of the first range: what is smaller is learned by steps of one size, what is larger by shares of itself
NARROW = 1  # units; what is not wider gets no gradient that narrows it: it would go on until nothing is left
SLACK = 1e-5  # of a step; a value that close to an end is not cut
BLOCK = 1 << 16  # values that a CPU takes at a time


class Quantiser(nn.Module):
    """What the quantisers have in common: codes of ``bits``, a start on the first batch, and an export.

    A range is learned in float32 at least. ``low`` and ``high`` are the codes that are used, within uint8.
    """

    name: ClassVar[str]
    started: torch.Tensor

    def __init__(self, bits: int) -> None:
        super().__init__()
        if not 2 <= bits <= 8:
            raise UserError(f"activations of {bits} bits", hint="2 to 8; 4 and 8 have kernels")
        self.bits, self.low, self.high = bits, 0, 2**bits - 1
        self.register_buffer("started", torch.zeros(1, dtype=torch.uint8))
        for name in ("export_low", "export_high", "export_scale"):
            self.register_buffer(name, torch.ones(()), persistent=False)
        self.register_buffer("export_zero", torch.zeros((), dtype=torch.uint8), persistent=False)
        self._known = False  # that it has started, without asking the device
        self.readers = 1  # linears that share it
        self._kept: _Kept | None = None

    def grid(self) -> Pair:
        """Scale and zero point as the forward pass has them now, both scalars of shape (1,)."""
        raise NotImplementedError

    def start(self, low: torch.Tensor, high: torch.Tensor) -> None:
        """Set the range to ``low .. high``, shapes (1,)."""
        raise NotImplementedError

    def width(self) -> torch.Tensor:
        """What is above zero while there is a range, shape (1,)."""
        raise NotImplementedError

    def fake(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` on the grid, in float, with straight-through gradients."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_exporting():
            held = (self.export_low, self.export_high, self.export_scale, self.export_zero)
            shipped: torch.Tensor = static_clip(x, *cast("tuple[torch.Tensor, ...]", held))
            return shipped
        if not self.has_started():
            self._start_on(x)
        if self.readers == 1 or torch.compiler.is_compiling():
            return self.fake(x)
        return self._fake_once(x)

    def _fake_once(self, x: torch.Tensor) -> torch.Tensor:
        """``fake``, of which the readers of one tensor have one result. The last of them forgets it."""
        if self._kept is None or not self._kept.is_of(x, self):
            self._kept = _Kept(x, self.fake(x), self)
        kept = self._kept
        kept.left -= 1
        if not kept.left:
            self._kept = None
        return kept.result

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": None}

    def has_started(self) -> bool:
        """Whether there is a range: one was learned, loaded or taken from a first batch."""
        if not self._known:
            self._known = bool(self.started.item())
        return self._known

    def ends(self) -> tuple[float, float]:
        """The smallest and the largest value on the grid."""
        scale, zero = (float(part) for part in self.grid())
        return (self.low - zero) * scale, (self.high - zero) * scale

    @torch.no_grad()
    def _start_on(self, x: torch.Tensor) -> None:
        values = x.detach().flatten()
        values = values[:: max(1, values.numel() // START_VALUES)].float()
        ends = torch.stack([values.quantile(START_QUANTILE), values.quantile(1 - START_QUANTILE)])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(ends)
            ends /= torch.distributed.get_world_size()
        low, high = ends[:1].clamp(max=0), ends[1:].clamp(min=0)
        silent = high - low <= 0
        self.start(torch.where(silent, -torch.ones_like(low), low), torch.where(silent, torch.ones_like(high), high))
        self.mark_started()

    def mark_started(self) -> None:
        self.started.fill_(1)
        self._known = True

    def train(self, mode: bool = True) -> Quantiser:
        """Also sets the constants of an export, when training ends."""
        super().train(mode)
        self._known = False  # a state dict may have been loaded
        if not mode and not self.started.is_meta and self.has_started():
            with torch.no_grad():
                scale, zero = (part.float().reshape(()) for part in self.grid())
                self.export_scale, self.export_zero = scale, zero.to(torch.uint8)
                self.export_low, self.export_high = (self.low - zero) * scale, (self.high - zero) * scale
        return self

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        super()._load_from_state_dict(*args, **options)
        self._known = False

    def extra_repr(self) -> str:
        return f"bits={self.bits}"

    def learned(self) -> dict[str, torch.Tensor]:
        """What is learned, on the scale of the values."""
        return dict(self.named_parameters())


class _Kept:
    """What a clip made of a tensor, for its other readers."""

    def __init__(self, x: torch.Tensor, result: torch.Tensor, clip: Quantiser) -> None:
        self.result, self.left = result, clip.readers
        self._source, self._state = weakref.ref(x), _state(x, clip)

    def is_of(self, x: torch.Tensor, clip: Quantiser) -> bool:
        return self._source() is x and self._state == _state(x, clip)


def _state(x: torch.Tensor, clip: Quantiser) -> tuple[Any, ...]:
    """What the result depends on besides the tensor itself."""
    versions = [x._version, *(parameter._version for parameter in clip.parameters())]
    return *versions, torch.is_grad_enabled(), _type_of_linear(x)


class ActClip(Quantiser):
    """Asymmetric, with both ends learned: c_minus <= 0 <= c_plus.

        s = (c_plus - c_minus) / N,   z = round(-c_minus / s),   N = 2^bits - 1
    An end on the wrong side of zero counts as zero. The gradients are those of the same function with each round(u)
    replaced by u plus a constant.
    The parameters c_minus and c_plus are on a scale of their own, end = unit * sinh(parameter): an optimizer whose
    steps have one size, as Adam's have, moves every range by a share of itself, be it 0.01 or 100 wide.
    Source: arXiv 2404.03605 (PACT with two ends); the zero is aligned during training already.
    """

    name: ClassVar[str] = "clip"
    unit: torch.Tensor

    def __init__(self, bits: int = 4, reach: float = 4.0) -> None:
        super().__init__(bits)
        self.c_minus, self.c_plus = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
        self.register_buffer("unit", torch.ones(1))
        self.start(torch.tensor([-reach]), torch.tensor([reach]))

    def grid(self) -> Pair:
        return _scale_and_zero(*self._range(), self.high)

    def start(self, low: torch.Tensor, high: torch.Tensor) -> None:
        self.unit.copy_((high - low) / UNITS)
        self.c_minus.data.copy_(torch.asinh(low / self.unit))
        self.c_plus.data.copy_(torch.asinh(high / self.unit))

    def learned_ends(self) -> Pair:
        """Both ends as they were learned, shapes (1,): c_minus may be above c_plus where training went astray."""
        ends = (end if end.dtype == torch.float64 else end.float() for end in (self.c_minus, self.c_plus))
        low, high = (self.unit.to(end.dtype) * torch.sinh(end) for end in ends)
        return low, high

    def learned(self) -> dict[str, torch.Tensor]:
        return dict(zip(("c_minus", "c_plus"), self.learned_ends(), strict=True))

    def width(self) -> torch.Tensor:
        low, high = self.learned_ends()
        return high - low

    def fake(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = _Affine.apply(x, self.c_minus, self.c_plus, self)  # type: ignore[no-untyped-call]
        return found

    def _range(self) -> Pair:
        low, high = self.learned_ends()
        return low.clamp(max=0), high.clamp(min=0)


class _Affine(torch.autograd.Function):
    """Fake quantisation by an ActClip; keeps nothing but its input for the backward pass.

    Under autocast its output has the type that the linear behind it would cast to. On a CPU it works through blocks
    that stay in the cache.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, c_minus: torch.Tensor, c_plus: torch.Tensor, clip: ActClip) -> torch.Tensor:
        low, high = clip.learned_ends()
        scale, zero = _scale_and_zero(low.clamp(max=0), high.clamp(min=0), clip.high)
        ctx.save_for_backward(x, scale)
        ctx.held = [_plain(part) for part in (low, high, clip.unit, scale)]
        origin = _plain(zero)
        ctx.levels, ctx.ends = clip.high, (-origin, clip.high - origin)
        x = x.contiguous()
        found = torch.empty_like(x, dtype=_type_of_linear(x))
        for values, target in _blocks(x, found):
            room = _room(target, scale.dtype)
            target.copy_(_codes(values, scale, ctx.ends, room).mul_(scale))
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """With u = x / s, q = clamp(round(u)), and what is inside or cut:

        d/dhigh = (sum g q - sum_inside g u - low / s sum_cut g) / N
        d/dlow  = sum_cut g - d/dhigh
        for inside y = s (u + (q - u)) with q - u constant, above y = high + what rounding took from the zero point, and
        below y = low + the same. An end moves by sqrt(unit^2 + end^2) times its parameter.
        """
        x, scale = ctx.saved_tensors
        low, high, unit, step = ctx.held
        bounds = (ctx.ends[0] - SLACK) * step, (ctx.ends[1] + SLACK) * step
        x, grad = x.contiguous(), grads[0].contiguous()
        found, sums = torch.empty_like(x), []
        for values, g, target in _blocks(x, grad, found):
            values, g = values.to(scale.dtype), g.to(scale.dtype)
            kept = _inside(g, values, *bounds, _room(target, scale.dtype))
            codes = _codes(values, scale, ctx.ends, torch.empty_like(values))
            sums += [g.sum(), kept.sum(), torch.dot(g, codes), torch.dot(kept, values)]
            target.copy_(kept)
        totals = torch.stack(sums).view(-1, 4).sum(dim=0)
        all_, kept_, all_codes, inside = totals.tolist() if totals.device.type == "cpu" else totals
        cut = all_ - kept_
        d_high = (all_codes - (inside + (low <= 0) * low * cut) / step) / ctx.levels
        d_low = cut - d_high
        d_minus = d_low * (low <= 0) * (unit**2 + low**2) ** 0.5
        d_plus = d_high * (high >= 0) * (unit**2 + high**2) ** 0.5
        narrow = (high - low <= NARROW * unit) / 2
        d_minus, d_plus = d_minus + narrow * (abs(d_minus) - d_minus), d_plus - narrow * (abs(d_plus) + d_plus)
        return found, _like(d_minus, scale), _like(d_plus, scale), None


def _plain(scalar: torch.Tensor) -> Any:
    """A number on a CPU, where small tensors are slow; elsewhere the tensor, so that no device waits."""
    return scalar.item() if scalar.device.type == "cpu" else scalar


def _like(value: Any, tensor: torch.Tensor) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else torch.full_like(tensor, value)


def _scale_and_zero(low: torch.Tensor, high: torch.Tensor, levels: int) -> Pair:
    scale = ((high - low) / levels).clamp(min=SCALE_FLOOR)
    return scale, torch.round(-low / scale)


def _type_of_linear(x: torch.Tensor) -> torch.dtype:
    """What a linear makes of ``x``: autocast has float32 cast."""
    device = x.device.type
    casts = x.dtype == torch.float32 and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if casts else x.dtype


def _blocks(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Flat views of contiguous ``tensors`` of one size, block by block on a CPU and whole elsewhere."""
    size = BLOCK if tensors[0].device.type == "cpu" else max(1, tensors[0].numel())
    return zip(*(torch.split(tensor.view(-1), size) for tensor in tensors), strict=True)


def _room(target: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return target if target.dtype == dtype else torch.empty_like(target, dtype=dtype)


def _codes(x: torch.Tensor, scale: torch.Tensor, ends: tuple[Any, Any], out: torch.Tensor) -> torch.Tensor:
    """Steps from zero, rounded, within ``ends``."""
    return torch.div(x.to(scale.dtype), scale, out=out).round_().clamp_(*ends)


def _inside(grad: torch.Tensor, x: torch.Tensor, low: Any, high: Any, out: torch.Tensor) -> torch.Tensor:
    """``grad`` where ``x`` is between ``low`` and ``high``, else 0."""
    if grad.device.type != "cpu":
        return torch.where((x > low) & (x < high), grad, grad.new_zeros(()), out=out)
    found: torch.Tensor = torch.ops.aten.hardtanh_backward.grad_input(grad, x, low, high, grad_input=out)
    return found


class Pact(Quantiser):
    """PACT for signed inputs: one learned end, alpha; its gradient is that of what is clipped, rounding apart.

    Source: arXiv 1805.06085.
    """

    name: ClassVar[str] = "pact"

    def __init__(self, bits: int = 4, reach: float = 4.0) -> None:
        super().__init__(bits)
        self.low, self._middle = 1, 2 ** (bits - 1)
        self.alpha = nn.Parameter(torch.tensor([reach]))

    def grid(self) -> Pair:
        scale = (self.alpha.float() / (self.high - self._middle)).clamp(min=SCALE_FLOOR)
        return scale, torch.full_like(scale, self._middle)

    def width(self) -> torch.Tensor:
        return self.alpha

    def start(self, low: torch.Tensor, high: torch.Tensor) -> None:
        self.alpha.data.copy_(torch.maximum(-low, high))

    def fake(self, x: torch.Tensor) -> torch.Tensor:
        scale, _ = self.grid()
        alpha = self.alpha.float()
        clipped = torch.maximum(torch.minimum(x.float(), alpha), -alpha)
        return (clipped + (torch.round(clipped / scale) * scale - clipped).detach()).to(x.dtype)


class Lsq(Quantiser):
    """LSQ: the step is learned, its gradient divided by sqrt(values * largest code).

    Source: arXiv 1902.08153.
    """

    name: ClassVar[str] = "lsq"

    def __init__(self, bits: int = 4, reach: float = 4.0) -> None:
        super().__init__(bits)
        self._middle = 2 ** (bits - 1)
        self.step = nn.Parameter(torch.tensor([reach / (self.high - self._middle)]))

    def grid(self) -> Pair:
        scale = self.step.float().clamp(min=SCALE_FLOOR)
        return scale, torch.full_like(scale, self._middle)

    def width(self) -> torch.Tensor:
        return self.step

    def start(self, low: torch.Tensor, high: torch.Tensor) -> None:
        self.step.data.copy_(torch.maximum(-low, high) / (self.high - self._middle))

    def fake(self, x: torch.Tensor) -> torch.Tensor:
        most = self.high - self._middle
        scale, _ = self.grid()
        share = (x.numel() * most) ** -0.5
        scale = scale * share + (scale - scale * share).detach()
        codes = (x.float() / scale).clamp(-self._middle, most)
        found: torch.Tensor = ((codes + (codes.round() - codes).detach()) * scale).to(x.dtype)
        return found


QUANTISERS: dict[str, type[ActClip] | type[Pact] | type[Lsq]] = {kind.name: kind for kind in (ActClip, Pact, Lsq)}
