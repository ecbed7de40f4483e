"""Calibration data in .npz files: read row by row, and checked against the model's inputs."""

from __future__ import annotations

import zipfile
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


def check_feeds(feeds: Arrays, inputs: Mapping[str, Input]) -> None:
    """Types and shapes as the model's, token ids inside their tables, axes of one name equally long."""
    sizes: dict[str, tuple[int, str]] = {}
    for name, array in feeds.items():
        item = inputs[name]
        if not _shape_fits(array.shape, item.shape) or array.dtype != item.dtype:
            raise UserError(f"'{name}' is {_found(array)}, but the model takes {item}")
        _check_vocabulary(item, array)
        for axis, (size, symbol) in enumerate(zip(array.shape, item.shape, strict=True)):
            if isinstance(symbol, str) and symbol.isidentifier():
                known, other = sizes.setdefault(symbol, (size, name))
                if known != size:
                    raise UserError(
                        f"axis {axis} of '{name}' has length {size}, but '{symbol}' of '{other}' has {known}"
                    )


def _check_vocabulary(item: Input, array: np.ndarray) -> None:
    if item.vocabulary and item.is_integer and array.size:
        low, high = int(array.min()), int(array.max())
        if high >= item.vocabulary or low < -item.vocabulary:
            raise UserError(
                f"'{item.name}' holds the id {high if high >= item.vocabulary else low}, "
                f"but the model's table has {item.vocabulary} rows",
                hint="is the tokenizer the model's own?",
            )


def _rows_of(file: Path, inputs: Mapping[str, Input]) -> Iterator[Arrays]:
    arrays = {name: _fitted(array, _known(name, inputs, file), file) for name, array in _read(file).items()}
    counts = {name: len(array) for name, array in arrays.items()}
    if len(set(counts.values())) > 1:
        text = ", ".join(f"{name} {count}" for name, count in counts.items())
        hint = "the first axis of every key counts samples"
        raise UserError(f"the keys hold different numbers of samples: {text}", where=str(file), hint=hint)
    for index in range(next(iter(counts.values()), 0)):
        yield {name: array[index] for name, array in arrays.items()}


def _read(file: Path) -> Arrays:
    try:
        with np.load(file, allow_pickle=False) as archive:
            if isinstance(archive, np.ndarray):
                raise ValueError("a single array without names")
            return {name: archive[name] for name in archive.files}
    except (ValueError, OSError, zipfile.BadZipFile, EOFError) as error:
        raise UserError(
            f"not a readable .npz: {error}",
            where=str(file),
            hint="write it with numpy.savez(path, input_ids=...)",
        ) from error


def _known(name: str, inputs: Mapping[str, Input], file: Path) -> Input:
    if name not in inputs:
        error = unknown_name("calibration key", name, inputs)
        raise UserError(error.message, where=str(file), hint=error.hint)
    return inputs[name]


def _fitted(given: np.ndarray, item: Input, file: Path) -> np.ndarray:
    """``given`` as [samples, ...] in the input's type."""
    array, rank = given, len(item.shape)
    if array.ndim == rank + 1:  # samples of batches
        array = array.reshape(-1, *array.shape[2:])
    elif array.ndim == rank - 1:  # one sample without its batch axis
        array = array[None]
    row_fits = _shape_fits(array.shape[1:], item.shape[1:]) and array.ndim == rank
    if not row_fits or not np.can_cast(array.dtype, item.dtype, "same_kind"):
        raise UserError(f"'{item.name}' is {_found(given)}, but the model takes {item}", where=str(file))
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise UserError(f"'{item.name}' holds {_first_bad(array)}", where=str(file))
    return array.astype(item.dtype, copy=False)


def _shape_fits(found: Sequence[int], wanted: Sequence[int | str]) -> bool:
    same_rank = len(found) == len(wanted)
    return same_rank and all(isinstance(w, str) or w == f for f, w in zip(found, wanted, strict=True))


def _found(array: np.ndarray) -> str:
    return f"{array.dtype.name} {list(array.shape)}"


def _first_bad(array: np.ndarray) -> str:
    place = tuple(int(i[0]) for i in np.nonzero(~np.isfinite(array)))
    return f"{array[place]} in sample {place[0]}"
