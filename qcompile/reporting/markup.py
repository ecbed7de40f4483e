"""Small pieces of HTML. Everything that comes from a model is escaped here."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

STYLE = """
:root { --ink: #1d2733; --soft: #5d6b7a; --line: #dde3ea; --paper: #ffffff; --tint: #f4f7fa; --accent:
  #1f6feb;
  --good: #1a7f37; --bad: #b42318; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9aa7b4; --line: #2d3743; --paper:
  #12171d;
  --tint: #1a2129; --accent: #6ea8ff; --good: #57c26f; --bad: #ff7b72; } figure { background: #ffffff; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 32px 24px 80px; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 19px; margin: 44px 0 8px; } h3 { font-size: 15px; }
p.lead, .soft { color: var(--soft); } code { font: 13px ui-monospace, "SF Mono", Menlo, Consolas,
  monospace; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(180px, 1fr)); gap: 12px; margin:
  20px 0; }
.tile { background: var(--tint); border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px; }
.tile b { display: block; font-size: 21px; font-weight: 600; } .tile > span { color: var(--soft);
  font-size: 13px; }
.good, b > .good { color: var(--good); } .bad, b > .bad { color: var(--bad); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: 13.5px; }
th, td { text-align: left; padding: 5px 12px 5px 0; border-bottom: 1px solid var(--line); vertical-align:
  top; }
th { color: var(--soft); font-weight: 500; } td.number, th.number { text-align: right;
  font-variant-numeric: tabular-nums; white-space: nowrap; } td code { overflow-wrap: anywhere; }
details { margin: 8px 0; } summary { cursor: pointer; color: var(--accent); }
.pairs { display: grid; grid-template-columns: repeat(auto-fit, minmax(440px, 1fr)); gap: 0 14px; }
figure { margin: 14px 0; padding: 8px; border: 1px solid var(--line); border-radius: 8px; }
figure svg { width: 100%; height: auto; display: block; } figcaption { color: #5d6b7a; font-size: 13px; }
"""


class Raw(str):
    """Markup that is already escaped."""


def text(value: Any) -> Raw:
    """``value`` as escaped text; numbers in four digits, nothing as a dash."""
    if isinstance(value, Raw):
        return value
    if value is None or value == "":
        return Raw("–")
    if isinstance(value, bool):
        return Raw("yes" if value else "no")
    if isinstance(value, float):
        return Raw(f"{value:.4g}")
    return Raw(html.escape(str(value)))


def code(value: Any) -> Raw:
    return Raw(f"<code>{text(value)}</code>")


def marked(value: Any, good: bool) -> Raw:
    return Raw(f'<span class="{"good" if good else "bad"}">{text(value)}</span>')


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> Raw:
    """A table; columns whose every cell is a number are set to the right."""
    numeric = [bool(rows) and all(_is_number(row[i]) for row in rows) for i in range(len(heads))]
    style = [' class="number"' if n else "" for n in numeric]
    head = "".join(f"<th{s}>{text(h)}</th>" for h, s in zip(heads, style, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{s}>{text(c)}</td>" for c, s in zip(row, style, strict=True)) + "</tr>\n"
        for row in rows
    )
    return Raw(f'<div class="scroll"><table><tr>{head}</tr>\n{body}</table></div>\n')


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def tiles(facts: Sequence[tuple[Any, str]]) -> Raw:
    """Large figures with a caption each."""
    inner = "".join(f'<div class="tile"><b>{text(v)}</b><span>{text(c)}</span></div>' for v, c in facts)
    return Raw(f'<div class="tiles">{inner}</div>\n')


def details(summary: str, inner: Raw) -> Raw:
    return Raw(f"<details><summary>{text(summary)}</summary>\n{inner}</details>\n")


def section(title: str, *inner: Raw) -> Raw:
    return Raw(f"<h2>{text(title)}</h2>\n{''.join(inner)}")


def paragraph(words: Any) -> Raw:
    return Raw(f'<p class="soft">{text(words)}</p>\n')


def figure(svg: str, caption: str) -> Raw:
    return Raw(f"<figure>{svg}<figcaption>{text(caption)}</figcaption></figure>\n")


def pairs(figures: Sequence[Raw]) -> Raw:
    """Figures side by side where there is room."""
    return Raw(f'<div class="pairs">{"".join(figures)}</div>\n')


def page(title: str, *inner: Raw) -> str:
    """A whole page that asks the network for nothing."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>{STYLE}</style></head>\n"
        f"<body><main>\n{''.join(inner)}</main></body></html>\n"
    )
