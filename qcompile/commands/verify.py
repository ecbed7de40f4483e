"""``verify``: prove a compiled folder again; exit code 1 where a proof fails."""

from __future__ import annotations

from pathlib import Path

import click

from qcompile.commands import options
from qcompile.commands.text import columns
from qcompile.errors import GateError

WORDS = {True: "ok", False: "FAILED", None: "unknown"}


@click.command("verify", short_help="prove a compiled folder again")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--model",
    "original",
    metavar="ORIGINAL",
    help="The model it was compiled from; its outputs are compared.",
)
@click.option(
    "--calib", type=click.Path(path_type=Path), metavar="PATH", help="Samples to run; default a small built-in text."
)
@click.option(
    "--tokenizer", type=click.Path(path_type=Path), metavar="DIR", help="Folder with tokenizer.json."
)
@click.option(
    "--length",
    type=options.COUNT,
    default=512,
    show_default=True,
    metavar="N",
    help="Tokens per sample at most.",
)
@options.allow_pickle
@options.debug
def verify(
    folder: Path, original: str | None, calib: Path | None, tokenizer: Path | None, length: int,
    allow_pickle: bool,
) -> None:  # fmt: skip
    """Check the files, the interface, the outputs and the kernels of the compiled model in FOLDER."""
    from qcompile import manifest, verification
    from qcompile.environment import warn_of_saturation

    warn_of_saturation(manifest.load(folder)["kernels"])
    checks = verification.verify(
        folder, original, calibration=calib, tokenizer=tokenizer, max_length=length, allow_pickle=allow_pickle
    )
    click.echo(columns([(c.name, WORDS[c.holds], c.found) for c in checks]))
    failed = [c.name for c in checks if c.holds is False]
    if failed:
        what = f"verification of '{folder}' failed: {', '.join(failed)}"
        raise GateError(what, hint="the lines above say how; compile the model again to replace the folder")
