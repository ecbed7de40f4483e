"""``verify``: prove a compiled folder again, or that a program is integer-only; exit code 1 where a proof fails."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qcompile.commands import options
from qcompile.commands.text import columns, show
from qcompile.errors import GateError, UserError

if TYPE_CHECKING:
    from qcompile.proof.prove import IntegerProof

WORDS = {True: "ok", False: "FAILED", None: "unknown"}
SHOWN = 40  # findings; the rest is counted


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
    metavar="N",
    help="Tokens per sample at most; default as when it was compiled.",
)
@click.option(
    "--integer-only",
    is_flag=True,
    help="Prove too that nothing computes in floats and that nothing overflows; FOLDER may then be an .onnx file.",
)
@click.option(
    "--bound",
    "bounds",
    multiple=True,
    metavar="NAME=N",
    help="The largest size of a dynamic dim, for --integer-only; may be given several times.",
)
@options.allow_pickle
@options.debug
def verify(
    folder: Path, original: str | None, calib: Path | None, tokenizer: Path | None, length: int | None,
    integer_only: bool, bounds: Sequence[str], allow_pickle: bool,
) -> None:  # fmt: skip
    """Check the files, the interface, the outputs and the kernels of the compiled model in FOLDER."""
    sizes = _sizes(bounds)
    if sizes and not integer_only:
        raise UserError("--bound says nothing without --integer-only", hint="add --integer-only, or leave it out")
    rows: list[tuple[str, bool | None, str]] = []
    if not (integer_only and folder.is_file()):
        rows += _compiled(folder, original, calib, tokenizer, length, allow_pickle)
    elif original is not None:
        raise UserError("--model is for a compiled folder", hint=f"leave it out: '{folder}' is a file")
    proof = _integer_proof(folder, sizes) if integer_only else None
    if proof is not None:
        rows += [(check.name, check.holds, check.found) for check in proof.checks()]
    click.echo(columns([(name, WORDS[holds], found) for name, holds, found in rows]))
    if proof is not None:
        _show(proof)
    failed = [name for name, holds, _ in rows if holds is False]
    if failed:
        what = f"verification of '{folder}' failed: {', '.join(failed)}"
        raise GateError(what, hint="the lines above say how; compile the model again to replace the folder")


def _compiled(
    folder: Path,
    original: str | None,
    calib: Path | None,
    tokenizer: Path | None,
    length: int | None,
    allow_pickle: bool,
) -> list[tuple[str, bool | None, str]]:
    """The checks of a compiled folder."""
    from qcompile import manifest, verification
    from qcompile.environment import warn_of_saturation

    warn_of_saturation(manifest.load(folder)["kernels"])
    checks = verification.verify(
        folder, original, calibration=calib, tokenizer=tokenizer, max_length=length, allow_pickle=allow_pickle
    )
    return [(check.name, check.holds, check.found) for check in checks]


def _sizes(bounds: Sequence[str]) -> dict[str, int]:
    sizes = {}
    for text in bounds:
        name, _, number = text.rpartition("=")
        if not name or not number.isdecimal() or int(number) < 1:
            raise UserError(f"cannot read --bound '{text}'", hint="NAME=N, such as --bound sequence_length=2048")
        sizes[name] = int(number)
    return sizes


def _integer_proof(folder: Path, sizes: dict[str, int]) -> IntegerProof:
    from qcompile.proof.prove import prove

    return prove(folder if folder.is_file() else folder / "model.onnx", sizes)


def _show(proof: IntegerProof) -> None:
    """What stands at the boundary, what is taken for granted, and what keeps the proof from holding."""
    kinds = [(kind, count) for kind, count in {**proof.kinds, **proof.functions, **proof.extensions}.items() if count]
    show("nodes", kinds)
    show("floats at the boundary", [(c.side, c.value, c.operator) for c in proof.boundary])
    show("taken for granted", [(text,) for text in proof.assumptions])
    found = proof.all_findings
    rows = [
        (f.kind, f.node or f.value, f.layer if f.layer != f.node else "", f"{f.text}; {f.hint}" if f.hint else f.text)
        for f in found[:SHOWN]
    ]
    show("findings", rows, ("kind", "node", "layer", "what"))
    if len(found) > SHOWN:
        click.echo(f"  and {len(found) - SHOWN} more")
