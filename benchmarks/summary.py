"""The README's short tables: every method at every setting, and the speeds; ``tables.py`` has everything measured."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.references import REFERENCES
from benchmarks.tables import RESULTS, TITLES, table

Row = Mapping[str, Any]
FLOAT = "float export"


def summary(folder: Path = RESULTS) -> str:
    """A table of scores for each model, one of speeds and one of decoding for all."""
    kinds: dict[str, list[Row]] = defaultdict(list)
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        kinds[result["kind"]].append(result)
    parts = [methods(result) for result in kinds["accuracy"]]
    parts.append(_titled("Speed", ("model, batch x tokens", "program"), _speeds(kinds["speed"])))
    parts.append(_titled("One token after 128 others, with a cache", ("model", "program"), _tokens(kinds["decode"])))
    return "\n\n".join(parts)


def _titled(title: str, head: tuple[str, str], lines: Iterator[tuple[str, ...]]) -> str:
    ratios = ("times as fast as the float export, by minima", "by medians")
    return f"### {title}\n\n{table((*head, *ratios), lines)}"


def methods(result: Row) -> str:
    """One row a method, one column a setting: the reference implementations, then ours; the best ones in bold."""
    known = REFERENCES.get(result["model"], {})
    scores: dict[str, dict[str, float]] = defaultdict(dict)
    for setting, theirs in known.items():
        for name, value in theirs.items():
            scores[f"*{name}*"][setting] = value
    for setting, passes, value in _ours(result["rows"]):
        scores[passes].setdefault(setting, value)  # the first calibration's
    columns = list(dict.fromkeys(setting for row in scores.values() for setting in row))
    columns.sort(key=_widths)
    better = min if "perplexity" in result["metric"] else max
    best = {column: better(row[column] for row in scores.values() if column in row) for column in columns}
    lines = [
        (name, *(_score(row.get(column), best[column], result["digits"]) for column in columns))
        for name, row in scores.items()
    ]
    exact = next((row["value"] for row in result["rows"] if row["name"] == FLOAT), None)
    floats = "" if exact is None else f", float {exact:.{result['digits']}f}"
    return f"### {TITLES[result['model']]}: {result['metric']}{floats}\n\n{table(('', *map(_code, columns)), lines)}"


def _ours(rows: list[Row]) -> Iterator[tuple[str, str, float]]:
    """Setting, passes and score of every program of ours."""
    for row in rows:
        named = re.fullmatch(r"`(\w+)`(?:, (.*))?", row["name"])
        if named and not row["error"]:
            yield named[1], _code(named[2] or "the recipe's passes"), row["value"]


def _code(text: str) -> str:
    return text if text == "no transform" else f"`{text}`"


def _widths(setting: str) -> tuple[int, int, bool]:
    """Most bits first, of weights, then of activations; those of each token before those from calibration."""
    found = re.match(r"w(\d+)a(\d+)", setting)
    assert found is not None, setting
    return -int(found[1]), -int(found[2]), setting.endswith("_static")


def _score(value: float | None, best: float, digits: int) -> str:
    if value is None:
        return ""
    text = f"{value:,.{digits}f}"
    return f"**{text}**" if value == best else text


def _speeds(results: list[Row]) -> Iterator[tuple[str, ...]]:
    """Every program but the float export, once a shape."""
    seen = set()
    for result in results:
        for row in result["rows"]:
            shape = f"{_short(result)}, {row['batch']} x {row['tokens']}"
            for program in row["programs"][1:]:
                if (shape, program["name"]) not in seen:
                    seen.add((shape, program["name"]))
                    yield shape, program["name"], *_ratios(program, row["programs"][0])


def _tokens(results: list[Row]) -> Iterator[tuple[str, ...]]:
    """Every program but the float export, once a model."""
    seen = set()
    for result in results:
        for row in result["rows"][1:]:
            if (result["model"], row["name"]) not in seen:
                seen.add((result["model"], row["name"]))
                yield _short(result), row["name"], *_ratios(row, result["rows"][0])


def _short(result: Row) -> str:
    return TITLES[result["model"]].partition(" ")[0]


def _ratios(program: Row, base: Row) -> tuple[str, str]:
    low, middle = (f"{base[kind] / program[kind]:.2f}" for kind in ("min_ms", "median_ms"))
    return low, middle
