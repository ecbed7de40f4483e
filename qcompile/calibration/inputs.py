"""What a model's inputs are, and how the ones that the user's data leaves out are made."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from qcompile.errors import UserError

Arrays = dict[str, np.ndarray]
UNLIMITED = 1 << 30
UNNAMED = "?"  # an axis of no known size and no name
_IMAGE_SIDE = 224
_FREE_AXIS = 16
_MADE = (
    "mask",
    "position_ids",
    "cache_position",
    "token_type",
    "segment",
    "decoder_input_ids",
    "past",
    "use_cache",
)


# (operator, input of ids) -> input of the table that they index
_TABLES = {("Gather", 1): 0, ("EmbedLayerNormalization", 0): 2, ("EmbedLayerNormalization", 1): 4}


@dataclasses.dataclass(frozen=True)
class Input:
    """One input of the model.

    shape: an int where the axis is static, its name where it is symbolic, UNNAMED where it has none
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
    def is_image(self) -> bool:
        return self.dtype.kind == "f" and len(self.shape) == 4

    @property
    def is_cache(self) -> bool:
        """Keys and values of tokens past, of which there may be none."""
        return "past" in self.name or ("cache" in self.name and self.dtype.kind == "f")

    def __str__(self) -> str:
        return f"{self.dtype.name} [{', '.join(str(size) for size in self.shape)}]"


def model_inputs(model: ir.Model) -> list[Input]:
    """The inputs that a caller must feed, in the model's order."""
    return [_input(value) for value in model.graph.inputs if value.name not in model.graph.initializers]


def complete(feeds: Arrays, inputs: Sequence[Input]) -> Arrays:
    """``feeds`` with every input of the model, in the model's order; feeds are batches [batch, ...].

    Made when absent: masks, position and token type ids, the decoder's start, an empty key/value cache.
    """
    done = dict(feeds)
    for item in sorted(inputs, key=_making_order):
        if item.name not in done:
            done[item.name] = _made(item, done, inputs)
    return {item.name: done[item.name] for item in inputs}


def drawn_inputs(inputs: Sequence[Input]) -> list[Input]:
    """The inputs that ``complete`` cannot make from others, so that random ones must be drawn."""
    has_ids = any(item.name.endswith("input_ids") and "decoder" not in item.name for item in inputs)
    words = _MADE if has_ids else tuple(word for word in _MADE if word != "decoder_input_ids")
    return [item for item in inputs if not any(word in item.name for word in words)]


def random_rows(inputs: Sequence[Input], lengths: Sequence[int], seed: int = 0) -> list[Arrays]:
    """Random rows (one sample each, no batch axis) of ``lengths`` tokens for the inputs that must be drawn.

    Floats are standard normal. Raises UserError where nothing says how long an axis is.
    """
    generator = np.random.default_rng(seed)
    wanted = drawn_inputs(inputs)
    sequences = {item.shape[1] for item in inputs if len(item.shape) == 2 and item.is_discrete}
    rows = []
    for length in lengths:
        sides = {str(size): length for size in sequences if size != UNNAMED}
        rows.append({item.name: _random(generator, item, _row_shape(item, sides, length)) for item in wanted})
    return rows


def _input(value: ir.Value) -> Input:
    if value.dtype is None or value.shape is None:
        raise UserError(
            f"input '{value.name}' has no type or rank", hint="export the model with typed inputs"
        )
    try:
        dtype = np.dtype(value.dtype.numpy())
    except TypeError as error:
        what = f"input '{value.name}' has type {value.dtype.name}, which is no array"
        raise UserError(what, hint="export the model with an input of ordinary numbers") from error
    if dtype.kind == "O":
        hint = "cut off what turns text into numbers, and compile the rest"
        raise UserError(f"input '{value.name}' is text, not numbers", hint=hint)
    named = [size if isinstance(size, int) else size.value or UNNAMED for size in value.shape]
    for axis, size in _sizes_of_weights(value, len(named)):
        named[axis] = size
    return Input(value.name or "", dtype, tuple(named), _vocabulary(value))


def _sizes_of_weights(value: ir.Value, rank: int) -> Iterator[tuple[int, int]]:
    """(axis, size) of ``value`` where only the weight that reads it says the size, as of an image's channels."""
    for node, index in value.uses():
        weight = node.inputs[1] if index == 0 and len(node.inputs) > 1 else None
        if node.op_type == "Cast":
            yield from _sizes_of_weights(node.outputs[0], rank)
        elif weight is not None and weight.const_value is not None and rank > 1:
            shape = [int(size) for size in weight.const_value.shape.numpy()]
            if node.op_type == "Conv":
                yield 1, shape[1] * node.attributes.get_int("group", 1)
            elif node.op_type == "MatMul" and len(shape) > 1:
                yield rank - 1, shape[-2]
            elif node.op_type in ("LayerNormalization", "RMSNormalization") and len(shape) == 1:
                yield rank - 1, shape[0]


def _vocabulary(value: ir.Value) -> int:
    """The smallest embedding table that ``value`` indexes directly."""
    rows = [UNLIMITED]
    for node, index in value.uses():
        if node.op_type == "Cast":
            rows.append(_vocabulary(node.outputs[0]) or UNLIMITED)
        place = _TABLES.get((node.op_type, index))
        table = node.inputs[place] if place is not None and place < len(node.inputs) else None
        if table is not None and table.const_value is not None and len(table.const_value.shape) == 2:
            rows.append(int(table.const_value.shape.numpy()[0]))
    return min(rows) % UNLIMITED


def _making_order(item: Input) -> int:
    """Decoder ids come before their mask, masks before the positions that count them."""
    return next(
        (i for i, word in enumerate(("decoder_input_ids", "mask", "position")) if word in item.name), 3
    )


def _made(item: Input, feeds: Arrays, inputs: Sequence[Input]) -> np.ndarray:
    batch = next((len(array) for array in feeds.values() if array.ndim), 1)
    if item.is_cache:
        return np.zeros(_cache_shape(item, batch), item.dtype)
    if "use_cache" in item.name:
        return np.zeros([size if isinstance(size, int) else 1 for size in item.shape], item.dtype)
    ids = _ids_for(item, feeds)
    if item.name.endswith("decoder_input_ids") and ids is not None:
        return np.concatenate([np.zeros_like(ids[:, :1]), ids[:, :-1]], axis=1).astype(item.dtype)
    shape = _made_shape(item, feeds, inputs)
    made = _filled(item, shape, feeds) if shape is not None else None
    if made is None:
        raise UserError(
            f"input '{item.name}' ({item}) is missing from the calibration data, and cannot be made",
            hint=f"give --calib an .npz with the key '{item.name}' too; found: {', '.join(feeds) or 'nothing'}",
        )
    return made.astype(item.dtype)


def _made_shape(item: Input, feeds: Arrays, inputs: Sequence[Input]) -> list[int] | None:
    """The shape of ``item`` beside ``feeds``: sizes of axes by name, else those of the sequence it runs along."""
    sizes: dict[str, int] = {}
    for other in inputs:
        if other.name in feeds:
            sizes |= zip((str(name) for name in other.shape), feeds[other.name].shape, strict=False)
    sizes.pop(UNNAMED, None)
    along = _sequence_for(item, feeds)
    beside = dict(enumerate(along if len(item.shape) > 1 else along[1:]))
    shape = [n if isinstance(n, int) else sizes.get(n, beside.get(axis)) for axis, n in enumerate(item.shape)]
    known = [size for size in shape if size is not None]
    return known if len(known) == len(shape) else None


def _filled(item: Input, shape: list[int], feeds: Arrays) -> np.ndarray | None:
    if "mask" in item.name:  # a float mask of more axes is added to scores; any other is 1 at what is real
        return np.zeros(shape) if item.dtype.kind == "f" and len(shape) > 2 else np.ones(shape)
    if "position" in item.name and len(shape) == 1:  # cache_position: one count for the whole batch
        return np.arange(shape[0])
    if "position" in item.name and len(shape) == 2:
        masks = (array for name, array in feeds.items() if "mask" in name and array.shape == tuple(shape))
        counted = next(masks, np.ones(shape)).astype(np.int64)
        return np.maximum(np.cumsum(counted, axis=1) - 1, 0)
    if "token_type" in item.name or "segment" in item.name:
        return np.zeros(shape)
    return None


def _sequence_for(item: Input, feeds: Arrays) -> tuple[int, ...]:
    """(batch, length) of what ``item`` runs along: token ids, or a sequence of vectors; empty without either."""
    ids = _ids_for(item, feeds)
    if ids is None:
        ids = next((array for array in feeds.values() if array.ndim == 3 and array.dtype.kind == "f"), None)
    return () if ids is None else ids.shape[:2]


def _ids_for(item: Input, feeds: Arrays) -> np.ndarray | None:
    """The token ids that ``item`` runs along: the decoder's for ``decoder_...``. A mask may stand for them."""
    start = item.name.endswith("decoder_input_ids")
    decoder = item.name.startswith("decoder_") and not start
    names = [name for name, array in feeds.items() if array.ndim == 2 and array.dtype.kind in "iu"]
    ranked = sorted(
        (name for name in names if not (start and "mask" in name)),
        key=lambda name: (("decoder" in name) != decoder, not name.endswith("ids"), "mask" in name),
    )
    return feeds[ranked[0]] if ranked else None


def _cache_shape(item: Input, batch: int) -> list[int]:
    """An empty cache: the axis of past positions has length 0."""
    shape = [size if isinstance(size, int) else 0 for size in item.shape]
    if shape and not isinstance(item.shape[0], int):
        shape[0] = batch
    return shape


def _row_shape(item: Input, sides: dict[str, int], length: int) -> list[int]:
    """Sizes without the batch axis; ``sides`` holds those of axes by name, and takes in the ones chosen here."""
    _refuse_unknown(item, sides)
    shape = []
    for axis, size in enumerate(item.shape[1:], 1):
        usual = length if item.dtype.kind == "f" or axis == len(item.shape) - 1 else min(_FREE_AXIS, length)
        usual = _IMAGE_SIDE if item.is_image else usual
        if isinstance(size, str):
            size = usual if size == UNNAMED else sides.setdefault(size, usual)
        shape.append(size)
    return shape


def _refuse_unknown(item: Input, sides: Mapping[str, int]) -> None:
    """One free axis of floats can be a sequence, and two an image's sides; any more cannot be guessed."""
    guessable = item.shape[1:2] if item.is_image else item.shape[1:]
    unknown = [size for size in guessable if isinstance(size, str) and size not in sides]
    count = len(set(unknown) - {UNNAMED}) + unknown.count(UNNAMED)
    follows = any(size in sides for size in item.shape[1:])
    if item.dtype.kind == "f" and count > (0 if item.is_image or follows else 1):
        raise UserError(
            f"no random data can be made for input '{item.name}' ({item}): "
            f"nothing says how long {' and '.join(dict.fromkeys(unknown))} is",
            hint=f"give --calib an .npz with the key '{item.name}', or export the model with a fixed size there",
        )


def _random(generator: np.random.Generator, item: Input, shape: list[int]) -> np.ndarray:
    if item.dtype.kind == "b":
        return np.ones(shape, bool)
    if item.is_integer:
        return generator.integers(0, item.vocabulary or 2, shape).astype(item.dtype)
    return generator.standard_normal(shape).astype(item.dtype)
