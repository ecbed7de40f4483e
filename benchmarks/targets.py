"""Whole models through targets: what a compilation costs, and its outputs beside those of the `cpu` program.

    python -m benchmarks.targets --model smollm2 --wikitext DIR --targets llvm --programs DIR \\
        --out benchmarks/results/targets

Each row is compiled by the command line in a process of its own, and again for `cpu`, which ONNX Runtime runs. MiniLM
reads sentences in padded batches; SmolLM2, exported with its cache, reads --context tokens at once and then --tokens
more, one at a time. Programs that --programs already holds are not made again. What fails is a row too. A program for a
machine that is not here has the compiler's own figure: of its stand-in against the float model, as in the report.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import options, protocol
from benchmarks.jobs import Finished, run_job
from benchmarks.results import Results

ROWS = "w8a8,w8a8_static,w4a16,w4a16_g128,w4a8,w8a8:os_plus+int_only"
COST = "cost.json"  # of a compilation, beside the folder that it made


def compiled(wanted: options.Wanted, model: str, onnx: Path, folder: Path, calibration: Path) -> tuple[Path, Finished]:
    """The folder of the program and what making it cost, then or now."""
    out = folder / f"{wanted.file(model)}-command"
    cost = out.with_suffix(f".{COST}")
    if cost.is_file() and out.is_dir():
        return out, Finished(**json.loads(cost.read_text(encoding="utf-8")))
    words = [str(onnx), "--recipe", wanted.recipe, "--target", wanted.target, "--calib", str(calibration)]
    words += [] if wanted.passes is None else ["--passes", wanted.passes]
    done = run_job("command", words=[*words, "-o", str(out), "--force"])
    if not done.error:
        cost.write_text(json.dumps(vars(done)), encoding="utf-8")
    return out, done


def row(
    wanted: options.Wanted, model: str, out: Path, reference: Path, done: Finished, compared: Finished
) -> dict[str, Any]:
    """A row of the table. ``reference``: the program for `cpu`."""
    made: dict[str, Any] = {
        "key": f"{model} {wanted.name} {wanted.target}",
        "model": model,
        "name": dataclasses.replace(wanted, target=options.TARGET).name,
        "target": wanted.target,
        "seconds": done.result.get("seconds"),
        "cpu_seconds": done.cpu_seconds,
        "peak_mb": done.peak_mb,
        "compared": compared.result,
        "error": done.error or compared.error,
        "load": options.load(),
    }
    if not done.error:
        record = _manifest(out)
        made["mb"] = record["sizes"]["after"] / 1e6
        made["kernels"] = dict(sorted(Counter(kernel["kernel"] for kernel in record["kernels"]).items()))
        made["low_bit"] = sum(kernel["low_bit"] for kernel in record["kernels"])
        if "device" in record and reference.is_dir():
            made["run"] = record["device"]["run"]
            made["sqnr_db"] = [found["end_to_end"]["sqnr_db"] for found in (record, _manifest(reference))]
    return made


def _manifest(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.targets", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.common(parser)
    parser.add_argument("--rows", default=ROWS, metavar="A,B", help=f"RECIPE[:PASS+PASS], default {ROWS}")
    parser.add_argument("--targets", default="llvm", metavar="A,B", help="default llvm")
    parser.add_argument("--samples", type=int, default=8, metavar="N", help="of the calibration, default 8")
    parser.add_argument("--context", type=int, default=128, metavar="N", help="tokens that are read at once")
    parser.add_argument("--tokens", type=int, default=16, metavar="N", help="tokens that are read one at a time")
    given = parser.parse_args(arguments)
    data = options.data(parser, given)
    about = {"samples": given.samples, "context": given.context, "tokens": given.tokens}
    results = Results(given.out, "targets", command=options.shown("targets", given), **about)
    onnx = options.model(given.model, with_past=isinstance(data, protocol.WikiText))
    with tempfile.TemporaryDirectory(prefix="qcompile-bench-") as scratch:
        folder = options.programs(given, Path(scratch))
        batches = [protocol.feeds([ids[: given.context]]) for ids in data.calibration(given.samples)]
        calibration = protocol.write_calibration(batches, Path(scratch) / "calibration")
        asked = {"bench": given.model, "data": data.data, "tokenizer": data.tokenizer} | about
        for text in given.rows.split(","):
            reference, referred = compiled(options.Wanted.parse(text), given.model, onnx, folder, calibration)
            for target in given.targets.split(","):
                wanted = options.Wanted.parse(f"{text}={target}")
                out, done = compiled(wanted, given.model, onnx, folder, calibration)
                compared = Finished({}, 0.0, None, error=done.error or referred.error)
                if not compared.error:
                    compared = run_job("compare", program=out, reference=reference, **asked)
                results.add(row(wanted, given.model, out, reference, done, compared))
    print(results.markdown())


if __name__ == "__main__":
    main()
