"""``passes``, ``targets`` and ``recipes``: what there is to choose from. Imports no runtime."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import click

from qcompile.commands.text import columns


@click.command("passes", short_help="list the passes")
def passes() -> None:
    """List the passes that --passes knows, those of installed packages included."""
    from qcompile.pipeline import known_passes

    rows = [(name, _first_line(address)) for name, address in known_passes().items()]
    click.echo(columns(rows))


@click.command("targets", short_help="list the targets")
def targets() -> None:
    """List the targets that --target knows."""
    from qcompile.backends import TARGETS, by_name

    click.echo(columns([(name, by_name(name).target.description) for name in TARGETS]))


@click.command("recipes", short_help="list the recipes")
def recipes() -> None:
    """List the recipes that --recipe knows by name; a .toml file is the other way to give one."""
    from qcompile.recipe import RECIPES

    click.echo(columns(list(RECIPES.items())))


def _first_line(address: str) -> str:
    """The first line of a module's docstring, read from its source so that nothing is imported."""
    import ast

    try:
        found = importlib.util.find_spec(address.partition(":")[0])
    except ModuleNotFoundError:
        found = None
    if found is None or found.origin is None:
        return "(not importable)"
    doc = ast.get_docstring(ast.parse(Path(found.origin).read_text(encoding="utf-8"))) or ""
    return doc.partition("\n")[0].rstrip(".")
