"""Text continued by a program in ONNX Runtime: token by token, with a key/value cache or without.

A program with a cache has inputs ``past_key_values.N.key`` (any name that begins with ``past``) and outputs
``present.N.key``; each token is computed once. Without one, everything is computed again for every token.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qcompile.backends.base import open_session
from qcompile.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_TOKENS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>", "</s>")
_PAST, _PRESENT = re.compile(r"^past(_key_values)?"), re.compile(r"^present(_key_values)?")
_NUMPY = {
    "tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(uint8)": np.uint8, "tensor(int8)": np.int8,
    "tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(bool)": np.bool_,
}  # fmt: skip


class Decoder:
    """A causal language model in an ``onnxruntime.InferenceSession``, and the tokens that it has read so far.

    The first output must be logits (batch, sequence, vocabulary). Raises UserError for a model that is none.
    """

    def __init__(self, session: Any) -> None:
        self._session = session
        self._inputs = {item.name: item for item in session.get_inputs()}
        outputs = [item.name for item in session.get_outputs()]
        self._logits = outputs[0]
        presents = {_PRESENT.sub("", name): name for name in outputs if _PRESENT.match(name)}
        pasts = {name: _PAST.sub("", name) for name in self._inputs if _PAST.match(name)}
        lost = [name for name, rest in pasts.items() if rest not in presents]
        unknown = set(self._inputs) - set(pasts) - {"input_ids", "attention_mask", "position_ids"}
        if "input_ids" not in self._inputs or unknown or len(session.get_outputs()[0].shape) != 3:
            found = f"inputs {', '.join(self._inputs)}; first output {outputs[0]}"
            raise UserError("the program is no causal language model", where=found, hint="its logits must come first")
        if lost:
            hint = "the outputs must be called 'present...' as the inputs 'past...'"
            raise UserError(f"no output continues the cache input '{lost[0]}'", hint=hint)
        self._presents = {name: presents[rest] for name, rest in pasts.items()}
        self.has_cache = bool(pasts)
        self.reset()

    @classmethod
    def open(cls, program: str | Path, threads: int = 1) -> Decoder:
        """The decoder of an ONNX file, or of the program in a folder."""
        return cls(open_session(Path(program), threads=threads))

    def reset(self) -> None:
        """Forget every token."""
        self._ids: np.ndarray = np.zeros((1, 0), np.int64)
        self._mask: np.ndarray = np.zeros((1, 0), np.int64)
        self._past: dict[str, Any] = {}

    @property
    def cache_bytes(self) -> int:
        """Bytes of the keys and values held now."""
        return sum(value.numpy().nbytes for value in self._past.values())

    def past(self, name: str) -> np.ndarray:
        """What the next step is given as the input ``name``, one of the cache's."""
        held: np.ndarray = self._past[name].numpy()
        return held

    def feed(self, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """The logits (batch, n, vocabulary) of ``n`` more tokens, (batch, n) int.

        mask: (batch, n), 0 at padding, whose logits mean nothing; a row may begin with some, to be as long as others
        """
        count = ids.shape[1]
        self._ids = _longer(self._ids, ids)
        self._mask = _longer(self._mask, np.ones_like(ids) if mask is None else mask)
        if not self.has_cache:
            return self._run(self._told(self._ids.shape[1]))[:, -count:]
        if not self._past:
            self._past = {name: _value(self._empty(name, len(ids))) for name in self._presents}
        return self._run(self._told(count))

    def _told(self, count: int) -> dict[str, np.ndarray]:
        """What the model is told of the last ``count`` tokens; positions count real tokens."""
        positions = np.maximum(self._mask.cumsum(axis=1) - 1, 0)[:, -count:]
        told = {"input_ids": self._ids[:, -count:], "attention_mask": self._mask, "position_ids": positions}
        return {name: array.astype(self._type(name)) for name, array in told.items() if name in self._inputs}

    def _run(self, feeds: dict[str, np.ndarray]) -> np.ndarray:
        """The logits; what is present becomes the past without a copy."""
        values = {name: _value(array) for name, array in feeds.items()} | self._past
        names = [self._logits, *self._presents.values()]
        try:
            logits, *present = self._session.run_with_ort_values(names, values)
        except UserError:  # of a program that no ONNX Runtime runs
            raise
        except Exception as error:  # onnxruntime raises its own unrelated types
            what = f"ONNX Runtime cannot run the model: {str(error).strip().splitlines()[0][:400]}"
            raise UserError(what, hint="is the text longer than the model has positions for?") from error
        self._past = dict(zip(self._presents, present, strict=True))
        result: np.ndarray = logits.numpy()
        return result

    def _empty(self, name: str, batch: int) -> np.ndarray:
        """A cache of no tokens."""
        sizes = [side if isinstance(side, int) else 0 for side in self._inputs[name].shape]
        return np.zeros([batch, *sizes[1:]], self._type(name))

    def _type(self, name: str) -> type[np.generic]:
        return _NUMPY[self._inputs[name].type]


def _longer(before: np.ndarray, more: np.ndarray) -> np.ndarray:
    return np.concatenate([before, more], axis=1) if before.shape[1] else more


def _value(array: np.ndarray) -> Any:
    import onnxruntime

    return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))


@dataclasses.dataclass(frozen=True)
class Token:
    """One generated token, and the seconds that it took; the first one's are those of the whole prompt."""

    id: int
    seconds: float


def generate(
    session: Any,
    ids: Sequence[int],
    *,
    max_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    stop: Collection[int] = (),
) -> Iterator[Token]:
    """The tokens that continue ``ids``, one at a time, until one of ``stop`` (which is given out) or ``max_tokens``.

    session: a Decoder, an ``onnxruntime.InferenceSession``, or the path of an ONNX file or compiled folder
    temperature: of the softmax that a token is drawn from, by ``seed``; 0 takes the likeliest
    """
    if not len(ids):
        raise UserError("the prompt holds no token", hint="give some text to continue")
    if not 0 <= temperature < np.inf:
        raise UserError(f"temperature is {temperature}", hint="0 takes the likeliest token; 1 draws as the model says")
    if seed < 0:
        raise UserError(f"seed is {seed}, but must be a whole number from 0 up", hint="leave it out for 0")
    decoder = _decoder(session)
    decoder.reset()
    generator = np.random.default_rng(seed)
    new = np.array([ids], np.int64)
    for _ in range(max_tokens):
        start = time.perf_counter()
        chosen = choose(decoder.feed(new)[0, -1], temperature, generator)
        yield Token(chosen, time.perf_counter() - start)
        if chosen in stop:
            return
        new = np.array([[chosen]], np.int64)


def choose(logits: np.ndarray, temperature: float, generator: np.random.Generator) -> int:
    """A token by its logits (vocabulary)."""
    if temperature == 0.0:
        return int(logits.argmax())
    scores = logits.astype(np.float64) / temperature
    chances = np.exp(scores - scores.max())
    return int(generator.choice(chances.size, p=chances / chances.sum()))


def end_tokens(tokenizer: Tokenizer) -> frozenset[int]:
    """The ids of those tokens of ``tokenizer`` that end a text."""
    found = (tokenizer.token_to_id(name) for name in END_TOKENS)
    return frozenset(token for token in found if token is not None)


def _decoder(source: Any) -> Decoder:
    if isinstance(source, Decoder):
        return source
    return Decoder.open(source) if isinstance(source, str | Path) else Decoder(source)
