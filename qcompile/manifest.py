"""manifest.json: what went in, what was done to it, how that was proved and what came out.

Deterministic: no times, no absolute paths, sorted keys; compiling twice gives identical bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qcompile.errors import UserError

FILE = "manifest.json"
REPORT = "report.html"
FORMAT = 1
_CHUNK = 1 << 20
_PACKAGES = ("numpy", "onnx", "onnx-ir", "onnxruntime", "onnxruntime-gpu")

Manifest = dict[str, Any]


def sha256(path: Path) -> str:
    """The digest of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_CHUNK):
            digest.update(piece)
    return digest.hexdigest()


def describe_files(root: Path, paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Size in bytes and digest of each file, by its path relative to ``root``."""
    return {
        path.relative_to(root).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(paths)
    }


def files_below(folder: Path) -> list[Path]:
    """Every regular file in ``folder`` and its subfolders."""
    return sorted(p for p in folder.rglob("*") if p.is_file())


def versions() -> dict[str, str]:
    """The versions that decide the result; packages that are not installed are left out."""
    from qcompile import __version__

    return {"qcompile": __version__, **installed(_PACKAGES)}


def installed(distributions: Iterable[str]) -> dict[str, str]:
    """The versions of those distributions that are installed."""
    found = {}
    for name in distributions:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def plain(value: Any) -> Any:
    """``value`` as JSON knows it: arrays become lists, NaN and infinities null, keys text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(dataclasses.asdict(value))
    if hasattr(value, "model_dump"):
        return plain(value.model_dump(mode="json"))
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(v) for v in (sorted(value, key=str) if isinstance(value, set | frozenset) else value)]
    if isinstance(value, float):
        return float(f"{value:.9g}") if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    return f"({type(value).__name__})"  # str() could hold an address, which differs from run to run


def dumps(manifest: Manifest) -> str:
    """The manifest as text; the same content gives the same bytes."""
    return json.dumps(plain(manifest), indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def load(folder: Path) -> Manifest:
    """The manifest of a compiled folder; UserError where it is absent or not ours."""
    path = folder / FILE
    if not path.is_file():
        raise UserError(
            f"'{folder}' is no compiled model: it has no {FILE}", hint="give the folder of -o DIR"
        )
    try:
        manifest: Manifest = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"'{path}' is damaged: {error}", hint="compile the model again") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(
            f"'{path}' was not written by this version of qcompile", hint="compile the model again"
        )
    return manifest


def foreign_files(folder: Path) -> list[str]:
    """The files in ``folder`` that no earlier result of ours accounts for, by relative path."""
    found = [path.relative_to(folder).as_posix() for path in files_below(folder)]
    try:
        ours = {FILE, REPORT, *load(folder).get("files", {})}
    except UserError:
        ours = set()
    return [name for name in found if name not in ours]
