"""The README's files and commands, run as they stand on a small BERT."""

from __future__ import annotations

import contextlib
import io
import json
import re
import runpy
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from qcompile import cli
from qcompile.backends.ort.native import build
from qcompile.errors import UserError
from qcompile.models.architectures import cached_export
from tests.house.readme_sections import README

FILE = re.compile(r"<!-- file: (\S+) -->\n```\w+\n(.*?)```", re.DOTALL)
COMMANDS = re.compile(r"<!-- commands -->\n```sh\n(.*?)```", re.DOTALL)
KERNELS = re.compile(r"<!-- commands: kernels -->\n```sh\n(.*?)```", re.DOTALL)
DECODER = re.compile(r"<!-- commands: decoder -->\n```sh\n(.*?)```", re.DOTALL)
NAMES = {"mixed.toml", "make_calib.py", "calib.jsonl", "exact.py", "generate.py", "kernels.py"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The README's files beside a model and its tokenizer, after all of its commands."""
    made = tmp_path_factory.mktemp("readme")
    blocks = dict(FILE.findall(README.read_text()))
    assert blocks.keys() == NAMES
    for name, text in blocks.items():
        (made / name).write_text(text)
    shutil.copy(cached_export("bert"), made / "model.onnx")
    _write_tokenizer(made / "tokenizer.json", [json.loads(line)["text"] for line in blocks["calib.jsonl"].splitlines()])
    (found,) = COMMANDS.findall(README.read_text())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made)
        runpy.run_path("make_calib.py")
        for line in found.splitlines():
            program, *arguments = shlex.split(line)
            assert program == "qcompile" and cli.main(arguments) == 0, line
    return made


@pytest.fixture(scope="module")
def decoder(folder: Path) -> list[str]:
    """What the README's commands about generation printed, line by line; their programs lie in ``folder``."""
    shutil.copy(cached_export("llama", with_past=True), folder / "decoder.onnx")
    (found,) = DECODER.findall(README.read_text())
    shown = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(shown):
        patch.chdir(folder)
        for line in found.splitlines():
            program, *arguments = shlex.split(line)
            assert program == "qcompile" and cli.main(arguments) == 0, line
        runpy.run_path("generate.py")
    return shown.getvalue().splitlines()


def test_a_decoder_continues_a_text_in_float_and_in_low_bits(decoder: list[str], folder: Path) -> None:
    texts = [line for line in decoder if line.startswith(("compiled: ", "original: "))]
    assert len(texts) == 2 and all("The first sentence" in text for text in texts)
    (share,) = (line for line in decoder if line.endswith("tokens are the same"))
    assert re.fullmatch(r"the first \d+ of 16 tokens are the same", share)
    assert [line.split()[-1] for line in decoder[-8:]] == ["ms"] * 8
    record = json.loads((folder / "low" / "manifest.json").read_text())
    ports = {port["name"]: port["type"] for port in record["interface"]["inputs"]}
    assert ports["past_key_values.0.key"] == "UINT8"
    assert {k["kernel"] for k in record["kernels"] if k["low_bit"]} == {"MatMulNBits"}


def _write_tokenizer(path: Path, texts: list[str]) -> None:
    words = ["[UNK]", *re.findall(r"\w+|[^\w\s]", " ".join(texts))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(dict.fromkeys(words))}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(path))


def test_the_recipe_file_does_what_its_comments_say(folder: Path) -> None:
    record = json.loads((folder / "mixed/manifest.json").read_text())
    (quantise,) = (p for p in record["passes"] if p["name"] == "quantise")
    formats = {s["site"]: s["activations"] for s in quantise["sites"]}
    assert "encoder.layer.0.output.dense" not in formats
    last = [text for site, text in formats.items() if site.startswith("encoder.layer.1.")]
    first = [text for site, text in formats.items() if site.startswith("encoder.layer.0.")]
    assert len(last) == 6 and all("per_token" in text for text in last)
    assert len(first) == 5 and all("per_tensor" in text for text in first)
    assert not [note for note in quantise["notes"] if "matches" in note]


def test_the_calibration_files_hold_two_samples_each(folder: Path) -> None:
    for name in ("mixed", "compiled"):
        record = json.loads((folder / name / "manifest.json").read_text())
        assert record["calibration"]["samples"] == 2, name
    (os_plus,) = (p for p in record["pipeline"] if p["name"] == "os_plus")
    assert (os_plus["options"]["shift"], os_plus["options"]["points"]) == ("off", 5)


def test_the_exact_session_gives_what_the_default_one_gives(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    monkeypatch.chdir(folder)
    exact = runpy.run_path("exact.py")["session"]
    plain = onnxruntime.InferenceSession("compiled/model.onnx", providers=["CPUExecutionProvider"])
    feeds = {i.name: np.ones((1, 4), np.int64) for i in plain.get_inputs()}
    np.testing.assert_allclose(exact.run(None, feeds)[0], plain.run(None, feeds)[0], rtol=0, atol=1e-6)


def test_the_session_with_kernels_gives_what_one_without_gives(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    try:
        build.find_compiler()
    except UserError as error:
        pytest.skip(error.message)
    monkeypatch.chdir(folder)
    (found,) = KERNELS.findall(README.read_text())
    program, *arguments = shlex.split(found)
    assert program == "qcompile" and cli.main(arguments) == 0
    fused = runpy.run_path("kernels.py")["session"]
    plain = onnxruntime.InferenceSession("integers/model.onnx", providers=["CPUExecutionProvider"])
    feeds = {i.name: np.ones((1, 4), np.int64) for i in plain.get_inputs()}
    np.testing.assert_array_equal(fused.run(None, feeds)[0], plain.run(None, feeds)[0])
