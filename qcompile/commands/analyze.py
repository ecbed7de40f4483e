"""``analyze``: where a model's outliers are, before anything is done about them."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import click

from qcompile.commands import options
from qcompile.commands.text import columns, show
from qcompile.errors import UserError


@click.command("analyze", short_help="show a model's activation outliers")
@click.argument("model")
@options.calibration
@options.allow_pickle
@click.option("--json", "form", flag_value="json", help="Print the whole analysis as JSON.")
@click.option("--csv", "form", flag_value="csv", help="Print the table as CSV.")
@click.option("--plots", type=click.Path(path_type=Path), metavar="FILE",
              help="Of a training run: write its curves as SVG.")  # fmt: skip
@options.debug
def analyze(
    model: str, calib: Path | None, tokenizer: Path | None, samples: int, length: int, allow_pickle: bool,
    form: str | None, plots: Path | None,
) -> None:  # fmt: skip
    """Run the outliers analysis on MODEL and print one row for each site.

    MODEL may be a training run, a folder of checkpoints or a history (.jsonl): then a row for each step.
    """
    from qcompile.commands import training

    if training.is_run(model):
        _show_run(training.read_run(model, calib, tokenizer, samples, length), form, plots)
        return
    if plots is not None:
        hint = "MODEL is one model; --plots wants a folder of checkpoints, or a history.jsonl"
        raise UserError("there are no steps to plot", where=model, hint=hint)
    from qcompile import driver, manifest

    entry = manifest.plain(
        driver.analyze(
            model, calibration=calib, tokenizer=tokenizer, max_samples=samples, max_length=length,
            allow_pickle=allow_pickle,
        )
    )  # fmt: skip
    heads = list(dict.fromkeys(head for site in entry["sites"] for head in site))
    rows = [[site.get(head) for head in heads] for site in entry["sites"]]
    if form == "json":
        click.echo(json.dumps(entry, indent=1, sort_keys=True, ensure_ascii=False))
    elif form == "csv":
        csv.writer(sys.stdout, lineterminator="\n").writerows([heads, *rows])
    else:
        click.echo(columns(rows, heads) if rows else "no sites: this graph has no linear layer")
        for note in entry["notes"]:
            click.echo(note)
        show("tokens that own a range", _sinks(entry), ("site", "value", "channel", "position", "token"))
        show("left alone", [(s["site"], s["reason"], s["node"]) for s in entry["skips"]])


def _show_run(rows: list[dict[str, Any]], form: str | None, plots: Path | None) -> None:
    """A row for each step, and one for each linear at the last step."""
    from qcompile.commands import training

    if plots is not None:
        training.write_plots(rows, plots)
    lines = training.summary(rows)
    heads = list(lines[0]) if lines else []
    table = [list(line.values()) for line in lines]
    if form == "json":
        click.echo(json.dumps(rows, indent=1))
    elif form == "csv":
        csv.writer(sys.stdout, lineterminator="\n").writerows([heads, *table])
    else:
        click.echo(columns(table, heads))
        layers = rows[-1]["layers"]
        names = list(next(iter(layers.values())))
        show(f"at step {rows[-1]['step']}", [(n, *f.values()) for n, f in layers.items()], ("linear", *names))


def _sinks(entry: dict[str, Any]) -> list[tuple[Any, ...]]:
    """The largest token of each site whose range few tokens own; its text where a tokenizer was at hand."""
    sites = entry["facts"].get("outliers", {}).get("sites", {})
    found = [(name, site["top_tokens"][0]) for name, site in sites.items() if site["sink"]]
    return [(name, t["value"], t["channel"], t["position"], t.get("text", t["id"])) for name, t in found]
