"""Writing the result: all of it or nothing, and never over something that is not ours."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from qcompile.errors import UserError
from qcompile.manifest import foreign_files

_FULL = (errno.ENOSPC, errno.EDQUOT)
_UNUSABLE = (errno.EROFS, errno.ENAMETOOLONG)
_FULL_WORDS = (*map(os.strerror, _FULL), "Not enough free space", "requested and")


@contextlib.contextmanager
def writing() -> Iterator[None]:
    """Turn a full disk or a forbidden folder into an error that the user can act on."""
    try:
        yield
    except OSError as error:
        if _is_full(error):
            raise UserError(
                "no disk space left",
                where=str(error.filename or ""),
                hint="free some, or point TMPDIR and -o at a larger disk",
            ) from error
        if isinstance(error, PermissionError) or error.errno in _UNUSABLE:
            hint = "choose a folder that you may write to: -o, or TMPDIR for temporary files"
            what = "permission denied" if isinstance(error, PermissionError) else str(error.strerror).lower()
            raise UserError(f"{what}: '{error.filename}'", hint=hint) from error
        raise


@writing()
def check_destination(folder: Path, force: bool = False, inputs: Iterable[object] = ()) -> None:
    """Refuse a destination that holds anything but an earlier result of ours, unless ``force``.

    Nor may it hold one of ``inputs`` or the current folder: replacing it would delete them.
    """
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir():
        raise UserError(f"'{there}' is a file", hint="give a folder to -o")
    if not os.access(there, os.W_OK):
        raise UserError(f"'{there}' cannot be written to", hint="choose another folder with -o")
    given = [Path(item) for item in inputs if isinstance(item, str | Path) and Path(item).exists()]
    for place in (*given, Path()):
        if folder.is_dir() and place.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"'{folder}' holds '{place}', which replacing it would delete",
                            hint="choose another folder with -o")  # fmt: skip
    if force or not folder.is_dir():
        return
    foreign = foreign_files(folder)
    if foreign:
        raise UserError(
            f"'{folder}' holds files that qcompile did not write: {', '.join(foreign[:3])}",
            hint="choose another folder with -o, or add --force to delete everything in it",
        )


def publish(staged: Path, destination: Path, force: bool = False) -> None:
    """Copy the folder ``staged`` to ``destination`` in one step that either happens or does not.

    The copy is made beside the destination and renamed; an earlier result is moved away first and put
    back if the renaming fails.
    """
    check_destination(destination, force)
    with writing():
        parent = destination.absolute().parent
        parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{destination.name}-", dir=parent))
        try:
            fresh = scratch / "new"
            shutil.copytree(staged, fresh)
            _swap(fresh, destination, scratch / "old")
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _swap(fresh: Path, destination: Path, old: Path) -> None:
    existed = destination.exists()
    if existed:
        destination.rename(old)
    try:
        fresh.rename(destination)
    except BaseException:
        if existed and not destination.exists():
            old.rename(destination)
        raise


def _is_full(error: OSError) -> bool:
    """numpy, shutil and the IR wrap the system's error in words of their own, without its number."""
    return error.errno in _FULL or any(words in str(error) for words in _FULL_WORDS)
