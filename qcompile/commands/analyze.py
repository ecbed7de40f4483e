"""``analyze``: where a model's outliers are, before anything is done about them."""

from __future__ import annotations

import json
from pathlib import Path

import click

from qcompile.commands import options
from qcompile.commands.text import columns, show


@click.command("analyze", short_help="show a model's activation outliers")
@click.argument("model")
@options.calibration
@options.allow_pickle
@click.option("--json", "as_json", is_flag=True, help="Print the whole analysis as JSON.")
@options.debug
def analyze(
    model: str, calib: Path | None, tokenizer: Path | None, samples: int, length: int, allow_pickle: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Run the outliers analysis on MODEL and print one row for each site."""
    from qcompile import driver, manifest
    from qcompile.report import site_columns

    entry = manifest.plain(
        driver.analyze(
            model, calibration=calib, tokenizer=tokenizer, max_samples=samples, max_length=length,
            allow_pickle=allow_pickle,
        )
    )  # fmt: skip
    if as_json:
        click.echo(json.dumps(entry, indent=1, sort_keys=True, ensure_ascii=False))
        return
    heads = site_columns(entry["sites"])
    if entry["sites"]:
        click.echo(columns([[site.get(h) for h in heads] for site in entry["sites"]], heads))
    else:
        click.echo("no sites: this graph has no transformer block that qcompile recognises")
    for note in entry["notes"]:
        click.echo(note)
    show("left alone", [(s["site"], s["reason"], s["node"]) for s in entry["skips"]])
