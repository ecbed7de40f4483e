"""``run``: let a language model continue a text, the low-bit program beside the original."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qcompile.commands import options
from qcompile.commands.text import columns
from qcompile.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from qcompile.generation import Token

TOKENIZER = "tokenizer.json"


@click.command("run", short_help="let a language model continue a text")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--prompt", required=True, metavar="TEXT", help="What to continue.")
@click.option(
    "--against",
    type=click.Path(path_type=Path),
    metavar="ORIGINAL",
    help="An .onnx file (or folder with model.onnx) to run beside it.",
)
@click.option(
    "--tokenizer",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder with tokenizer.json; one beside either model is found.",
)
@click.option("--tokens", type=options.COUNT, default=64, show_default=True, metavar="N", help="New tokens at most.")
@click.option(
    "--temperature",
    type=options.BOUND,
    default=0.0,
    show_default=True,
    metavar="X",
    help="0 takes the likeliest token; else one is drawn.",
)
@click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="Seed of the draw.")
@click.option("--threads", type=options.COUNT, default=1, show_default=True, metavar="N", help="Threads.")
@options.debug
def run(
    model: Path, prompt: str, against: Path | None, tokenizer: Path | None, tokens: int, temperature: float,
    seed: int, threads: int,
) -> None:  # fmt: skip
    """Continue a text with MODEL (a compiled folder or an .onnx file with logits as its first output).

    A model with a key/value cache computes each token once; without one it computes all of them again each time.
    """
    from qcompile.backends.base import program_at
    from qcompile.calibration.text import load_tokenizer
    from qcompile.generation import Decoder, end_tokens, generate

    named = {"compiled" if against is not None else model.name: program_at(model)}
    if against is not None:
        named["original"] = program_at(against)
    words = load_tokenizer(tokenizer if tokenizer is not None else _beside(list(named.values())))
    ids = words.encode(prompt).ids
    rows, written = [], []
    for name, path in named.items():
        decoder = Decoder.open(path, threads)
        found = list(
            generate(decoder, ids, max_tokens=tokens, temperature=temperature, seed=seed, stop=end_tokens(words))
        )
        rows.append((name, len(ids), found[0].seconds * 1e3, len(found), _rate(found), _cache(decoder)))
        written.append([token.id for token in found])
        click.echo(f"{name}: {_text(words, ids, written[-1])}\n")
    click.echo(columns(rows, ("", "prompt", "ms to first", "new tokens", "tokens/s after it", "cache")))
    if against is not None:
        same = _common(*written)
        click.echo(f"the first {same} of {max(map(len, written))} tokens are the same")


def _beside(models: list[Path]) -> Path:
    for folder in (path if path.is_dir() else path.parent for path in models):
        if (folder / TOKENIZER).is_file():
            return folder
    raise UserError("a text needs the model's tokenizer", hint="pass --tokenizer FOLDER (with tokenizer.json)")


def _rate(tokens: list[Token]) -> float | None:
    """Tokens a second after the first; None where there is none."""
    seconds = sum(token.seconds for token in tokens[1:])
    return (len(tokens) - 1) / seconds if seconds else None


def _cache(decoder: Any) -> str:
    return f"{decoder.cache_bytes / 1e6:.3g} MB" if decoder.has_cache else "none"


def _text(words: Tokenizer, prompt: list[int], new: list[int]) -> str:
    """Prompt and continuation, decoded together so that the space between them is right."""
    return str(words.decode([*prompt, *new])).strip()


def _common(a: list[int], b: list[int]) -> int:
    """How many tokens the two begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
