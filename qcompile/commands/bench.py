"""``bench``: time a program against another in turns, beside the lower bound of the roofline."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qcompile.commands import options
from qcompile.commands.text import columns
from qcompile.errors import UserError

if TYPE_CHECKING:
    from qcompile.pipeline import Arrays

Row = tuple[str, float, float | None, float, float | None]


@click.command("bench", short_help="time a program against the original, in turns")
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--against",
    type=click.Path(path_type=Path),
    required=True,
    metavar="ORIGINAL",
    help="The .onnx file (or folder with model.onnx) to compare with.",
)
@click.option(
    "--batch", type=click.IntRange(min=1), default=1, show_default=True, metavar="N", help="Batch size."
)
@click.option(
    "--seq", type=click.IntRange(min=1), default=128, show_default=True, metavar="N", help="Tokens."
)
@click.option(
    "--threads", type=click.IntRange(min=1), default=1, show_default=True, metavar="N", help="Threads."
)
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    default=15,
    show_default=True,
    metavar="N",
    help="Runs of each, in turns.",
)
@options.debug
def bench(model: Path, against: Path, batch: int, seq: int, threads: int, rounds: int) -> None:
    """Time MODEL (a compiled folder or an .onnx file) on random inputs, taking turns with ORIGINAL.

    Trust the ratios: times in milliseconds move with whatever else the machine does.
    """
    from qcompile import roofline
    from qcompile.backends.base import open_session, program_at
    from qcompile.calibration.runner import run_session

    mine, original = program_at(model), onnx_file(against)
    feeds = random_feeds(original, batch, seq)
    runs: list[Callable[[], Any]] = []
    for path in (original, mine):
        session = open_session(path, threads=threads)
        given = {i.name: feeds[i.name] for i in session.get_inputs() if i.name in feeds}
        runs.append(functools.partial(run_session, session, None, given))
    before, after = in_turns(runs, rounds)
    work = roofline.work(original, feeds)
    rows = [_row("original", before, before), _row("compiled", after, before)]
    click.echo(f"{mine} against {original}")
    click.echo(f"batch {batch}, {seq} tokens, {threads} threads, {rounds} rounds in turns")
    if work.linear:
        rows += _bounds(work, roofline.rates(work.shape, threads), min(before))
    click.echo(columns(rows, ("", "min ms", "median ms", "ratio of minima", "ratio of medians")))
    for op, count in work.uncounted.items():
        click.echo(f"the work of {count} {op} is not in the bounds")


def onnx_file(path: Path) -> Path:
    """The ONNX file that ``path`` names: itself, or model.onnx in it."""
    found = path / "model.onnx" if path.is_dir() else path
    if not found.is_file():
        raise UserError(f"no ONNX file at '{path}'", hint="give an .onnx file or a folder with model.onnx")
    return found


def random_feeds(model: Path, batch: int, length: int) -> Arrays:
    """Random inputs of ``batch`` rows for the model; masks are all ones."""
    import numpy as np
    import onnx_ir as ir

    from qcompile.calibration.inputs import complete, drawn_inputs, model_inputs

    try:
        inputs = model_inputs(ir.load(model))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"cannot read '{model}': {error}", hint="is it an ONNX file?") from error
    generator = np.random.default_rng(0)
    drawn = {}
    for item in drawn_inputs(inputs):
        sides = [side if isinstance(side, int) else length for side in item.shape[1:]]
        shape = [item.shape[0] if isinstance(item.shape[0], int) else batch, *sides]
        if item.is_discrete:
            drawn[item.name] = generator.integers(0, item.vocabulary or 2, shape).astype(item.dtype)
        else:
            drawn[item.name] = generator.standard_normal(shape).astype(item.dtype)
    return complete(drawn, inputs)


def in_turns(runs: list[Callable[[], Any]], rounds: int) -> list[list[float]]:
    """Milliseconds of ``rounds`` runs of each function, taken in turns after one to warm up."""
    from qcompile.progress import track

    for run in runs:
        run()
    times: list[list[float]] = [[] for _ in runs]
    for _ in track(range(rounds), "timing"):
        for run, held in zip(runs, times, strict=True):
            start = time.perf_counter()
            run()
            held.append(1e3 * (time.perf_counter() - start))
    return times


def _row(name: str, times: list[float], base: list[float]) -> Row:
    low, middle = min(times), statistics.median(times)
    return name, low, middle, min(base) / low, statistics.median(base) / middle


def _bounds(work: Any, rates: Any, base: float) -> list[Row]:
    attention = work.attention / rates.fp32
    bounds = {
        "float32": work.linear / rates.fp32 + attention,
        "int8": work.linear / rates.u8s8 + attention,
    }
    gemm = {"float32": rates.fp32, "int8": rates.u8s8}
    return [
        (
            f"bound, {kind} linears at {gemm[kind] / 1e9:.0f} GOP/s",
            1e3 * s,
            None,
            base / (1e3 * s),
            None,
        )
        for kind, s in bounds.items()
    ]
