"""Figures of outliers over a run, from its history and from its checkpoints, and how ``analyze`` shows them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from qcompile import cli
from qcompile.errors import UserError
from qcompile.training import History, measure, measure_checkpoints, quantization_aware
from tests.training.small import Perceptron, ids, opt


def test_an_outlier_channel_is_seen_where_it_is() -> None:
    model = opt(1)
    norm = model.model.decoder.layers[0].final_layer_norm
    with torch.no_grad():
        norm.weight[5], norm.bias[5] = 30.0, 30.0
        model.model.decoder.layers[0].fc1.weight[7] *= 100
    found = measure(model, [{"input_ids": ids()}])
    fc1, fc2 = (found[f"model.decoder.layers.0.{name}"] for name in ("fc1", "fc2"))
    assert fc1["outlier_channels"] == 1 and fc1["max_ratio"] > 10 and fc1["mean_ratio"] > 10
    assert fc1["kurtosis"] > 20 and fc1["weight_ratio"] > 10 and fc1["weight_kurtosis"] > 20
    query = found["model.decoder.layers.0.self_attn.q_proj"]
    assert query["outlier_channels"] == 0 and query["weight_ratio"] < 6
    assert fc2["outlier_channels"] >= 1 and model.training


def test_inputs_are_looked_at_before_a_clip() -> None:
    x = {"x": 5 * torch.randn(64, 8)}
    plain = measure(Perceptron(), [x])
    model = quantization_aware(Perceptron(), bits=2)
    model(torch.randn(8, 8))  # the ranges start small
    clipped = measure(model, [x])
    assert clipped["first"]["max_ratio"] == plain["first"]["max_ratio"]
    assert clipped["first"]["kurtosis"] != plain["first"]["kurtosis"]


def test_a_history_goes_on_where_it_was(tmp_path: Path) -> None:
    path, batch = tmp_path / "history.jsonl", [{"x": torch.randn(8, 8)}]
    history = History(path)
    for step in (0, 10, 20):
        history.record(step, Perceptron(), batch, loss=1.0)
    again = History(path)
    again.record(10, Perceptron(), batch)
    assert [row["step"] for row in History(path).rows] == [0, 10]
    assert set(History(path).rows[0]["layers"]) == {"first", "second", "head"}


def test_a_broken_history_is_named(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    path.write_text("{}\n")
    with pytest.raises(UserError, match="not a history"):
        History(path)


def checkpointed(folder: Path) -> Path:
    model: Any = quantization_aware(opt(1))
    for step in (2, 10):
        model(input_ids=ids())
        model.save_pretrained(folder / f"checkpoint-{step}")
        with torch.no_grad():
            model.model.decoder.layers[0].fc1.weight[3] *= 50
    return folder


def test_checkpoints_are_read_in_order(tmp_path: Path) -> None:
    rows = measure_checkpoints(checkpointed(tmp_path), [{"input_ids": ids()}])
    assert [row["step"] for row in rows] == [2, 10] and all(row["aware"] for row in rows)
    ratios = [row["layers"]["model.decoder.layers.0.fc1"]["weight_ratio"] for row in rows]
    assert ratios[1] > 2 * ratios[0]
    with pytest.raises(UserError, match="no checkpoints"):
        measure_checkpoints(tmp_path / "checkpoint-2", [])


def test_analyze_shows_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, plot = checkpointed(tmp_path / "run"), tmp_path / "run.svg"
    assert cli.main(["analyze", str(run), "--plots", str(plot)]) == 0
    printed = capsys.readouterr()
    assert "random tokens" in printed.err and "at step 10" in printed.out
    assert re.search(r"^ *2 .*\n *10 ", printed.out, re.MULTILINE) and "fc1" in printed.out
    assert plot.read_text().startswith("<svg")
    assert cli.main(["analyze", str(run), "--json"]) == 0
    assert [row["step"] for row in json.loads(capsys.readouterr().out)] == [2, 10]


def test_a_plot_of_one_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["analyze", str(tmp_path / "model.onnx"), "--plots", "x.svg"]) == 2
    assert "no steps to plot" in capsys.readouterr().err
