"""The package's folder: sample projects, a page that says what is in it, and the files' checksums."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

import onnx_ir as ir

from qcompile.manifest import files_below, sha256

PAGE, SUMS = "README.md", "SHA256SUMS"
LEAD = "The first three files are the program. Sizes and digests of all are in SHA256SUMS and manifest.json."
LENGTH = 8  # tokens that the samples run


def names(values: Sequence[ir.Value]) -> str:
    """``input_ids (int64 [batch, seq]), ...``: inputs or outputs as the pages and samples write them."""
    return ", ".join(f"{v.name} ({str(v.dtype).lower()} {_extents(v)})" for v in values)


def _extents(value: ir.Value) -> str:
    dims = value.shape or ()
    return "[" + ", ".join(str(d.value if isinstance(d, ir.SymbolicDim) else d) for d in dims) + "]"


def words(model: ir.Model, **more: str) -> dict[str, str]:
    """What ``{{word}}`` means in the files of sample projects."""
    ports = {"inputs": names(model.graph.inputs), "outputs": names(model.graph.outputs)}
    return {"name": "qcompile program", "length": str(LENGTH), **ports, **more}


def write_sample(kind: str, folder: Path, words: Mapping[str, str]) -> None:
    """Copy the sample project ``kind`` into ``folder``, each ``{{word}}`` of its files replaced."""
    _copy(resources.files("qcompile.backends.mobile") / "samples" / kind, folder, words)


def _copy(source: Traversable, destination: Path, words: Mapping[str, str]) -> None:
    if source.is_dir():
        destination.mkdir(parents=True, exist_ok=True)
        for part in sorted(source.iterdir(), key=lambda one: one.name):
            _copy(part, destination / part.name, words)
        return
    text = source.read_text(encoding="utf-8")
    for word, meaning in words.items():
        text = text.replace("{{" + word + "}}", meaning)
    destination.write_text(text, encoding="utf-8")


def finish(
    folder: Path, title: str, lead: str, files: Mapping[str, str], notes: Mapping[str, Sequence[str]]
) -> None:
    """Write README.md and then SHA256SUMS, of every file below ``folder``, as ``sha256sum --check`` reads it."""
    (folder / PAGE).write_text(_page(title, lead, files, notes), encoding="utf-8")
    lines = [f"{sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in files_below(folder)]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def _page(title: str, lead: str, files: Mapping[str, str], notes: Mapping[str, Sequence[str]]) -> str:
    """The text of README.md: a table of ``files`` with what each is for, and a list below each heading of ``notes``."""
    rows = [f"| `{name}` | {meaning} |" for name, meaning in files.items()]
    parts = [f"# {title}", lead, "\n".join(["| file | what for |", "| --- | --- |", *rows])]
    for heading, lines in notes.items():
        parts.append(f"## {heading}\n\n" + "\n".join(f"- {line}" for line in lines))
    return "\n\n".join(parts) + "\n"
