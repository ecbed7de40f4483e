"""Formats of weights and activations: bits, granularity, symmetry, observer. Data only."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Observer = Literal["minmax", "avg_minmax", "percentile", "mse", "token_wise"]
OBSERVERS: dict[str, str] = {
    "minmax": "smallest and largest value seen",
    "avg_minmax": "mean over samples of each sample's extremes",
    "percentile": "quantiles of all values (streamed sketch)",
    "mse": "the clip with the smallest expected squared error (streamed sketch)",
    "token_wise": "quantile over tokens of each token's extremes, chosen on the model's output",
}
SMALLEST_GROUP = 8


class WeightScheme(BaseModel):
    """How a weight matrix W[K, N] is stored.

    ``per_channel``: one scale for each output column; ``group``: one scale for each run of
    ``group_size`` input rows of a column. Codes are signed: symmetric -(2^(b-1)-1) .. 2^(b-1)-1, asymmetric
    -2^(b-1) .. 2^(b-1)-1.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    bits: int = Field(ge=2, le=8, description="2 to 8")
    granularity: Literal["per_tensor", "per_channel", "group"] = Field(
        default="per_channel", description="what has one scale"
    )
    group_size: int | None = Field(default=None, ge=SMALLEST_GROUP, description="inputs in a group")
    symmetric: bool = Field(default=True, description="no zero points")
    clip: Literal["minmax", "mse"] = Field(
        default="mse", description="the range, or the clip with the least squared error"
    )

    @model_validator(mode="after")
    def _group(self) -> WeightScheme:
        if (self.granularity == "group") != (self.group_size is not None):
            raise ValueError("group_size goes with granularity 'group'")
        return self

    def __str__(self) -> str:
        where = f"g{self.group_size}" if self.group_size else self.granularity
        return f"int{self.bits} {where} {'symmetric' if self.symmetric else 'asymmetric'}"


class ActivationScheme(BaseModel):
    """How an activation X[tokens, C] is quantised.

    ``per_tensor`` static: one scale and zero point from calibration; ``channel_group`` static (PEG):
    ``groups`` equal runs of channels, sorted by range, with their own; ``per_token`` dynamic: min and max
    of each row at run time. Range always contains 0.
    ``outlier_threshold`` keeps channels whose |x| reaches it in float (LLM.int8; 6.0 in the paper).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    bits: int = Field(ge=2, le=8, description="2 to 8")
    granularity: Literal["per_tensor", "channel_group", "per_token"] = Field(
        default="per_tensor", description="what has one scale; per_token finds it at run time"
    )
    symmetric: bool = Field(default=False, description="zero in the middle of the range")
    observer: Observer = Field(default="token_wise", description="how a static range is found")
    groups: int = Field(default=6, ge=1, description="channel groups")
    outlier_threshold: float | None = Field(
        default=None, gt=0, description="channels that reach it stay float (LLM.int8)"
    )

    @property
    def dynamic(self) -> bool:
        """Whether ranges are found at run time."""
        return self.granularity == "per_token"

    @property
    def plain(self) -> bool:
        """Whether one static scale serves the whole tensor."""
        return self.granularity == "per_tensor" and self.outlier_threshold is None

    def __str__(self) -> str:
        how = "dynamic" if self.dynamic else f"static {self.observer}"
        return f"uint{self.bits} {self.granularity} {'symmetric' if self.symmetric else 'asymmetric'} {how}"


_NAME = re.compile(r"^w(\d)a(\d+)(?:_(static))?(?:_g(\d+))?$")


def parse_name(name: str) -> tuple[WeightScheme, ActivationScheme | None] | None:
    """Schemes of a recipe name such as ``w8a8_static`` or ``w4a16_g128``; None if it is not one."""
    match = _NAME.match(name)
    if match is None:
        return None
    w_bits, a_bits = int(match[1]), int(match[2])
    if not 2 <= w_bits <= 8 or not (2 <= a_bits <= 8 or a_bits == 16) or (a_bits == 16 and match[3]):
        return None
    group = int(match[4]) if match[4] else None
    if group is not None and group < SMALLEST_GROUP:
        return None
    weights = WeightScheme(
        bits=w_bits,
        granularity="group" if group else "per_channel",
        group_size=group,
        symmetric=w_bits > 4 or a_bits != 16,
    )
    if a_bits == 16:
        return weights, None
    return weights, ActivationScheme(bits=a_bits, granularity="per_tensor" if match[3] else "per_token")
