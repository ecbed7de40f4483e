"""What a model's inputs are, and how the ones that the user's data leaves out are made."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from qcompile.errors import UserError
from qcompile.graph.provenance import original_name

Arrays = dict[str, np.ndarray]
UNLIMITED = 1 << 30
_IMAGE_SIDE = 224
_FREE_AXIS = 16


@dataclasses.dataclass(frozen=True)
class Input:
    """One input of the model.

    shape: an int where the axis is static, its name where it is symbolic
    vocabulary: rows of the embedding table that it indexes, 0 when it indexes none
    """

    name: str
    dtype: np.dtype
    shape: tuple[int | str, ...]
    vocabulary: int = 0

    @property
    def is_integer(self) -> bool:
        return self.dtype.kind in "iu"

    @property
    def is_discrete(self) -> bool:
        return self.dtype.kind in "iub"

    @property
    def is_cache(self) -> bool:
        """Keys and values of tokens past, of which there may be none."""
        return "past" in self.name or ("cache" in self.name and self.dtype.kind == "f")

    def __str__(self) -> str:
        return f"{self.dtype.name} [{', '.join(str(size) for size in self.shape)}]"


def model_inputs(model: ir.Model) -> list[Input]:
    """The inputs that a caller must feed, in the model's order."""
    return [_input(value) for value in model.graph.inputs if value.name not in model.graph.initializers]


def position_limits(model: ir.Model) -> tuple[int, int]:
    """The longest sequences that the smallest and the largest learned position table allow.

    Very large when there is none. Positions that are constant, as those of an image's patches, limit nothing.
    OPT and RoBERTa keep two extra rows in front, which shows in a size such as 514 or 2050.
    """
    limits = []
    for node in model.graph:
        table = node.inputs[0] if node.op_type == "Gather" else None
        if table is None or table.const_value is None or len(table.const_value.shape) != 2:
            continue
        name, index = original_name(table).lower(), node.inputs[1]
        is_constant = index is not None and index.const_value is not None
        if (("position" in name and "relative" not in name) or "wpe" in name.split(".")) and not is_constant:
            rows = int(table.const_value.shape.numpy()[0])
            limits.append(rows - 2 if rows % 64 == 2 else rows)
    return min(limits, default=UNLIMITED), max(limits, default=UNLIMITED)


def longest_sequence(model: ir.Model, inputs: Sequence[Input]) -> int:
    """Tokens from which on a sample cannot run; of an encoder and a decoder, those of the larger table."""
    smallest, largest = position_limits(model)
    return largest if any("decoder" in item.name for item in inputs) else smallest


def complete(feeds: Arrays, inputs: Sequence[Input]) -> Arrays:
    """``feeds`` with every input of the model, in the model's order; feeds are batches [batch, ...].

    Made when absent: masks, position and token type ids, the decoder's start, an empty key/value cache.
    """
    done = dict(feeds)
    for item in sorted(inputs, key=_making_order):
        if item.name not in done:
            done[item.name] = _made(item, done)
    return {item.name: done[item.name] for item in inputs}


def random_rows(inputs: Sequence[Input], length: int, count: int, seed: int = 0) -> list[Arrays]:
    """Random rows (one sample each, no batch axis) for the inputs that ``complete`` cannot make."""
    generator = np.random.default_rng(seed)
    sides: dict[str, int] = {}
    wanted = [item for item in inputs if not _can_be_made(item)]
    return [
        {item.name: _random(generator, item, _row_shape(item, sides, length)) for item in wanted}
        for _ in range(count)
    ]


def _input(value: ir.Value) -> Input:
    if value.dtype is None or value.shape is None:
        raise UserError(
            f"input '{value.name}' has no type or rank", hint="export the model with typed inputs"
        )
    try:
        dtype = np.dtype(value.dtype.numpy())
    except TypeError as error:
        raise UserError(f"input '{value.name}' has type {value.dtype.name}, which is no array") from error
    if dtype.kind == "O":
        hint = "cut off what turns text into numbers, and compile the rest"
        raise UserError(f"input '{value.name}' is text, not numbers", hint=hint)
    shape = tuple(size if isinstance(size, int) else str(size) for size in value.shape)
    return Input(value.name or "", dtype, shape, _vocabulary(value))


def _vocabulary(value: ir.Value) -> int:
    """The smallest embedding table that ``value`` indexes directly."""
    rows = [UNLIMITED]
    for node, index in value.uses():
        if node.op_type == "Cast":
            rows.append(_vocabulary(node.outputs[0]) or UNLIMITED)
        table = node.inputs[0] if node.op_type == "Gather" and index == 1 else None
        if table is not None and table.const_value is not None and len(table.const_value.shape) == 2:
            rows.append(int(table.const_value.shape.numpy()[0]))
    return min(rows) % UNLIMITED


def _making_order(item: Input) -> int:
    """Decoder ids come before their mask, masks before the positions that count them."""
    return next(
        (i for i, word in enumerate(("decoder_input_ids", "mask", "position")) if word in item.name), 3
    )


def _can_be_made(item: Input) -> bool:
    words = (
        "mask",
        "position_ids",
        "cache_position",
        "token_type",
        "segment",
        "decoder_input_ids",
        "past",
        "use_cache",
    )
    return any(word in item.name for word in words)


def _made(item: Input, feeds: Arrays) -> np.ndarray:
    batch = next((len(array) for array in feeds.values() if array.ndim), 1)
    if item.is_cache:
        return np.zeros(_cache_shape(item, batch), item.dtype)
    if "use_cache" in item.name:
        return np.zeros([size if isinstance(size, int) else 1 for size in item.shape], item.dtype)
    ids = _ids_for(item, feeds)
    if ids is None or len(item.shape) not in (1, 2):
        raise UserError(
            f"input '{item.name}' ({item}) is missing from the calibration data",
            hint=f"add the key '{item.name}' to the .npz; found: {', '.join(feeds) or 'nothing'}",
        )
    return _made_from_ids(item, ids, feeds)


def _made_from_ids(item: Input, ids: np.ndarray, feeds: Arrays) -> np.ndarray:
    if item.name.endswith("decoder_input_ids"):
        start = np.zeros_like(ids[:, :1])
        return np.concatenate([start, ids[:, :-1]], axis=1).astype(item.dtype)
    if "mask" in item.name:
        return np.ones(ids.shape, item.dtype)
    if len(item.shape) == 1:  # cache_position: one count for the whole batch
        return np.arange(ids.shape[1], dtype=item.dtype)
    if "position" in item.name:
        mask = next(
            (feeds[name] for name in feeds if "mask" in name and feeds[name].shape == ids.shape), None
        )
        counted = np.ones(ids.shape, np.int64) if mask is None else mask.astype(np.int64)
        return np.maximum(np.cumsum(counted, axis=1) - 1, 0).astype(item.dtype)
    if "token_type" in item.name or "segment" in item.name:
        return np.zeros(ids.shape, item.dtype)
    raise UserError(
        f"input '{item.name}' ({item}) is missing from the calibration data",
        hint=f"add the key '{item.name}' to the .npz",
    )


def _ids_for(item: Input, feeds: Arrays) -> np.ndarray | None:
    """The token ids that ``item`` runs along: the decoder's for ``decoder_...``."""
    decoder = item.name.startswith("decoder_") and not item.name.endswith("input_ids")
    names = [name for name, array in feeds.items() if array.ndim == 2 and array.dtype.kind in "iu"]
    ranked = sorted(
        names, key=lambda name: (("decoder" in name) != decoder, not name.endswith("ids"), "mask" in name)
    )
    return feeds[ranked[0]] if ranked else None


def _cache_shape(item: Input, batch: int) -> list[int]:
    """An empty cache: the axis of past positions has length 0."""
    shape = [size if isinstance(size, int) else 0 for size in item.shape]
    if shape and not isinstance(item.shape[0], int):
        shape[0] = batch
    return shape


def _row_shape(item: Input, sides: dict[str, int], length: int) -> list[int]:
    """Sizes without the batch axis; a symbolic axis has one size wherever it appears."""
    usual = _IMAGE_SIDE if len(item.shape) == 4 and item.dtype.kind == "f" else min(_FREE_AXIS, length)
    return [size if isinstance(size, int) else sides.setdefault(size, usual) for size in item.shape[1:]]


def _random(generator: np.random.Generator, item: Input, shape: list[int]) -> np.ndarray:
    if item.dtype.kind == "b":
        return np.ones(shape, bool)
    if item.is_integer:
        return generator.integers(0, item.vocabulary or 2, shape).astype(item.dtype)
    return generator.standard_normal(shape).astype(item.dtype)
