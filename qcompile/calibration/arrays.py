"""Calibration data in .npz files: read row by row, and checked against the model's inputs."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from qcompile.calibration.inputs import Input
from qcompile.errors import UserError, unknown_name

Arrays = dict[str, np.ndarray]


def reader(path: Path, inputs: Sequence[Input]) -> Callable[[], Iterator[Arrays]]:
    """A function that starts reading ``path`` (an .npz or a folder of them) again each time it is called."""
    files = sorted(path.glob("*.npz")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"no .npz file in {path}", hint="keys are input names, the first axis counts samples")
    known = {item.name: item for item in inputs}

    def rows() -> Iterator[Arrays]:
        for file in files:
            yield from _rows_of(file, known)

    return rows


def check_feeds(feeds: Arrays, inputs: Mapping[str, Input], where: str, longest: int) -> None:
    """Types and shapes as the model's, token ids inside their tables, axes of one name equally long.

    where: what the error calls the sample; longest: tokens that the model has positions for
    """
    sizes: dict[str, tuple[int, str]] = {}
    for name, array in feeds.items():
        item = _known(name, inputs, where)
        if not _shape_fits(array.shape, item.shape) or array.dtype != item.dtype:
            hint = "make it of that type and rank; sizes that are numbers must be equal"
            raise UserError(f"'{name}' is {_found(array)}, but the model takes {item}", where=where, hint=hint)
        _check_size(item, array, where, longest)
        _check_finite(item, array, where)
        _check_vocabulary(item, array, where)
        for axis, (size, symbol) in enumerate(zip(array.shape, item.shape, strict=True)):
            if isinstance(symbol, str) and symbol.isidentifier():
                known, other = sizes.setdefault(symbol, (size, name))
                if known != size:
                    what = f"axis {axis} of '{name}' has length {size}, but '{symbol}' of '{other}' has {known}"
                    raise UserError(what, where=where, hint="cut or pad one of them, so that they go together")


def _check_size(item: Input, array: np.ndarray, where: str, longest: int) -> None:
    if array.size == 0 and not item.is_cache:
        raise UserError(f"'{item.name}' is empty: {_found(array)}", where=where, hint="leave this sample out")
    if item.is_discrete and array.ndim == 2 and array.shape[1] > longest:
        raise UserError(
            f"'{item.name}' has {array.shape[1]} tokens, but the model's position table allows {longest}",
            where=where,
            hint=f"cut the sample to {longest} tokens",
        )


def _check_finite(item: Input, array: np.ndarray, where: str) -> None:
    """Minus infinity is what a mask of floats adds to the scores of what may not be seen."""
    if array.dtype.kind != "f":
        return
    good = np.isfinite(array) | (np.isneginf(array) if "mask" in item.name else False)
    if not good.all():
        hint = "leave that sample out"
        raise UserError(f"'{item.name}' holds {array[~good].flat[0]}", where=where, hint=hint)


def _check_vocabulary(item: Input, array: np.ndarray, where: str) -> None:
    if item.vocabulary and item.is_integer and array.size:
        low, high = int(array.min()), int(array.max())
        if high >= item.vocabulary or low < -item.vocabulary:
            raise UserError(
                f"'{item.name}' holds the id {high if high >= item.vocabulary else low}, "
                f"but the model's table has {item.vocabulary} rows",
                where=where,
                hint="is the tokenizer the model's own?",
            )


def _rows_of(file: Path, inputs: Mapping[str, Input]) -> Iterator[Arrays]:
    arrays = {name: _fitted(array, _known(name, inputs, str(file)), file) for name, array in _read(file).items()}
    counts = {name: len(array) for name, array in arrays.items() if array.ndim}
    if len(set(counts.values())) > 1:
        text = ", ".join(f"{name} {count}" for name, count in counts.items())
        hint = "the first axis of every key counts samples"
        raise UserError(f"the keys hold different numbers of samples: {text}", where=str(file), hint=hint)
    for index in range(next(iter(counts.values()), 0)):
        yield {name: array[index] if array.ndim else array for name, array in arrays.items()}


def _read(file: Path) -> Arrays:
    hint = "write it with numpy.savez(path, input_ids=...)"
    try:
        if not zipfile.is_zipfile(file):  # numpy would take it for a pickle
            what = "not an .npz: the file is no zip archive"
            raise UserError(what, where=str(file), hint=f"name text .txt or .jsonl; else {hint}")
        with np.load(file, allow_pickle=False) as archive:
            return {name: _array(name, archive[name]) for name in archive.files}
    except (ValueError, OSError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise UserError(f"not a readable .npz: {error}", where=str(file), hint=hint) from error


def _array(name: str, member: np.ndarray | bytes) -> np.ndarray:
    if isinstance(member, bytes):  # what numpy makes of a file that is no .npy
        raise ValueError(f"'{name}' in it is no array")
    return member


def _known(name: str, inputs: Mapping[str, Input], where: str) -> Input:
    if name not in inputs:
        error = unknown_name("calibration key", name, inputs)
        raise UserError(error.message, where=where, hint=error.hint)
    return inputs[name]


def _fitted(array: np.ndarray, item: Input, file: Path) -> np.ndarray:
    """``array``, which is [samples, ...], in the input's type."""
    what = f"'{item.name}' is {_found(array)}, but the model takes {item}"
    if array.ndim != len(item.shape):
        expected = ", ".join(("samples", *(str(size) for size in item.shape[1:])))
        what += f": rank {array.ndim}, not {len(item.shape)}"
        raise UserError(what, where=str(file), hint=f"the first axis counts samples: give [{expected}]")
    if not _shape_fits(array.shape[1:], item.shape[1:]) or not np.can_cast(array.dtype, item.dtype, "same_kind"):
        raise UserError(what, where=str(file), hint="the first axis counts the samples; the others are the model's")
    return array.astype(item.dtype, copy=False)


def _shape_fits(found: Sequence[int], wanted: Sequence[int | str]) -> bool:
    same_rank = len(found) == len(wanted)
    return same_rank and all(isinstance(w, str) or w == f for f, w in zip(found, wanted, strict=True))


def _found(array: np.ndarray) -> str:
    return f"{array.dtype.name} {list(array.shape)}"
