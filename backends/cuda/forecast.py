"""How long a program would take at least: bytes and operations of each launch, at the rates that makers publish.

A prediction, of no GPU's clock: a launch takes the longer of its bytes at the memory's rate (each tensor once) and its
operations at its unit's rate, on as many multiprocessors as it has blocks. Left out are
latency and caches; what launches themselves take is told beside it.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qcompile.backends.mobile.plan import evaluate

LENGTH = 128  # tokens of the texts that are forecast
LONGEST = 8  # kernels that a forecast names
LAUNCH = 2e-6  # seconds from the end of a kernel to the start of the next: an assumption, nobody publishes it


@dataclasses.dataclass(frozen=True)
class Gpu:
    """``memory``: bytes a second; ``units``: operations a second (dense); ``processors``: multiprocessors."""

    name: str
    memory: float
    processors: int
    units: Mapping[str, float]


GPUS = {
    "sm_80": Gpu(
        "A100 40 GB", 1.555e12, 108,
        {"int8": 624e12, "bfloat16": 312e12, "float32": 19.5e12, "dp4a": 78e12},
    ),
    "sm_90": Gpu(
        "H100 SXM", 3.35e12, 132,
        {"int8": 1979e12, "bfloat16": 989e12, "float32": 66.9e12, "dp4a": 134e12},
    ),
}  # fmt: skip
UNITS = {"int8_gemm": "int8", "int8_rows": "dp4a", "w4_gemm": "bfloat16", "w4_rows": "float32"}
TIMES = {"w4_gemm": 3}  # a float32 is three bfloat16


def unit_of(kernel: str) -> tuple[str, int]:
    """What multiplies in ``kernel``, and how often it does so for one product."""
    short = f"{kernel.partition('_')[0]}_{kernel.rpartition('_')[2]}"
    return UNITS.get(short, "float32"), TIMES.get(short, 1)


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one launch: bytes, operations, and the seconds of both."""

    kernel: str
    bytes: int
    operations: int
    memory: float
    unit: float

    @property
    def seconds(self) -> float:
        return max(self.memory, self.unit)


def costs(described: Mapping[str, Any], shapes: Sequence[Sequence[int]], gpu: Gpu) -> list[Cost]:
    """Every launch of the program that ``program.json`` describes, for inputs of ``shapes``."""
    variables = [shapes[number][axis] for number, axis in described["variables"]]
    dims = [evaluate(code, variables) for code in described["expressions"]]
    slots = described["slots"]

    def size(slot: int, work: int) -> int:
        held = slots[slot]
        count = math.prod(dims[dim] for dim in held["dims"])
        return int(min(count, work) * np.dtype(held["dtype"]).itemsize)

    found = []
    for launch in described["launches"]:
        blocks, work = dims[launch["grid"]], dims[launch["work"]]
        if not blocks:
            continue
        unit, times = unit_of(launch["kernel"])
        moved = sum(size(one, work) for one in {one for kind, one in launch["arguments"] if kind == "tensor"})
        rate = gpu.units[unit] * min(1.0, blocks / gpu.processors)
        operations = 2 * work * times
        found.append(Cost(launch["kernel"], moved, operations, moved / gpu.memory, operations / rate))
    return found


def forecast(described: Mapping[str, Any], shapes: Sequence[Sequence[int]], gpu: Gpu) -> dict[str, Any]:
    """A whole run: launches, bytes, predicted microseconds, and the kernels that take most of them."""
    every = costs(described, shapes, gpu)
    by_kernel: dict[str, list[Cost]] = defaultdict(list)
    for cost in every:
        by_kernel[cost.kernel].append(cost)
    total = {name: sum(cost.seconds for cost in held) for name, held in by_kernel.items()}
    first = sorted(total, key=lambda name: (-total[name], name))[:LONGEST]
    return {
        "shapes": {port["name"]: list(shape) for port, shape in zip(described["inputs"], shapes, strict=True)},
        "gpu": gpu.name,
        "launches": len(every),
        "bytes": sum(cost.bytes for cost in every),
        "operations": sum(cost.operations for cost in every),
        "predicted_us": round(1e6 * sum(total.values()), 1),
        "launches_us": round(1e6 * LAUNCH * len(every), 1),
        "longest": [
            {"kernel": name, "launches": len(by_kernel[name]), "predicted_us": round(1e6 * total[name], 1)}
            for name in first
        ],
    }


def usual(described: Mapping[str, Any]) -> list[list[list[int]]]:
    """Shapes of the inputs: a text of ``LENGTH`` tokens, and one token, after so many where there is a cache."""
    shapes = [port["shape"] for port in described["inputs"]]
    caches = [port["shape"] for port in described["inputs"] if not port["dtype"].startswith("int")]
    batch = {shape[0] for shape in shapes}
    past = {side for shape in caches for side in shape} - batch

    def size(side: int | str, tokens: int, before: int) -> int:
        if isinstance(side, int):
            return side
        parts = [part.strip() for part in side.split("+")]
        return sum(1 if part in batch else before if part in past else tokens for part in parts)

    return [
        [[size(side, tokens, before) for side in shape] for shape in shapes]
        for tokens, before in ((LENGTH, 0), (1, LENGTH if caches else 0))
    ]
