"""The scores and the calibration samples that the committed tables rest on."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr
from tokenizers import Tokenizer, models, pre_tokenizers

from benchmarks import protocol
from benchmarks.protocol import StsB, WikiText

WORDS = ["unk", "a", "b", "c", "d", "e"]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """One id a word, in the order of WORDS."""
    made = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="unk"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_spearman_shares_the_ranks_of_equal_values() -> None:
    generator = np.random.default_rng(0)
    a, b = generator.integers(0, 9, 60).tolist(), generator.integers(0, 9, 60).tolist()
    assert protocol.spearman(a, b) == pytest.approx(spearmanr(a, b)[0], abs=1e-12)


def test_next_token_nats_of_an_even_guess_is_the_log_of_the_vocabulary() -> None:
    logits = np.full((5, 7), 50, np.float32)
    assert protocol.next_token_nats(logits, np.arange(5)) == pytest.approx(np.log(7), abs=1e-5)
    logits[np.arange(4), np.arange(1, 5)] += 100  # certain of the next token, not of its own
    assert protocol.next_token_nats(logits, np.arange(5)) == pytest.approx(0, abs=1e-6)


def test_padded_batches_hold_the_same_tokens() -> None:
    rows = [list(range(1, 4 + n)) for n in range(10)]
    batches = protocol.padded(rows)
    assert [batch["input_ids"].shape for batch in batches] == [(8, 32), (2, 32)]
    found = [
        ids[mask.astype(bool)].tolist()
        for batch in batches
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    assert found == rows


def test_calibration_survives_its_folder(tmp_path: Path) -> None:
    batches = [protocol.feeds([[n] * (n + 1)]) for n in range(12)]
    read = protocol.read_calibration(protocol.write_calibration(batches, tmp_path / "calibration"))
    assert [r["input_ids"].tolist() for r in read] == [b["input_ids"].tolist() for b in batches]


def test_the_sentence_score_is_the_order_of_cosines(tmp_path: Path, tokenizer: Path) -> None:
    rows = [("a b", "a b", 5.0), ("a b", "a c", 3.0), ("a b", "d e", 0.0)]
    for split in ("train", "test"):
        with (tmp_path / f"stsb-en-{split}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("sentence1", "sentence2", "score"), *rows])
    bench = StsB(tmp_path, tokenizer)
    vectors = np.eye(len(WORDS), dtype=np.float32)
    assert bench.score(lambda feeds: vectors[feeds["input_ids"]]) == pytest.approx(100)
    assert bench.calibration(2) == [[1, 2], [1, 2]]


def test_windows_do_not_overlap_and_unknown_words_are_spelled_out(tmp_path: Path, tokenizer: Path) -> None:
    words = ["a", "<unk>", "b"] * protocol.WINDOW
    (tmp_path / "valid.txt").write_text(" ".join(words))
    found = WikiText(tmp_path, tokenizer).calibration(2)
    assert [len(window) for window in found] == [protocol.WINDOW] * 2
    assert (found[0] + found[1])[:6] == [1, 0, 2, 1, 0, 2]
    with pytest.raises(ValueError, match="holds 3 windows"):
        WikiText(tmp_path, tokenizer).calibration(4)
