"""What goes to an Android phone against the packed weights alone.

    python -m benchmarks.mobile --model MODEL --name smollm2 --recipe w4a16_g128 --out benchmarks/results/mobile

The packed weights are every constant of the quantised program: codes and zero points in the bits that their range
takes, all else, scales among it, in the bits of its type; nothing is compressed. The package is what ships: library,
plan and parameters.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

import qcompile
from benchmarks.results import Results

RANGED = ("_codes", "_zero_point")


def packed_bytes(model: ir.Model) -> int:
    """The bytes of every constant of ``model`` in as few bits as hold it."""
    return sum(math.ceil(value.const_value.size * _bits(value) / 8) for value in model.graph.initializers.values()
               if value.const_value is not None)  # fmt: skip


def _bits(value: ir.Value) -> int:
    held = value.const_value
    assert held is not None
    if not str(value.name).endswith(RANGED):
        return int(held.dtype.bitwidth)
    codes = held.numpy()
    return (int(codes.max()) - int(codes.min())).bit_length()


def measured(model: Path, recipe: str, target: str) -> dict[str, Any]:
    """Sizes in bytes of a package for ``target``."""
    with tempfile.TemporaryDirectory(prefix="qcompile-bench-") as scratch:
        made = qcompile.compile(model, recipe=recipe, target=target, max_samples=2, max_length=32, dump=scratch)
        with made:
            (quantised,) = Path(scratch).glob("*-quantise.onnx")
            shipped = {name: (made.folder / name).stat().st_size for name in made.manifest["device"]["ship"]}
            return {"shipped": shipped, "packed": packed_bytes(ir.load(quantised))}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.mobile", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, type=Path, metavar="FILE", help="the float model")
    parser.add_argument("--name", required=True, help="of the model, in the table")
    parser.add_argument("--recipe", default="w4a16_g128")
    parser.add_argument("--target", default="android")
    parser.add_argument("--out", required=True, type=Path, metavar="NAME", help="NAME.json and NAME.md; rows are added")
    given = parser.parse_args(arguments)
    command = (
        f"python -m benchmarks.mobile --model MODEL --name {given.name} --recipe {given.recipe} "
        f"--target {given.target} --out {given.out}"
    )
    results = Results(given.out, "mobile", model="phones", threads=1, command=command)
    key = f"{given.name} {given.recipe} {given.target}"
    about = {"key": key, "model": given.name, "recipe": given.recipe, "target": given.target}
    results.add(about | measured(given.model, given.recipe, given.target))
    print(results.markdown())


if __name__ == "__main__":
    main()
