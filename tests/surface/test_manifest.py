"""manifest.json: plain, complete and the same every time."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest

import qcompile
from qcompile import manifest
from qcompile.errors import UserError
from tests.surface.plain import feeds


@dataclasses.dataclass
class Figures:
    low: float
    high: np.ndarray


def test_plain_keeps_what_json_knows_and_spells_the_rest() -> None:
    value = {
        "b": Figures(math.nan, np.array([1.5, math.inf])),
        1: {"y", "x"},
        "c": object(),
        "d": np.int64(3),
    }
    assert manifest.plain(value) == {
        "b": {"low": None, "high": [1.5, None]},
        "1": ["x", "y"],
        "c": "(object)",
        "d": 3,
    }


def test_dumps_does_not_depend_on_the_order_of_keys() -> None:
    assert manifest.dumps({"a": 1, "b": {"c": 2, "d": 3}}) == manifest.dumps({"b": {"d": 3, "c": 2}, "a": 1})


def test_a_manifest_says_what_went_in_and_what_was_done(model: Path, tmp_path: Path) -> None:
    with qcompile.compile(model, recipe="float", target="plain", calibration=[feeds()], seed=7) as compiled:
        compiled.save(tmp_path / "out")
    text = (tmp_path / "out" / "manifest.json").read_text()
    record = json.loads(text)
    assert str(tmp_path) not in text
    assert record["source"]["files"]["tiny.onnx"]["sha256"] == manifest.sha256(model)
    assert record["calibration"]["samples"] == 1 and len(record["calibration"]["sha256"]) == 64
    assert record["seed"] == 7
    assert [p["name"] for p in record["pipeline"]] == ["canonicalise", "lower"]
    assert set(record["versions"]) >= {"qcompile", "numpy", "onnx", "onnx-ir"}
    assert record["files"]["model.onnx"]["sha256"] == manifest.sha256(tmp_path / "out" / "model.onnx")
    assert [v["name"] for v in record["interface"]["inputs"]] == ["input_ids", "attention_mask"]
    assert [k["site"] for k in record["kernels"]] == ["up", "down"]


@pytest.mark.parametrize("content", [None, "{", "[]", '{"format": 99}'])
def test_a_folder_that_is_not_ours_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(UserError):
        manifest.load(tmp_path)
