"""Results as committed files: JSON to keep, and the same as a Markdown table beside it."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

from benchmarks import tables
from qcompile.manifest import installed

Row = dict[str, Any]
_SETTINGS = ("kind", "model", "limit", "threads", "samples", "passes", "context", "tokens", "windows", "machine")
_TIMED = ("speed", "decode", "kernels", "integer_operators", "cost")  # kinds whose rows must be of one machine
_PACKAGES = ("onnxruntime", "onnx", "onnxsim", "numpy")


class Results:
    """Rows of one table. A row with the ``key`` of an earlier one replaces it, in the file too."""

    def __init__(self, path: Path, kind: str, *, command: str, **about: Any) -> None:
        self._path = path.with_suffix(".json")
        self._command = command
        self._about = {"kind": kind, **about, "machine": machine(), "versions": installed(_PACKAGES)}
        self._rows: list[Row] = []
        if self._path.is_file():
            kept = json.loads(self._path.read_text(encoding="utf-8"))
            self._rows = [{"machine": kept["machine"], **row} for row in kept["rows"] if _comparable(kept, self._about)]

    def add(self, row: Row) -> None:
        """Add a row and write both files anew, so that an interrupted run keeps what it measured."""
        row = row | {"command": self._command, "machine": self._about["machine"]}
        same = [index for index, other in enumerate(self._rows) if other["key"] == row["key"]]
        if same:
            self._rows[same[0]] = row
        else:
            self._rows.append(row)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.as_dict(), indent=1, ensure_ascii=False) + "\n"
        self._path.write_text(text, encoding="utf-8")
        self._path.with_suffix(".md").write_text(self.markdown() + "\n", encoding="utf-8")

    def as_dict(self) -> dict[str, Any]:
        return self._about | {"rows": self._rows}

    def markdown(self) -> str:
        return tables.render(self.as_dict())


def _comparable(kept: dict[str, Any], about: dict[str, Any]) -> bool:
    """Whether rows of both may stand in one table."""
    settings = (key for key in _SETTINGS if key != "machine" or about["kind"] in _TIMED)
    return all(kept.get(key) == about.get(key) for key in settings)


def machine() -> str:
    """The processor and how many of its threads this process may use."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text().splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
        cpu += _integer_units(next((line for line in lines if line.startswith("flags")), ""))
    return f"{cpu}, {os.cpu_count()} CPUs"


def _integer_units(flags: str) -> str:
    found = [name for name in ("avx512_vnni", "amx_int8") if name in flags.split()]
    return f" ({', '.join(found)})" if found else ""
