"""The operator that a learned activation range is exported as: Clip, QuantizeLinear, DequantizeLinear."""

from __future__ import annotations

from typing import Any

import torch

UINT8_CODES = 255


@torch.library.custom_op("qcompile::static_clip", mutates_args=())
def static_clip(
    x: torch.Tensor, low: torch.Tensor, high: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor
) -> torch.Tensor:
    """``x`` on the grid (code - zero_point) * scale between ``low`` and ``high``; all but ``x`` are scalars."""
    codes = torch.round(x.clamp(low, high) / scale) + zero_point
    return ((codes.clamp(0, UINT8_CODES) - zero_point) * scale).to(x.dtype)


@static_clip.register_fake
def _(
    x: torch.Tensor, low: torch.Tensor, high: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor
) -> torch.Tensor:
    return torch.empty_like(x)


def translations() -> dict[Any, Any]:
    """What torch's ONNX exporter writes for the operator: its ``custom_translation_table``."""
    from onnxscript import opset21

    def clip(x, low, high, scale, zero_point):  # type: ignore[no-untyped-def]
        codes = opset21.QuantizeLinear(opset21.Clip(x, low, high), scale, zero_point)
        return opset21.DequantizeLinear(codes, scale, zero_point)

    return {torch.ops.qcompile.static_clip.default: clip}
