"""``run``: a text continued, two programs side by side."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from qcompile import cli
from qcompile.models.architectures import VOCAB, cached_export


@pytest.fixture
def decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small decoder with its cache, in a folder with a tokenizer that spells token 7 ``t7``."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(cached_export("llama", with_past=True), tmp_path / "small.onnx")
    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCAB)}, "t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "small.onnx"


def test_a_model_beside_itself_writes_the_same_text(decoder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["run", str(decoder), "--against", str(decoder), "--prompt", "t17 t45 t9", "--tokens", "6"]
    assert cli.main(given) == 0
    shown = capsys.readouterr()
    first, _, second, _, heads, *rows, last = shown.out.splitlines()
    assert re.fullmatch(r"compiled: t17 t45 t9( t\d+){6}", first)
    assert second == first.replace("compiled", "original")
    assert "tokens/s" in heads and [row.split()[0] for row in rows] == ["compiled", "original"]
    assert last == "the first 6 of 6 tokens are the same"


def test_one_model_alone_needs_no_other(decoder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", str(decoder), "--prompt", "t5", "--tokens", "3", "--temperature", "1.5"]) == 0
    assert capsys.readouterr().out.startswith("small.onnx: t5 t")


def test_a_text_needs_a_tokenizer(decoder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (decoder.parent / "tokenizer.json").unlink()
    assert cli.main(["run", str(decoder), "--prompt", "t5"]) == 2
    assert "hint: pass --tokenizer" in capsys.readouterr().err


def test_with_past_is_for_folders(decoder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([str(decoder), "--with-past", "--recipe", "float"]) == 2
    assert "only a Hugging Face folder" in capsys.readouterr().err


@pytest.mark.slow
def test_a_folder_is_exported_with_its_cache_and_proved_against_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from qcompile.models.architectures import ARCHITECTURES

    monkeypatch.chdir(tmp_path)
    ARCHITECTURES["llama"]().save_pretrained("hf")  # type: ignore[operator]
    assert cli.main(["hf", "--with-past", "--recipe", "w8a8", "-o", "out"]) == 0
    assert cli.main(["verify", "out", "--model", "hf"]) == 0
    assert "past_key_values.1.value" in capsys.readouterr().out
