"""``explain``: what every pass did to a compiled model, what it left alone and why."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from qcompile.commands import options
from qcompile.commands.text import show


@click.command("explain", short_help="say what was done where, and why not elsewhere")
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("names", nargs=-1)
@options.debug
def explain(folder: Path, names: tuple[str, ...]) -> None:
    """Explain the compiled model in FOLDER; NAMES (parts of names, or globs) choose what is shown."""
    from qcompile import manifest
    from qcompile.report import proof_words

    record = manifest.load(folder)
    passes = [
        (p["spec"], p["preserves"], p["rewrites"], proof_words(p["proof"]), len(p["skips"]))
        for p in record["passes"]
    ]
    click.echo(f"{record['name']}: recipe {record['recipe']['name']}, target {record['target']['name']}")
    show("passes", passes, ("pass", "claims to keep", "rewrites", "measured", "left alone"))
    for one in record["passes"]:
        _show_pass(one, names)
    _show_layers(record["layers"], names)
    kernels = [
        (k["site"], k["kernel"], k["low_bit"], k["reason"])
        for k in record["kernels"]
        if _chosen(names, k["site"])
    ]
    show("kernels", kernels, ("matmul", "kernel", "low bit", "why not"))


def _show_pass(one: Mapping[str, Any], names: Sequence[str]) -> None:
    from qcompile.report import site_columns

    whole = bool(names) and _chosen(names, one["name"])
    sites = [s for s in one["sites"] if whole or _chosen(names, s["site"])]
    skips = [s for s in one["skips"] if whole or _chosen(names, s["site"], s["node"])]
    heads = site_columns(sites)
    show(f"{one['name']}: what it did", [[s.get(h) for h in heads] for s in sites], heads)
    show(
        f"{one['name']}: left alone",
        [(s["site"], s["reason"], s["node"]) for s in skips],
        ("site", "why", "node"),
    )
    if not names or whole:
        show(f"{one['name']}: notes", [(note,) for note in one["notes"]])


def _show_layers(layers: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    from qcompile.report import decibels

    shown = [(x["site"], decibels(x["sqnr_db"])) for x in layers if _chosen(names, x["site"])]
    show("error per layer", shown, ("layer", "SQNR"))


def _chosen(names: Sequence[str], *candidates: str) -> bool:
    if not names:
        return True
    return any(n in c or fnmatch.fnmatchcase(c, n) for n in names for c in candidates)
