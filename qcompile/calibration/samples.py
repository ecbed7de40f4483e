"""Calibration samples: from .npz files or text, completed to what the model wants, checked before use.

One sample is one sequence (or one image, ...), or as many as the model's static batch holds.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from qcompile.calibration import arrays, text
from qcompile.calibration.inputs import UNLIMITED, Input, complete, model_inputs, random_rows
from qcompile.calibration.positions import longest_sequence, position_limits
from qcompile.errors import UserError

Arrays = dict[str, np.ndarray]
BUILT_IN_TEXT = Path(__file__).parent / "data" / "calibration.txt"
TEXT_SUFFIXES = (".txt", ".jsonl")
RANDOM_SAMPLES, RANDOM_LENGTH = 16, 128
PROOF_TOKENS = 128  # of a sample that is cut short
HELD_OUT = 2  # samples that are kept from calibration, to check the result on


@dataclasses.dataclass(frozen=True)
class Sample:
    """The feeds of one run, by input name.

    mask: bool [batch, sequence], True at real tokens; None when the model has no mask input.
    """

    feeds: Arrays
    mask: np.ndarray | None = None


class SampleSet:
    """Samples that can be iterated any number of times; files are read again each time, one at a time.

    longest: tokens that the model has positions for; max_samples: samples at most, each of a whole batch
    warnings_: what the user should know about where the samples come from; is_random: they are made up
    held_out: the samples after those, HELD_OUT at most; nothing is calibrated on them
    """

    def __init__(
        self,
        rows: Callable[[], Iterator[Arrays]],
        inputs: Sequence[Input],
        *,
        longest: int = UNLIMITED,
        max_samples: int = 128,
        pad_id: int = 0,
        warnings_: Sequence[str] = (),
        is_random: bool = False,
    ) -> None:
        self.inputs = {item.name: item for item in inputs}
        self.warnings_ = list(warnings_)
        self.is_random = is_random
        self._rows = rows
        self._longest = longest
        self._max_samples = max_samples
        self._pad_id = pad_id
        self._batch = _batch_size(inputs)
        self._mask_input = mask_input(inputs)
        self._can_pad = _can_pad(inputs, self._mask_input)
        self._length = 0
        self.held_out: list[Sample] = []
        for number, sample in enumerate(self._made(max_samples + HELD_OUT)):  # reads and checks everything once
            if number < max_samples:
                self._length += 1
            else:
                self.held_out.append(sample)
        if self._length == 0:
            wanted = f"the model takes {self._batch} at a time" if self._batch > 1 else "at least one is needed"
            hint = "give --calib more rows, or leave it out for built-in data"
            raise UserError(f"the calibration data holds no complete sample; {wanted}", hint=hint)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Sample]:
        return self._made(self._max_samples)

    def _made(self, count: int) -> Iterator[Sample]:
        for number, rows in enumerate(itertools.islice(self._batches(), count)):
            yield self._sample(rows, f"calibration sample {number}")

    def _batches(self) -> Iterator[list[Arrays]]:
        """The rows of each sample; those that fill no batch are left out."""
        held: list[Arrays] = []
        for row in map(self._without_padding, self._rows()):
            if held and not self._fits(held[0], row):
                held = []
            held.append(row)
            if len(held) == self._batch:
                yield held
                held = []

    def _without_padding(self, row: Arrays) -> Arrays:
        """``row`` up to its last real token, so that counts of tokens are of real ones, and padding costs nothing."""
        mask = row.get(self._mask_input) if self._can_pad and self._mask_input is not None else None
        if mask is None or not mask.any():
            return row
        axes = self.inputs[str(self._mask_input)].shape[1:]
        alike = [name for name in row if self.inputs[name].shape[1:] == axes]
        if not str(axes[0]).isidentifier() or any(row[name].shape != mask.shape for name in alike):
            return row
        end = int(np.flatnonzero(mask)[-1]) + 1
        return row | {name: row[name][:end] for name in alike}

    def _fits(self, first: Arrays, row: Arrays) -> bool:
        """Rows of different lengths share a batch only when a mask can say which tokens are padding."""
        if first.keys() != row.keys():
            return False
        return all(first[n].shape == a.shape or (self._can_pad and a.ndim == 1) for n, a in row.items())

    def _sample(self, rows: list[Arrays], where: str) -> Sample:
        feeds = complete(self._stacked(rows), list(self.inputs.values()))
        arrays.check_feeds(feeds, self.inputs, where, self._longest)
        mask = feeds[self._mask_input].astype(bool) if self._mask_input is not None else None
        return Sample(feeds, mask)

    def _stacked(self, rows: list[Arrays]) -> Arrays:
        """One batch: rows padded on the right to the longest, with mask 0 there."""
        lengths = {name: [len(row[name]) if row[name].ndim else 0 for row in rows] for name in rows[0]}
        feeds = {name: self._padded(name, [row[name] for row in rows]) for name in rows[0]}
        mask, ids = self._mask_input, next((n for n in lengths if n.endswith("input_ids")), None)
        if mask is not None and mask not in feeds and ids is not None and len(set(lengths[ids])) > 1:
            columns = np.arange(feeds[ids].shape[1])
            real = columns[None, :] < np.array(lengths[ids])[:, None]
            feeds[mask] = real.astype(self.inputs[mask].dtype)
        return feeds

    def _padded(self, name: str, parts: list[np.ndarray]) -> np.ndarray:
        if not self.inputs[name].shape:  # one number for the whole batch
            return parts[0]
        if len({part.shape for part in parts}) == 1:
            return np.stack(parts)
        longest = max(len(part) for part in parts)
        fill = self._pad_id if name.endswith("input_ids") else 0
        widths = [[(0, longest - len(part))] + [(0, 0)] * (part.ndim - 1) for part in parts]
        padded = [np.pad(p, w, constant_values=fill) for p, w in zip(parts, widths, strict=True)]
        return np.stack(padded)


@dataclasses.dataclass(frozen=True)
class _Request:
    """What the caller asked for. limit: tokens in a sample; see ``load_samples`` for the rest."""

    max_samples: int
    limit: int
    seed: int


def first_samples(samples: Iterable[Any], count: int | None = None, *, tokens: int | None = None) -> Iterator[Any]:
    """Samples from the start until they are ``count``, or come to ``tokens`` tokens (padding included).

    One at least, where there is one; a sample that exceeds ``tokens`` is not cut.
    """
    seen = 0
    for number, sample in enumerate(samples, 1):
        yield sample
        seen += int(np.prod(next(iter(sample.feeds.values())).shape[:2]))
        if number == count or (tokens is not None and seen >= tokens):
            return


def shortened(model: ir.Model, sample: Sample, tokens: int) -> Sample:
    """``sample`` cut to its first ``tokens`` tokens where all its inputs have them and ``model`` takes any length."""
    lengths = {array.shape[1] for array in sample.feeds.values() if array.ndim > 1}
    shapes = [value.shape for value in model.graph.inputs if value.name in sample.feeds and value.shape is not None]
    if any(len(shape) > 1 and isinstance(shape[1], int) for shape in shapes):
        return sample
    if len(lengths) != 1 or max(lengths) <= tokens:
        return sample
    feeds = {name: array[:, :tokens] if array.ndim > 1 else array for name, array in sample.feeds.items()}
    return Sample(feeds, None if sample.mask is None else sample.mask[:, :tokens])


def proof_samples(model: ir.Model, samples: Iterable[Any]) -> list[Any]:
    """Samples to check a result on, of those held out from calibration, else the first: one whole, one cut short.

    Two lengths show what holds for one alone, and a few tokens cost little.
    """
    found = list(first_samples(getattr(samples, "held_out", None) or samples, 2))
    return found[:1] + [shortened(model, sample, PROOF_TOKENS) for sample in found[1:]]


def load_samples(
    model: ir.Model,
    calib: Path | None,
    tokenizer: Path | None,
    max_samples: int = 128,
    max_length: int = 512,
    seed: int = 0,
) -> SampleSet:
    """The calibration samples for ``model``.

    calib: an ``.npz`` (keys are input names, the first axis counts samples), a folder of them, a ``.txt`` or
        a ``.jsonl`` (key ``text``); None takes a small built-in text, or random data where no text fits
    tokenizer: ``tokenizer.json`` or the folder that holds it; text needs it
    max_length: tokens in a sample at most; text for a language model is cut into windows of that many
    seed: of the random data

    Everything is read and checked once here. Raises UserError naming the key, the expected and the found.
    """
    inputs = model_inputs(model)
    limit = min(max_length, position_limits(model)[0], _static_length(inputs))
    request = _Request(max_samples, limit, seed)
    if calib is None:
        return _default_samples(model, inputs, tokenizer, request)
    if not calib.exists():
        hint = "give an .npz, a folder of .npz, a .txt or a .jsonl"
        raise UserError(f"no such calibration file or folder: {calib}", hint=hint)
    if calib.is_dir() or calib.suffix == ".npz":
        longest = longest_sequence(model, inputs)
        return SampleSet(arrays.reader(calib, inputs), inputs, longest=longest, max_samples=max_samples)
    if calib.suffix not in TEXT_SUFFIXES:
        raise UserError(
            f"cannot read calibration data of type '{calib.suffix}'",
            where=str(calib),
            hint="give an .npz, a folder of .npz, a .txt or a .jsonl",
        )
    return _text_samples(model, inputs, calib, tokenizer, request)


def _default_samples(
    model: ir.Model, inputs: Sequence[Input], tokenizer: Path | None, request: _Request
) -> SampleSet:
    if _token_input(inputs) is not None and tokenizer is not None:
        samples = _text_samples(model, inputs, BUILT_IN_TEXT, tokenizer, request)
        samples.warnings_.append(
            f"no calibration data given: {len(samples)} samples of a small built-in text are used; "
            "give --calib with text like yours for better accuracy"
        )
        return samples
    count = min(request.max_samples, RANDOM_SAMPLES)
    longest = min(request.limit, RANDOM_LENGTH)
    lengths = _random_lengths(count + HELD_OUT, longest, request.seed)
    rows = random_rows(inputs, np.repeat(lengths, _batch_size(inputs)).tolist(), request.seed)
    what = "token ids" if _token_input(inputs) is not None else "inputs"
    warning = f"no calibration data given: random {what} are used, so the ranges mean little; give --calib"
    return SampleSet(lambda: iter(rows), inputs, max_samples=count, warnings_=[warning], is_random=True)


def _random_lengths(count: int, longest: int, seed: int) -> np.ndarray:
    """Every other sample is as long as can be, since ranges grow with the length; the rest are shorter."""
    lengths = np.random.default_rng(seed).integers(min(2, longest), longest + 1, count)
    lengths[::2] = longest
    return lengths


def _text_samples(
    model: ir.Model, inputs: Sequence[Input], calib: Path, tokenizer: Path | None, request: _Request
) -> SampleSet:
    target = _token_input(inputs)
    if target is None:
        raise UserError(
            f"the model takes no token ids, so {calib.name} cannot calibrate it",
            hint=f"give an .npz with {', '.join(item.name for item in inputs)}",
        )
    encoder = text.load_tokenizer(tokenizer)
    as_windows = _predicts_tokens(model, inputs) and not text.is_framed(encoder)
    read = text.windows if as_windows else text.lines
    count = (request.max_samples + HELD_OUT) * _batch_size(inputs)
    tokens = read(encoder, calib, request.limit, count)
    if not tokens:
        hint = "headings and very short lines are left out; give sentences"
        raise UserError("the calibration text holds no usable line", where=str(calib), hint=hint)
    pad = text.pad_id(encoder)
    rows = [text.row(ids, target, inputs, pad) for ids in tokens]
    return SampleSet(lambda: iter(rows), inputs, max_samples=request.max_samples, pad_id=pad)


def _token_input(inputs: Sequence[Input]) -> Input | None:
    """The input that takes the token ids of text."""
    candidates = [item for item in inputs if item.is_integer and len(item.shape) == 2]
    named = [item for item in candidates if item.name.endswith("input_ids") and "decoder" not in item.name]
    tables = [
        item for item in candidates if item.vocabulary and "type" not in item.name and "pos" not in item.name
    ]
    return next(iter(named or tables), None)


def _predicts_tokens(model: ir.Model, inputs: Sequence[Input]) -> bool:
    """Whether the first output is logits over the vocabulary at every position, as a language model's."""
    output = model.graph.outputs[0]
    if output.shape is None or len(output.shape) != 3 or any("decoder" in item.name for item in inputs):
        return False
    token = _token_input(inputs)
    width = output.shape[2]
    if token is not None and token.vocabulary and isinstance(width, int):
        return width >= token.vocabulary
    return output.name == "logits"


def _static_length(inputs: Sequence[Input]) -> int:
    token = _token_input(inputs)
    return token.shape[1] if token is not None and isinstance(token.shape[1], int) else 1 << 30


def _batch_size(inputs: Sequence[Input]) -> int:
    """The static batch, 1 where it is free."""
    static = {item.shape[0] for item in inputs if item.shape and isinstance(item.shape[0], int)}
    static -= {1} if len(static) > 1 else set()
    return int(max(static)) if static else 1


def mask_input(inputs: Sequence[Input]) -> str | None:
    """The name of the input that says which tokens are real; an encoder's before a decoder's."""
    masks = [
        item.name for item in inputs if "mask" in item.name and len(item.shape) == 2 and item.is_discrete
    ]
    return next(iter(sorted(masks, key=lambda name: ("decoder" in name, name != "attention_mask"))), None)


def _can_pad(inputs: Sequence[Input], mask: str | None) -> bool:
    """Whether rows can be padded to one length: the mask's axis 1 is free, and no input has it elsewhere."""
    symbol = next((item.shape[1] for item in inputs if item.name == mask), None)
    if not isinstance(symbol, str):
        return False
    return not any(symbol in (i.shape if len(i.shape) > 2 else i.shape[:1]) for i in inputs)
