"""Decoding of SmolLM2 with a key/value cache: time and cache of one token after another, and perplexity.

    python -m benchmarks.decode --model smollm2 --wikitext DIR --rows w4a16_g32,w4a16_g32=cpu{accuracy_level=4} \\
        --out benchmarks/results/smollm2_decode

A row is RECIPE[:PASS+PASS][=TARGET]. All programs read the same text and are timed in turns, token by token, in one
process. Perplexity is teacher-forced over the first --windows windows of the protocol, read in pieces, so that most
keys and values come from the cache. Programs that --programs already holds are not made again.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks import options, protocol
from benchmarks.jobs import run_job
from benchmarks.results import Results
from qcompile import manifest
from qcompile.backends.base import program_at

if TYPE_CHECKING:
    from qcompile.generation import Decoder

MODEL = "smollm2"
PIECE = 64  # tokens that are read at once; the past of the others comes from the cache
FLOAT = "float export"


def programs(rows: Sequence[str], model: Path, folder: Path, calibration: Path) -> dict[str, Path]:
    """The programs to time by their names in the table; the float export is the first."""
    found = {FLOAT: model}
    for text in rows:
        wanted = options.Wanted.parse(text)
        plain = dataclasses.replace(wanted, target=options.TARGET)
        made = folder / f"{plain.file(MODEL)}-decode-{wanted.target}"
        if not (made / manifest.FILE).is_file():
            done = run_job("compile", model=model, out=made, calibration=calibration, **wanted.settings)
            if done.error:
                raise SystemExit(f"error: {text} did not compile: {done.error}")
        found[wanted.name] = program_at(made)
    return found


def times(decoders: Mapping[str, Decoder], ids: np.ndarray, context: int) -> dict[str, list[float]]:
    """Milliseconds of each token of ``ids`` (1, tokens) behind the first ``context``, all programs in turns."""
    taken: dict[str, list[float]] = {name: [] for name in decoders}
    for decoder in decoders.values():
        decoder.reset()
        decoder.feed(ids[:, :context])
    for place in range(context, ids.shape[1]):
        for name, decoder in decoders.items():
            start = time.perf_counter()
            decoder.feed(ids[:, place : place + 1])
            taken[name].append(1e3 * (time.perf_counter() - start))
    return taken


def perplexity(decoder: Decoder, windows: Sequence[Sequence[int]]) -> float:
    """Of the windows' tokens after their first, each window read in pieces."""
    nats = []
    for window in windows:
        ids = np.array([window], np.int64)
        decoder.reset()
        pieces = [decoder.feed(ids[:, start : start + PIECE])[0] for start in range(0, ids.shape[1], PIECE)]
        nats.append(protocol.next_token_nats(np.concatenate(pieces), ids[0]))
    return float(np.exp(np.mean(nats)))


def row(
    name: str, taken: list[float], decoder: Decoder, tokens: int, score: float | None, path: Path
) -> dict[str, Any]:
    """A row of the table; the decoder has read ``tokens`` tokens."""
    files = path.iterdir() if path.is_dir() else path.parent.glob(f"{path.name}*")
    held = sum(file.stat().st_size for file in files if file.name not in (manifest.FILE, manifest.REPORT))
    return {
        "key": name,
        "name": name,
        "min_ms": min(taken),
        "median_ms": statistics.median(taken),
        "cache_bytes": decoder.cache_bytes / tokens,
        "file_mb": held / 1e6,
        "perplexity": score,
        "load": options.load(),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    from qcompile.generation import Decoder

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.decode", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.common(parser)
    parser.add_argument("--rows", default="", metavar="A,B", help="RECIPE[:PASS+PASS][=TARGET], ...")
    parser.add_argument("--context", type=int, default=128, metavar="N", help="tokens before the timed ones")
    parser.add_argument("--tokens", type=int, default=64, metavar="N", help="timed tokens")
    parser.add_argument("--windows", type=int, default=0, metavar="N", help="of the perplexity; 0 leaves it out")
    parser.add_argument("--threads", type=int, default=1, metavar="N")
    given = parser.parse_args(arguments)
    data = options.data(parser, given)
    if not isinstance(data, protocol.WikiText):
        parser.error(f"only {MODEL} decodes")
    about = {"context": given.context, "tokens": given.tokens, "windows": given.windows, "threads": given.threads}
    results = Results(given.out, "decode", model=MODEL, command=options.shown("decode", given), **about)
    model = options.model(MODEL, with_past=True)
    with tempfile.TemporaryDirectory(prefix="qcompile-bench-") as scratch:
        rows = [protocol.feeds([ids]) for ids in data.calibration(data.samples)]
        calibration = protocol.write_calibration(rows, Path(scratch) / "calibration")
        wanted = [text for text in given.rows.split(",") if text]
        found = programs(wanted, model, options.programs(given, Path(scratch)), calibration)
        decoders = {name: Decoder.open(path, given.threads) for name, path in found.items()}
        length = given.context + given.tokens
        taken = times(decoders, np.array([data.read_windows("test", 1)[0][:length]]), given.context)
        windows = data.read_windows("test", given.windows) if given.windows else []
        for name, decoder in decoders.items():
            read = min(length, protocol.WINDOW)
            made = row(name, taken[name], decoder, read, None, found[name])
            results.add(made | {"perplexity": perplexity(decoder, windows) if windows else None})
    print(results.markdown())


if __name__ == "__main__":
    main()
