"""The library of kernels that may lie beside a program: machine code, and loaded only if the manifest lists it."""

from __future__ import annotations

from pathlib import Path

from qcompile import manifest
from qcompile.errors import UserError

LIBRARY = "qcompile_kernels.so"


def library_beside(model: Path) -> Path | None:
    """The library beside the program ``model``, if the manifest there lists one.

    UserError where it is not the file that the manifest lists. Without a manifest nothing is loaded: the program
    runs then on the bodies of its functions.
    """
    path = model.with_name(LIBRARY)
    if not path.is_file() or not path.with_name(manifest.FILE).is_file():
        return None
    known = manifest.load(path.parent).get("files", {}).get(LIBRARY)
    if known is None:
        return None
    if manifest.sha256(path) != known["sha256"]:
        hint = "compile the model again, or remove the file: the program runs without it"
        raise UserError(f"'{path}' is not the library that was compiled with the program; it is not loaded", hint=hint)
    return path
