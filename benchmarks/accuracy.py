"""Accuracy of compiled programs and of the peers: every score is of the file that a user would run.

    python -m benchmarks.accuracy --model minilm --stsb DIR --rows w8a8_static,w6a6_static --peers all \\
        --out benchmarks/results/minilm_accuracy

A row is RECIPE[:PASS+PASS][@MAX_DROP]; without passes it has the recipe's own, ``:none`` has none. Compiling
(with its CPU seconds and peak memory) and scoring are processes of their own.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import options, protocol
from benchmarks.jobs import Finished, run_job
from benchmarks.peers import PEERS, UNCALIBRATED
from benchmarks.results import Results


@dataclasses.dataclass(frozen=True)
class Bench:
    """Where the model and its data are. ``calibrations``: folders of .npz by their name in the table."""

    name: str
    model: Path
    data: protocol.Protocol
    programs: Path
    calibrations: dict[str, Path]
    limit: int | None

    def score(self, program: Path) -> Finished:
        return run_job(
            "score",
            bench=self.name,
            program=program,
            data=self.data.data,
            tokenizer=self.data.tokenizer,
            limit=self.limit,
        )

    def float_row(self) -> dict[str, Any]:
        return row("float export", "-", None, self.score(self.model))

    def compiled_row(self, wanted: options.Wanted, calibration: str) -> dict[str, Any]:
        """Compile, score, and count the block linears that run on static int8."""
        calib = self.calibrations[calibration]
        folder = self.programs / wanted.file(self.name) / calib.name
        made = run_job("compile", model=self.model, out=folder, calibration=calib, **wanted.settings)
        scored = made if made.error else self.score(folder / "model.onnx")
        return row(wanted.name, calibration, made, scored) | linears(made.result, self.data.head)

    def peer_row(self, peer: str, calibration: str) -> dict[str, Any]:
        call, package, _ = PEERS[peer]
        calib = self.calibrations[calibration]
        target = self.programs / f"{self.name}-{peer}" / f"{calib.name}.onnx"
        target.parent.mkdir(exist_ok=True)
        made = run_job("peer", peer=peer, model=self.model, out=target, calibration=calib)
        scored = made if made.error else self.score(target)
        return row(f"{package}: {call}", "-" if peer == UNCALIBRATED else calibration, made, scored)


def row(name: str, calibration: str, made: Finished | None, scored: Finished) -> dict[str, Any]:
    """A row of the table; ``made`` is None for the float export."""
    return {
        "key": f"{name} | {calibration}",
        "name": name,
        "calibration": calibration,
        "value": scored.result.get("value"),
        "cpu_seconds": made.cpu_seconds if made else None,
        "peak_mb": made.peak_mb if made else None,
        "file_mb": scored.result.get("file_mb"),
        "kernels": scored.result.get("kernels", {}),
        "linears": None,
        "exceptions": {},
        "error": scored.error,
    }


def linears(compiled: dict[str, Any], head: str) -> dict[str, Any]:
    """How many block linears there are and run on static int8, and those that the gate excepted."""
    known = {name: site for name, site in compiled.get("linears", {}).items() if not head or head not in name}
    if not known:
        return {}
    static = [n for n, site in known.items() if "static" in site["activations"] and site["low_bit"]]
    gate = compiled["gate"] or {"exceptions": {}, "linears": {}}
    excepted = {
        linear: scheme for value, scheme in gate["exceptions"].items() for linear in gate["linears"][value]
    }
    return {"linears": {"block": len(known), "static_int8": len(static)}, "exceptions": excepted}


def calibrations(data: protocol.Protocol, scratch: Path, padded: bool) -> dict[str, Path]:
    """The protocol's calibration samples, and the same ones padded."""
    rows = data.calibration(data.samples)
    named = {f"{len(rows)} samples": [protocol.feeds([ids]) for ids in rows]}
    if padded:
        batches = protocol.padded(rows)
        shape = f"{protocol.PADDED_BATCH} padded to {protocol.PADDED_TOKENS}"
        named[f"{len(batches)} batches of {shape}"] = batches
    folders = (scratch / name for name in (options.PLAIN, "padded"))
    return {
        name: protocol.write_calibration(batches, folder)
        for folder, (name, batches) in zip(folders, named.items(), strict=False)
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.common(parser)
    parser.add_argument("--rows", default="", metavar="A,B", help="RECIPE[:PASS+PASS][@MAX_DROP], ...")
    parser.add_argument("--max-drop", type=float, metavar="X", help="the gate of rows that name none")
    parser.add_argument("--padded", action="store_true", help="measure also with padded calibration batches")
    parser.add_argument("--peers", default="", metavar="A,B", help=f"all, or of: {', '.join(PEERS)}")
    parser.add_argument("--limit", type=int, metavar="N", help="a trial: the first N pairs or windows")
    given = parser.parse_args(arguments)
    wanted = [options.Wanted.parse(text, given.max_drop) for text in given.rows.split(",") if text]
    peers = list(PEERS) if given.peers == "all" else [name for name in given.peers.split(",") if name]
    data = options.data(parser, given)
    if given.padded and given.model != "minilm":
        parser.error("--padded is for sentences: windows of a text are all equally long")
    results = Results(
        given.out,
        "accuracy",
        model=given.model,
        metric=data.metric,
        digits=data.digits,
        limit=given.limit,
        command=options.shown("accuracy", given),
    )
    with tempfile.TemporaryDirectory(prefix="qcompile-bench-") as scratch:
        held = calibrations(data, Path(scratch), given.padded)
        programs = options.programs(given, Path(scratch))
        bench = Bench(given.model, options.model(given.model), data, programs, held, given.limit)
        results.add(bench.float_row())
        for index, calibration in enumerate(held):
            for one in wanted:
                results.add(bench.compiled_row(one, calibration))
            for peer in peers:
                if index == 0 or peer != UNCALIBRATED:
                    results.add(bench.peer_row(peer, calibration))
    print(results.markdown())


if __name__ == "__main__":
    main()
