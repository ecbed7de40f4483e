"""ONNX operators on shapes, views and indices, as functions of torch tensors.

Shapes are int64 tensors on the CPU, wherever the data is; an argument that a function reads as whole numbers
(``Integers``) is such a tensor or a tuple that was constant in the graph.
Source: the ONNX operator reference, opset 21.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Integers = Tensor | Sequence[int] | int


def whole(values: Integers) -> list[int]:
    """``values`` as Python integers."""
    if isinstance(values, Tensor):
        return [int(v) for v in values.reshape(-1).tolist()]
    return [values] if isinstance(values, int) else list(values)


def constant(content: Any, dtype: torch.dtype) -> Tensor:
    """A small constant of the graph, on the CPU."""
    return torch.tensor(content, dtype=dtype)


def on_device_of(x: Tensor, like: Tensor) -> Tensor:
    """``x`` where ``like`` is: the one crossing from the arithmetic of shapes to data."""
    return x.to(like.device)


def identity(x: Tensor, *_unused: Any) -> Tensor:
    return x


def shape(x: Tensor, *, start: int = 0, end: int | None = None) -> Tensor:
    return torch.tensor(list(x.shape)[start:end], dtype=torch.int64)


def size(x: Tensor) -> Tensor:
    return torch.tensor(x.numel(), dtype=torch.int64)


def reshape(x: Tensor, target: Integers, *, allowzero: int = 0) -> Tensor:
    sizes = whole(target)
    if not allowzero:
        sizes = [x.shape[i] if n == 0 else n for i, n in enumerate(sizes)]
    return x.reshape(sizes)


def flatten(x: Tensor, *, axis: int = 1) -> Tensor:
    axis = axis + x.ndim if axis < 0 else axis
    return x.reshape(int(torch.Size(x.shape[:axis]).numel()), -1)


def expand(x: Tensor, target: Integers) -> Tensor:
    sizes = whole(target)
    rank = max(x.ndim, len(sizes))
    own, wanted = [1] * (rank - x.ndim) + list(x.shape), [1] * (rank - len(sizes)) + sizes
    return x.expand([n if m == 1 else m for m, n in zip(own, wanted, strict=True)])


def transpose(x: Tensor, *, perm: Sequence[int] | None = None) -> Tensor:
    return x.permute(*(perm if perm is not None else reversed(range(x.ndim))))


def squeeze(x: Tensor, axes: Integers | None = None) -> Tensor:
    return x.squeeze() if axes is None else x.squeeze(tuple(whole(axes)))


def unsqueeze(x: Tensor, axes: Integers) -> Tensor:
    chosen = whole(axes)
    rank = x.ndim + len(chosen)
    for axis in sorted(a % rank for a in chosen):
        x = x.unsqueeze(axis)
    return x


def tile(x: Tensor, repeats: Integers) -> Tensor:
    return x.tile(tuple(whole(repeats)))


def concat(*parts: Tensor, axis: int) -> Tensor:
    return torch.cat(parts, axis)


def split(
    x: Tensor, sizes: Integers | None = None, *, axis: int = 0, num_outputs: int | None = None
) -> tuple[Tensor, ...]:
    if sizes is not None:
        return torch.split_with_sizes(x, whole(sizes), axis)
    assert num_outputs is not None  # from opset 18 on one of the two is given
    each = -(-x.shape[axis] // num_outputs)
    last = x.shape[axis] - each * (num_outputs - 1)
    return torch.split_with_sizes(x, [each] * (num_outputs - 1) + [last], axis)


def slice_(
    x: Tensor, starts: Integers, ends: Integers, axes: Integers | None = None, steps: Integers | None = None
) -> Tensor:
    first, last = whole(starts), whole(ends)
    along = whole(axes) if axes is not None else list(range(len(first)))
    strides = whole(steps) if steps is not None else [1] * len(first)
    for start, end, axis, step in zip(first, last, along, strides, strict=True):
        kept = range(*slice(start, end, step).indices(x.shape[axis]))
        if step > 0:
            x = x[(slice(None),) * (axis % x.ndim) + (slice(kept.start, kept.stop, step),)]
        else:
            x = x.index_select(axis, torch.tensor(list(kept), dtype=torch.int64, device=x.device))
    return x


def _counted_from_start(indices: Tensor, length: int) -> Tensor:
    wide = indices.to(torch.int64)
    return torch.where(wide < 0, wide + length, wide)


def gather(x: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    axis %= x.ndim
    chosen = _counted_from_start(indices, x.shape[axis])
    picked = x.index_select(axis, chosen.reshape(-1))
    return picked.reshape(*x.shape[:axis], *chosen.shape, *x.shape[axis + 1 :])


def gather_elements(x: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    return x.gather(axis, _counted_from_start(indices, x.shape[axis]))


def gather_nd(x: Tensor, indices: Tensor, *, batch_dims: int = 0) -> Tensor:
    chosen = indices.to(torch.int64).unbind(-1)
    rank = indices.ndim - 1
    batch = []
    for axis in range(batch_dims):
        counts = torch.arange(x.shape[axis], device=x.device)
        batch.append(counts.reshape([-1 if i == axis else 1 for i in range(rank)]))
    return x[(*batch, *chosen)]


def scatter_elements(
    x: Tensor, indices: Tensor, updates: Tensor, *, axis: int = 0, reduction: str = "none"
) -> Tensor:
    chosen = _counted_from_start(indices, x.shape[axis])
    if reduction == "add":
        return x.scatter_add(axis, chosen, updates)
    return x.scatter(axis, chosen, updates)


def scatter_nd(x: Tensor, indices: Tensor, updates: Tensor, *, reduction: str = "none") -> Tensor:
    return x.index_put(indices.to(torch.int64).unbind(-1), updates, accumulate=reduction == "add")


def pad(
    x: Tensor, pads: Integers, value: Tensor | None = None, axes: Integers | None = None, *, mode: str = "constant"
) -> Tensor:
    amounts = whole(pads)
    along = [a % x.ndim for a in whole(axes)] if axes is not None else list(range(x.ndim))
    before, after = [0] * x.ndim, [0] * x.ndim
    for axis, low, high in zip(along, amounts[: len(along)], amounts[len(along) :], strict=True):
        before[axis], after[axis] = low, high
    flat = [n for axis in reversed(range(x.ndim)) for n in (before[axis], after[axis])]
    return torch.nn.functional.pad(x, flat, value=0.0 if value is None else float(value))


def range_(start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    """On the CPU: how long it is depends on its values."""
    return torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype)


def constant_of_shape(target: Integers, *, value: tuple[float, torch.dtype] = (0.0, torch.float32)) -> Tensor:
    return torch.full(whole(target), value[0], dtype=value[1])


def cumsum(x: Tensor, axis: Integers, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
    along = whole(axis)[0]
    turned = x.flip(along) if reverse else x
    total = turned.cumsum(along).to(x.dtype)
    total = total - turned if exclusive else total
    return total.flip(along) if reverse else total


def top_k(
    x: Tensor, k: Integers, *, axis: int = -1, largest: int = 1, sorted: int = 1
) -> tuple[Tensor, Tensor]:
    return torch.topk(x, whole(k)[0], axis, bool(largest), bool(sorted))


def trilu(x: Tensor, k: Integers = 0, *, upper: int = 1) -> Tensor:
    diagonal = whole(k)[0]
    return x.triu(diagonal) if upper else x.tril(diagonal)


def one_hot(indices: Tensor, depth: Integers, values: Tensor, *, axis: int = -1) -> Tensor:
    classes = whole(depth)[0]
    chosen = _counted_from_start(indices, classes).unsqueeze(-1)
    hot = chosen == torch.arange(classes, device=indices.device)
    off, on = values.unbind()
    return torch.where(hot, on, off).movedim(-1, axis)


def non_zero(x: Tensor) -> Tensor:
    return x.nonzero().T


def cast(x: Tensor, *, to: torch.dtype, saturate: int = 1) -> Tensor:
    return x.to(to)


def cast_like(x: Tensor, like: Tensor, *, saturate: int = 1) -> Tensor:
    return x.to(like.dtype)
