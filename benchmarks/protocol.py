"""What every figure means: the data, the calibration samples and the two scores.

MiniLM:   STS-B test, Spearman x100 between the cosine of two sentence vectors (mean over tokens) and the
          human score, 1,379 pairs; calibration on ``sentence1`` of the first 128 rows of train.
SmolLM2:  WikiText-2 test, perplexity over the first 40 windows of 512 tokens that do not overlap, 511
          predictions each; ``<unk>`` is spelled ``unk``, no special tokens; calibration on 32 such windows
          of valid.

Sentences of one length share a batch, so that no figure depends on padding.
"""

from __future__ import annotations

import collections
import csv
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Arrays = dict[str, np.ndarray]
Run = Callable[[Arrays], np.ndarray]  # the model's first output

SENTENCE_TOKENS = 128
SENTENCE_BATCH = 64
PADDED_BATCH, PADDED_TOKENS = 8, 32
WINDOW = 512
MOST_LETTERS = 8  # a token has fewer on average


@dataclasses.dataclass(frozen=True)
class StsB:
    """``data``: folder with stsb-en-{train,test}.csv; ``tokenizer``: the model's tokenizer.json."""

    metric: ClassVar[str] = "STS-B test, Spearman x100"
    digits: ClassVar[int] = 2
    samples: ClassVar[int] = 128
    head: ClassVar[str] = ""
    shapes: ClassVar[tuple[tuple[int, int], ...]] = ((1, 128), (8, 128))

    data: Path
    tokenizer: Path

    def calibration(self, count: int) -> list[list[int]]:
        """Token ids of the first ``count`` sentences."""
        tokenizer = _tokenizer(self.tokenizer, SENTENCE_TOKENS)
        return [tokenizer.encode(first).ids for first, _, _ in self._rows("train")[:count]]

    def score(self, run: Run, limit: int | None = None) -> float:
        """Over the first ``limit`` pairs; all of them when None."""
        rows = self._rows("test")[:limit]
        vectors = self._vectors(run, sorted({text for row in rows for text in row[:2]}))
        cosines = [float(vectors[a] @ vectors[b]) for a, b, _ in rows]
        return 100 * spearman(cosines, [human for _, _, human in rows])

    def _vectors(self, run: Run, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """The sentence vectors, each of length 1."""
        tokenizer = _tokenizer(self.tokenizer, SENTENCE_TOKENS)
        by_length: dict[int, list[tuple[str, list[int]]]] = collections.defaultdict(list)
        for text in texts:
            ids = tokenizer.encode(text).ids
            by_length[len(ids)].append((text, ids))
        found: dict[str, np.ndarray] = {}
        for group in by_length.values():
            for start in range(0, len(group), SENTENCE_BATCH):
                batch = group[start : start + SENTENCE_BATCH]
                means = run(feeds([ids for _, ids in batch])).mean(axis=1)
                means /= np.linalg.norm(means, axis=1, keepdims=True)
                found.update(zip((text for text, _ in batch), means, strict=True))
        return found

    def _rows(self, split: str) -> list[tuple[str, str, float]]:
        with (self.data / f"stsb-en-{split}.csv").open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.reader(file) if row and row[0] != "sentence1"]
        return [(first, second, float(human)) for first, second, human in rows]


@dataclasses.dataclass(frozen=True)
class WikiText:
    """``data``: folder with valid.txt and test.txt; ``tokenizer``: the model's tokenizer.json."""

    metric: ClassVar[str] = "WikiText-2 test, perplexity"
    digits: ClassVar[int] = 2
    samples: ClassVar[int] = 32
    head: ClassVar[str] = "lm_head"
    shapes: ClassVar[tuple[tuple[int, int], ...]] = ((1, 512),)
    windows: ClassVar[int] = 40

    data: Path
    tokenizer: Path

    def calibration(self, count: int) -> list[list[int]]:
        """Token ids of the first ``count`` windows."""
        return self.read_windows("valid", count)

    def score(self, run: Run, limit: int | None = None) -> float:
        """Over the first ``limit`` windows; 40 when None."""
        windows = self.read_windows("test", limit or self.windows)
        nats = [next_token_nats(run(feeds([ids]))[0], np.array(ids)) for ids in windows]
        return float(np.exp(np.mean(nats)))

    def read_windows(self, split: str, count: int) -> list[list[int]]:
        """Token ids of the first ``count`` windows of ``split``."""
        text = (self.data / f"{split}.txt").read_text(encoding="utf-8").replace("<unk>", "unk")
        text = text[: count * WINDOW * MOST_LETTERS]  # the whole text would need much memory
        ids = _tokenizer(self.tokenizer).encode(text, add_special_tokens=False).ids
        if len(ids) < count * WINDOW:
            raise ValueError(f"{split}.txt holds {len(ids) // WINDOW} windows of {WINDOW} tokens")
        return [ids[start : start + WINDOW] for start in range(0, count * WINDOW, WINDOW)]


Protocol = StsB | WikiText
PROTOCOLS: dict[str, type[StsB] | type[WikiText]] = {"minilm": StsB, "smollm2": WikiText}


def feeds(rows: Sequence[Sequence[int]]) -> Arrays:
    """Rows of equal length as a batch without padding."""
    ids = np.array(rows, dtype=np.int64)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def padded(rows: Sequence[Sequence[int]]) -> list[Arrays]:
    """Batches of 8 rows, each cut to 32 tokens or padded with id 0 under mask 0."""
    batch, length, batches = PADDED_BATCH, PADDED_TOKENS, []
    for start in range(0, len(rows), batch):
        group = [row[:length] for row in rows[start : start + batch]]
        ids = np.array([[*row, *[0] * (length - len(row))] for row in group], dtype=np.int64)
        mask = np.arange(length) < np.array([len(row) for row in group])[:, None]
        batches.append({"input_ids": ids, "attention_mask": mask.astype(np.int64)})
    return batches


def write_calibration(batches: Sequence[Arrays], folder: Path) -> Path:
    """``folder`` with one .npz a batch, as ``--calib`` takes it."""
    folder.mkdir()
    for index, batch in enumerate(batches):
        np.savez(folder / f"{index:04}.npz", allow_pickle=False, **batch)
    return folder


def read_calibration(folder: Path) -> list[Arrays]:
    """What ``write_calibration`` wrote."""
    read = []
    for path in sorted(folder.glob("*.npz")):
        with np.load(path) as archive:
            read.append({name: archive[name] for name in archive.files})
    return read


def next_token_nats(logits: np.ndarray, ids: np.ndarray) -> float:
    """Mean negative log-likelihood of ``ids[1:]`` under ``logits`` [tokens, vocabulary]."""
    scores = logits[:-1]
    top = scores.max(axis=1)
    log_sum = top + np.log(np.exp(scores - top[:, None]).sum(axis=1))
    return float((log_sum - scores[np.arange(len(scores)), ids[1:]]).mean())


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation; equal values share their mean rank."""
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _ranks(values: Sequence[float]) -> np.ndarray:
    _, place, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    ranks: np.ndarray = (np.cumsum(counts) - (counts - 1) / 2)[place]
    return ranks


def _tokenizer(path: Path, longest: int | None = None) -> Tokenizer:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_padding()
    if longest is None:
        tokenizer.no_truncation()
    else:
        tokenizer.enable_truncation(longest)
    return tokenizer
