"""What compiling costs: CPU seconds and peak memory with few and with many calibration samples, per observer.

    python -m benchmarks.cost --model minilm --stsb DIR --out benchmarks/results/minilm_cost

Memory must not grow with the number of samples. Every compile is a process of its own; its peak counts files
that are mapped into memory. The cost of each row of the accuracy tables stands in those tables.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import options, protocol
from benchmarks.jobs import Finished, run_job
from benchmarks.results import Results

OBSERVERS = ("token_wise", "minmax", "avg_minmax", "percentile", "mse")
SAMPLES = "32,256"


def static_recipe(observer: str) -> dict[str, Any]:
    """W8A8 static with one observer, as ``Recipe`` reads it."""
    from qcompile.recipe import load

    base = load("w8a8_static").model_dump(mode="json")
    for rule in base["rules"]:
        if rule["op"] == "linear":
            rule["activations"]["observer"] = observer
    return base | {"name": f"w8a8_static_{observer}"}


def row(observer: str, runs: Sequence[Finished]) -> dict[str, Any]:
    """A row of the table from the runs with each number of samples."""
    return {
        "key": observer,
        "name": observer,
        "cpu_seconds": [run.cpu_seconds for run in runs],
        "peak_mb": [run.peak_mb for run in runs],
        "error": next((run.error for run in runs if run.error), ""),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cost",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.common(parser)
    parser.add_argument("--observers", default=",".join(OBSERVERS), metavar="A,B", help="default: all")
    parser.add_argument("--samples", default=SAMPLES, metavar="FEW,MANY", help=f"default {SAMPLES}")
    parser.add_argument("--passes", metavar="A,B", help="the transforms; default: the recipe's")
    given = parser.parse_args(arguments)
    counts = [int(text) for text in given.samples.split(",")]
    data = options.data(parser, given)
    results = Results(
        given.out,
        "cost",
        model=given.model,
        samples=counts,
        passes=given.passes,
        command=options.shown("cost", given),
    )
    model = options.model(given.model)
    with tempfile.TemporaryDirectory(prefix="qcompile-bench-") as scratch:
        folder = Path(scratch)
        calibrations = []
        for count in counts:
            batches = [protocol.feeds([ids]) for ids in data.calibration(count)]
            calibrations.append(protocol.write_calibration(batches, folder / str(count)))
        for observer in given.observers.split(","):
            settings = {"recipe": static_recipe(observer), "passes": given.passes, "max_samples": max(counts)}
            settings |= {"model": model, "out": folder / "program"}
            results.add(row(observer, [run_job("compile", calibration=c, **settings) for c in calibrations]))
    print(results.markdown())


if __name__ == "__main__":
    main()
