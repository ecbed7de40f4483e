"""``qcompile MODEL``: compile, and print what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from qcompile.commands import options
from qcompile.commands.text import columns


@click.command("compile", short_help="compile a model (the verb may be left out)")
@click.argument("model")
@click.option(
    "--recipe",
    default="w8a8_static",
    show_default=True,
    metavar="NAME|FILE.toml",
    help="What to quantise and how; see `qcompile recipes`.",
)
@click.option(
    "--passes",
    default=None,
    metavar="a,b{opt=v}",
    help="The transforms; default os_plus where activations are quantised. See `qcompile passes`.",
)
@click.option("--target", default="cpu", show_default=True, metavar="T", help="See `qcompile targets`.")
@options.calibration
@click.option(
    "--max-drop",
    type=options.BOUND,
    metavar="X",
    help="Allowed drop of the output metric; keeps the fewest places in higher precision.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Where to write; default MODEL-RECIPE in the current folder.",
)
@click.option(
    "--dump", type=click.Path(path_type=Path), metavar="DIR", help="Write the model after each pass."
)
@click.option(
    "--resume",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Keep the blocks that are learned here, and go on behind them after a kill.",
)
@click.option("--strict", is_flag=True, help="With int_only: an operator without an integer form is an error.")
@click.option("--force", is_flag=True, help="Replace everything in the output folder.")
@click.option(
    "--seed", type=int, default=0, show_default=True, metavar="N", help="Seed of random calibration data."
)
@options.with_past
@options.allow_pickle
@options.debug
def compile_command(
    model: str, recipe: str, passes: str | None, target: str, calib: Path | None, tokenizer: Path | None,
    samples: int, length: int, max_drop: float | None, output: Path | None, dump: Path | None,
    resume: Path | None, strict: bool, force: bool, seed: int, with_past: bool, allow_pickle: bool,
) -> None:  # fmt: skip
    """Compile MODEL (.onnx, a Hugging Face folder or package.module:factory) into a low-bit program.

    Writes model.onnx, manifest.json and report.html to the output folder, all or nothing.
    """
    from qcompile import driver

    where = output if output is not None else default_output(model, recipe)
    with driver.compile(
        model, recipe=recipe, passes=passes, target=target, calibration=calib, tokenizer=tokenizer,
        max_drop=max_drop, max_samples=samples, max_length=length, seed=seed, dump=dump,
        resume=resume, strict=strict, output=where, force=force, with_past=with_past, allow_pickle=allow_pickle,
    ) as compiled:  # fmt: skip
        click.echo(columns(summary(compiled.manifest, where)))


def default_output(model: str, recipe: str) -> Path:
    """``bert/model.onnx`` and ``w8a8`` -> ``bert-w8a8``."""
    path = Path(model)
    name = path.resolve().parent.name if path.name == "model.onnx" else path.stem
    return Path(f"{name.rpartition(':')[2] or 'model'}-{Path(recipe).stem}")


def summary(record: Mapping[str, Any], where: Path) -> list[tuple[str, str]]:
    """The rows that a compilation ends with."""
    from qcompile.manifest import REPORT
    from qcompile.report import decibels, kernel_counts, proof_words, random_words, size_words

    ratio, sizes = size_words(record["sizes"]["before"], record["sizes"]["after"])
    kernels = record["kernels"]
    low = sum(1 for k in kernels if k["low_bit"])
    counts = ", ".join(f"{name} {count}" for name, count in kernel_counts(kernels).items())
    rows = [
        ("program", f"{where} ({record['recipe']['name']} for {record['target']['name']})"),
        ("size", f"{sizes} ({ratio})"),
        ("kernels", f"{low} of {len(kernels)} matmuls in low bits" + (f": {counts}" if counts else "")),
        ("end to end", proof_words(record["end_to_end"]) + random_words(record)),
    ]
    worst = sorted(
        (x for x in record["layers"] if x["sqnr_db"] is not None), key=lambda x: float(x["sqnr_db"])
    )
    if worst:
        listed = [f"{x['site']} {decibels(x['sqnr_db'])}" for x in worst[:3]]
        rows.append(("worst layers", ", ".join(listed)))
    effects = next((p["facts"]["effects"] for p in record["passes"] if "effects" in p["facts"]), None)
    if effects is not None:
        apart = ", ".join(f"{what} {_figure(effects[what])}" for what in ("weights", "activations", "both"))
        rows.append(("error of", f"{apart} ({effects['measure']})"))
    left = sum(len(p["skips"]) for p in record["passes"])
    if left:
        rows.append(("left alone", f"{left} places; `qcompile explain {where}` says why"))
    if record["gate"] is not None:
        gate = record["gate"]
        rows.append(("gate", f"{gate['metric']} dropped by {gate['drop']:.4g}, allowed {gate['max_drop']:g}"))
    return [*rows, ("report", str(where / REPORT))]


def _figure(value: float | None) -> str:
    """A number of the manifest, which holds None for what is not finite."""
    return "not finite" if value is None else f"{value:g}"
