"""``analyze`` on a training run: its checkpoints, or the history that ``training.History`` keeps of it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from qcompile.calibration import text
from qcompile.calibration.samples import BUILT_IN_TEXT
from qcompile.errors import UserError
from qcompile.progress import warn

WORST = ("kurtosis", "max_ratio", "mean_ratio", "weight_ratio", "weight_kurtosis")
Rows = list[dict[str, Any]]


def is_run(model: str) -> bool:
    """Whether MODEL is a history (.jsonl) or a folder of checkpoints, and no model itself."""
    path = Path(model)
    if path.is_file():
        return path.suffix == ".jsonl"
    if not path.is_dir() or any((path / name).is_file() for name in ("config.json", "model.onnx")):
        return False
    return any(child.is_dir() and child.name.startswith(("checkpoint-", "step-")) for child in path.iterdir())


def read_run(model: str, calib: Path | None, tokenizer: Path | None, samples: int, length: int) -> Rows:
    """A row for each step: {"step": n, "layers": {linear: figures}}."""
    path = Path(model)
    if importlib.util.find_spec("torch") is None:
        raise UserError("a training run is read with torch", hint="pip install 'qcompile-nn[torch]'")
    from qcompile.training import history

    if path.is_file():
        return history.read(path)
    last = history.checkpoints(path)[-1][1]
    words = tokenizer or next((place for place in (last, path) if (place / "tokenizer.json").is_file()), None)
    if words is None:
        warn("no tokenizer was found, so the figures are of random tokens; give --tokenizer DIR")
        rows = list(np.random.default_rng(0).integers(0, _vocabulary(last), (4, 32)))
    else:
        rows = text.windows(text.load_tokenizer(words), calib or BUILT_IN_TEXT, length, samples)
    return history.measure_checkpoints(path, history.token_batches(rows))


def _vocabulary(folder: Path) -> int:
    from qcompile.capture.hf_folder import read_config

    return int(read_config(folder).get("vocab_size", 2))


def summary(rows: Rows) -> list[dict[str, Any]]:
    """One line a step: the worst layer of each figure, the sum of outlier channels, and where the kurtosis is worst."""
    found = []
    for row in rows:
        layers = row["layers"]
        worst = max(layers, key=lambda name: layers[name]["kurtosis"])
        channels = sum(figures["outlier_channels"] for figures in layers.values())
        line: dict[str, Any] = {"step": row["step"], "outlier_channels": channels}
        line |= {key: max(figures[key] for figures in layers.values()) for key in WORST}
        found.append(line | {"largest kurtosis at": worst})
    return found


def write_plots(rows: Rows, path: Path) -> None:
    from qcompile.reporting import plots
    from qcompile.reporting.training import over_training

    if not plots.available():
        raise UserError("plots need matplotlib", hint="pip install 'qcompile-nn[report]'")
    path.write_text(over_training({"": rows}), encoding="utf-8")
