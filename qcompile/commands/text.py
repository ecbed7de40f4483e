"""Plain tables on stdout: aligned, without colour or wrapping, so that they can be piped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click


def cell(value: Any) -> str:
    """``value`` in a table; numbers in four digits."""
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return " ".join(str(value).split())


def columns(rows: Sequence[Sequence[Any]], heads: Sequence[str] | None = None) -> str:
    """``rows`` aligned; columns of numbers to the right."""
    shown = [[cell(value) for value in row] for row in rows]
    if heads is not None:
        shown.insert(0, list(heads))
    if not shown:
        return ""
    width = [max(len(row[i]) for row in shown) for i in range(len(shown[0]))]
    right = [bool(rows) and all(_is_number(row[i]) for row in rows) for i in range(len(width))]
    return "\n".join(
        "  ".join(
            text.rjust(w) if r else text.ljust(w) for text, w, r in zip(row, width, right, strict=True)
        ).rstrip()
        for row in shown
    )


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def show(title: str, rows: Sequence[Sequence[Any]], heads: Sequence[str] | None = None) -> None:
    """Print a titled table, indented by two; nothing when it is empty."""
    if not rows:
        return
    click.echo(f"\n{title}")
    indented(rows, heads)


def indented(rows: Sequence[Sequence[Any]], heads: Sequence[str] | None = None) -> None:
    """Print a table, each line indented by two."""
    for line in columns(rows, heads).splitlines():
        click.echo(f"  {line}")
