"""Calibration text to token ids, with the model's own tokenizer.json."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qcompile.calibration.inputs import Input
from qcompile.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_HEADING = re.compile(r"^\s*=.*=\s*$")  # WikiText's section titles
_MIN_LETTERS = 8
_PAD_TOKENS = ("[PAD]", "<pad>", "<|pad|>", "<|endoftext|>", "</s>", "<|im_end|>")


def load_tokenizer(path: Path | None) -> Tokenizer:
    """The tokenizer in ``path`` (a tokenizer.json or its folder), set to neither pad nor truncate."""
    if path is None:
        raise UserError(
            "calibration text needs the model's tokenizer",
            hint="pass --tokenizer FOLDER (with tokenizer.json)",
        )
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise UserError(
            f"no tokenizer.json at {path}",
            hint="AutoTokenizer.from_pretrained(...).save_pretrained(FOLDER) writes one",
        )
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception
        hint = "AutoTokenizer.from_pretrained(...).save_pretrained(FOLDER) writes one"
        raise UserError(f"not a tokenizer.json: {error}", where=str(file), hint=hint) from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def spelled(tokenizer: Tokenizer, ids: Iterable[int]) -> dict[int, str]:
    """How the tokenizer writes each token; ids that it does not know are left out."""
    found = {token: tokenizer.id_to_token(token) for token in ids}
    return {token: text for token, text in found.items() if text is not None}


def pad_id(tokenizer: Tokenizer) -> int:
    """The id of the tokenizer's padding token; 0 when it has none."""
    found = (tokenizer.token_to_id(token) for token in _PAD_TOKENS)
    return next((token for token in found if token is not None), 0)


def is_framed(tokenizer: Tokenizer) -> bool:
    """Whether every text ends in a special token such as [SEP]: an encoder's tokenizer."""
    mask = tokenizer.encode("a").special_tokens_mask
    return bool(mask) and mask[-1] == 1


def lines(tokenizer: Tokenizer, path: Path, max_length: int, max_samples: int) -> list[np.ndarray]:
    """One sample a line (jsonl: a record), special tokens included, cut to ``max_length`` tokens."""
    tokenizer.enable_truncation(max_length)
    found: list[np.ndarray] = []
    for line in _texts(path):
        if len(found) == max_samples:
            break
        if len(line.strip()) >= _MIN_LETTERS and not _HEADING.match(line):
            found.append(np.array(tokenizer.encode(line.strip()).ids, dtype=np.int64))
    tokenizer.no_truncation()
    return found


def windows(tokenizer: Tokenizer, path: Path, length: int, max_samples: int) -> list[np.ndarray]:
    """The text as one stream of tokens, cut into windows that do not overlap; no special tokens.

    The rest that fills no window is used only when there is no full one.
    """
    found: list[np.ndarray] = []
    held: list[int] = []
    for line in _texts(path):
        held.extend(tokenizer.encode(line, add_special_tokens=False).ids)
        while len(held) >= length and len(found) < max_samples:
            found.append(np.array(held[:length], dtype=np.int64))
            held = held[length:]
        if len(found) == max_samples:
            break
    return found or ([np.array(held, dtype=np.int64)] if held else [])


def row(ids: np.ndarray, target: Input, inputs: Sequence[Input], padding: int) -> dict[str, np.ndarray]:
    """One sample without batch axis; padded, with its mask, when ``target`` has a longer static axis."""
    length = target.shape[1]
    if isinstance(length, str) or len(ids) == length:
        return {target.name: ids.astype(target.dtype)}
    missing = (0, length - len(ids))
    made = {target.name: np.pad(ids, missing, constant_values=padding).astype(target.dtype)}
    for item in inputs:
        if "mask" in item.name and len(item.shape) == 2 and "decoder" not in item.name:
            made[item.name] = np.pad(np.ones(len(ids)), missing).astype(item.dtype)
    return made


def _texts(path: Path) -> Iterator[str]:
    """Lines with their line ends, or the ``text`` of each record of a .jsonl; ``<unk>`` is spelled ``unk``.

    Some tokenizers turn ``<unk>`` into a special id, which ruins the statistics.
    """
    with path.open(encoding="utf-8") as file:
        try:
            for number, line in enumerate(file, 1):
                content = _record(line, path, number) if path.suffix == ".jsonl" else line
                if content:
                    yield content.replace("<unk>", "unk")
        except UnicodeDecodeError as error:
            hint = "save the text as UTF-8"
            raise UserError(f"the calibration text is not UTF-8: {error}", where=str(path), hint=hint) from error


def _record(line: str, path: Path, number: int) -> str:
    if not line.strip():
        return ""
    try:
        record = json.loads(line)
    except ValueError as error:
        hint = "a .jsonl holds one object a line, with the key 'text'"
        raise UserError(f"not JSON: {error}", where=f"{path}:{number}", hint=hint) from error
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        keys = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise UserError(
            "the record has no text", where=f"{path}:{number}", hint=f"the key must be 'text'; found: {keys}"
        )
    return str(record["text"]) + "\n"
