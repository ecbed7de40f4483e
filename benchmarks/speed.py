"""Speed of compiled programs and of a peer against the float export, in turns in one process.

    python -m benchmarks.speed --model minilm --stsb DIR --out benchmarks/results/minilm_speed

A row is RECIPE[:PASS+PASS][=TARGET], such as w8a8_static:os_plus=llvm.
 One thread unless --threads says otherwise, no spinning. Trust the ratios:
whatever else the machine does falls on all programs alike, and least on CPU time, which does not count waiting for a
CPU. Programs that --programs already holds (``accuracy`` leaves them there) are not made again.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import options, protocol
from benchmarks.jobs import run_job
from benchmarks.peers import PEERS, UNCALIBRATED
from benchmarks.results import Results

ROUNDS = {"minilm": 40, "smollm2": 12}
ROWS = "float,w8a8_static:os_plus,w8a8:os_plus"


def programs(name: str, rows: Sequence[str], model: Path, folder: Path, calibration: Path) -> dict[str, Path]:
    """What to time by its name in the table, an ONNX file or the folder of another program; the float export first."""
    from qcompile.backends.base import TVM_PROGRAM, program_at

    found = {"float export": model}
    made = {"model": model, "calibration": calibration}
    for wanted in map(options.Wanted.parse, rows):
        target = folder / wanted.file(name) / options.PLAIN
        if not any((target / name).is_file() for name in ("model.onnx", TVM_PROGRAM)):
            _check(run_job("compile", out=target, **made, **wanted.settings).error, wanted.name)
        found[wanted.name] = program_at(target)
    call, package, _ = PEERS[UNCALIBRATED]
    target = folder / f"{name}-{UNCALIBRATED}" / f"{options.PLAIN}.onnx"
    target.parent.mkdir(exist_ok=True)
    if not target.is_file():
        _check(run_job("peer", peer=UNCALIBRATED, out=target, **made).error, call)
    return found | {f"{package}: {call}": target}


def _check(error: str, what: str) -> None:
    if error:
        raise SystemExit(f"error: {what} did not compile: {error}")


def measure(files: Mapping[str, Path], batch: int, tokens: int, threads: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of every program at one shape, and the roofline's bounds in the same minutes."""
    from qcompile import roofline
    from qcompile.commands.bench import random_feeds

    export = next(iter(files.values()))
    feeds = random_feeds(export, batch, tokens)
    times = in_turns([_runner(path, feeds, threads) for path in files.values()], rounds)
    work = roofline.work(export, feeds)
    rates = roofline.rates(work.shape, threads)
    attention = work.attention / rates.fp32
    bounds = {
        f"bound: {kind} linears at {rate / 1e9:.0f} GOP/s": work.linear / rate + attention
        for kind, rate in (("float", rates.fp32), ("int8", rates.u8s8))
    }
    return {
        "key": f"{batch}x{tokens}",
        "batch": batch,
        "tokens": tokens,
        "rounds": rounds,
        "load": options.load(),
        "programs": [
            {
                "name": name,
                "min_ms": min(wall),
                "median_ms": statistics.median(wall),
                "cpu_ms": statistics.median(cpu),
            }
            for name, (wall, cpu) in zip(files, times, strict=True)
        ],
        "bounds": [{"name": name, "ms": 1e3 * seconds} for name, seconds in bounds.items()],
    }


def in_turns(runs: Sequence[Callable[[], Any]], rounds: int) -> list[tuple[list[float], list[float]]]:
    """Wall and CPU milliseconds of ``rounds`` runs of each function, taken in turns after one to warm up."""
    times: list[tuple[list[float], list[float]]] = [([], []) for _ in runs]
    for run in runs:
        run()
    for _ in range(rounds):
        for run, (wall, cpu) in zip(runs, times, strict=True):
            started, used = time.perf_counter(), time.process_time()
            run()
            wall.append(1e3 * (time.perf_counter() - started))
            cpu.append(1e3 * (time.process_time() - used))
    return times


def _runner(path: Path, feeds: protocol.Arrays, threads: int) -> Callable[[], Any]:
    from qcompile.backends.base import open_session

    session = open_session(path, threads=threads)
    wanted = {i.name for i in session.get_inputs()}
    return functools.partial(session.run, None, {k: v for k, v in feeds.items() if k in wanted})


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.common(parser)
    parser.add_argument("--rows", default=ROWS, metavar="A,B", help=f"default {ROWS}")
    parser.add_argument("--shapes", metavar="BxT,...", help="default: those of the README's table")
    parser.add_argument("--threads", type=int, default=1, metavar="N")
    parser.add_argument("--rounds", type=int, metavar="N", help=f"default {ROUNDS}")
    given = parser.parse_args(arguments)
    data = options.data(parser, given)
    shapes = data.shapes
    if given.shapes:
        shapes = tuple((int(b), int(t)) for b, t in (text.split("x") for text in given.shapes.split(",")))
    results = Results(
        given.out,
        "speed",
        model=given.model,
        threads=given.threads,
        command=options.shown("speed", given),
    )
    model = options.model(given.model)
    with tempfile.TemporaryDirectory(prefix="qcompile-bench-") as scratch:
        rows = [protocol.feeds([ids]) for ids in data.calibration(data.samples)]
        calibration = protocol.write_calibration(rows, Path(scratch) / "calibration")
        folder = options.programs(given, Path(scratch))
        files = programs(given.model, given.rows.split(","), model, folder, calibration)
        for batch, tokens in shapes:
            results.add(measure(files, batch, tokens, given.threads, given.rounds or ROUNDS[given.model]))
    print(results.markdown())


if __name__ == "__main__":
    main()
