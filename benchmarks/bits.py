"""One integer-only program, many ways to run it: the SHA-256 of its last integers and of its floats.

    python -m benchmarks.bits compiled_folder [more folders]

Each line is the same run of made-up token ids (of two rows, the second padded): ONNX Runtime with and without its
optimisations, with two threads, every operator in NumPy (small programs), and ONNX Runtime on an emulated ARM
processor. The exit code is 1 where a digest differs.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx

from tests.emulated import aarch64, digests
from tests.integer.programs import expose, in_numpy

Array = np.ndarray
ROWS, LENGTH, PADDED, HIGHEST = 2, 9, 3, 256
SMALL = 20 * 2**20  # bytes of a program that NumPy runs in seconds
SCRIPT = Path(digests.__file__)


def feeds_of(model: onnx.ModelProto) -> dict[str, Array]:
    """Ids for ``input_ids``, a mask of ones and zeros, and zeros for every other input."""
    ids = np.random.default_rng(0).integers(3, HIGHEST, (ROWS, LENGTH))
    mask = np.ones_like(ids)
    mask[1, LENGTH - PADDED :] = 0
    known = {"input_ids": ids, "attention_mask": mask}
    return {port.name: known.get(port.name, np.zeros_like(ids)) for port in model.graph.input}


def digested(found: dict[str, Array]) -> dict[str, str]:
    return {name: digests.digest([array]) for name, array in found.items()}


def ways(program: Path, feeds: dict[str, Array]) -> dict[str, Callable[[], dict[str, str]]]:
    """How to run it, by name."""

    def emulated() -> dict[str, str]:
        with tempfile.TemporaryDirectory() as folder:
            held = Path(folder) / "feeds.npz"
            np.savez(held, allow_pickle=False, **feeds)
            return dict(line.split() for line in aarch64.run(SCRIPT, str(program), str(held)).splitlines())

    found: dict[str, Callable[[], dict[str, str]]] = {
        "all optimisations": lambda: digested(digests.outputs(program, feeds)),
        "no optimisation": lambda: digested(digests.outputs(program, feeds, optimised=False)),
        "two threads": lambda: digested(digests.outputs(program, feeds, threads=2)),
    }
    if program.stat().st_size <= SMALL:
        found["in NumPy"] = lambda: digested(in_numpy(program, feeds))
    return {**found, f"aarch64 ({aarch64.CPU}, emulated)": emulated}


def table(folder: Path) -> bool:
    """Print the digests of the program in ``folder``; whether all are alike."""
    model = expose(onnx.load(folder / "model.onnx"))
    with tempfile.TemporaryDirectory() as kept:
        program = Path(kept) / "model.onnx"
        onnx.save(model, program)
        first: dict[str, str] = {}
        alike = True
        for way, run in ways(program, feeds_of(model)).items():
            try:
                found = run()
            except aarch64.Missing as error:
                print(f"| {folder.name} | {way} | | not run: {error} |")
                continue
            first = first or found
            alike &= found == first
            for name, text in found.items():
                print(f"| {folder.name} | {way} | {name} | {text[:16]} |", flush=True)
    return alike


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folders", nargs="+", type=Path)
    print("| program | run | output | SHA-256, first 16 digits |\n| --- | --- | --- | --- |")
    sys.exit(0 if all([table(folder) for folder in parser.parse_args().folders]) else 1)


if __name__ == "__main__":
    main()
