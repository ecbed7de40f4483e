"""The folder that models are cached in: ``~/.cache/qcompile``, or $QCOMPILE_CACHE."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from qcompile.errors import UserError


def cache_root(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """``cache_dir`` if given, else the user's choice in the environment, else the default."""
    chosen = cache_dir or os.environ.get("QCOMPILE_CACHE") or Path.home() / ".cache" / "qcompile"
    return Path(chosen)


def exporter_key() -> str:
    """The versions of the libraries that decide an export's bytes; UserError when one is not installed."""
    names = ("torch", "transformers", "onnxscript")
    try:
        return "-".join(name + importlib.metadata.version(name) for name in names)
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(
            f"exporting a model needs {error.name}", hint="pip install 'qcompile-nn[torch]'"
        ) from error


def cached_folder(folder: Path, make: Callable[[Path], None]) -> Path:
    """``folder``, made by ``make`` in a temporary folder beside it and renamed when it is complete.

    A failed ``make`` leaves no folder. Two processes may make the same one; the first to finish wins.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        make(temporary)
        temporary.chmod(0o755)
        _move(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _move(temporary: Path, folder: Path) -> None:
    try:
        temporary.rename(folder)
    except OSError:
        if not folder.is_dir():  # otherwise another process finished first
            raise
