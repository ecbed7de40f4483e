"""Where outliers are while a model learns: figures of each linear, taken at steps of a run or from its checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from qcompile.errors import UserError
from qcompile.training.aware import find_meter
from qcompile.training.kurtosis import token_kurtosis
from qcompile.training.sites import is_linear

OUTLIER = 6.0  # a channel whose mean size is so many times that of the median channel is an outlier
_CHECKPOINT = re.compile(r"^(?:checkpoint|step)[-_](\d+)$")
Figures = dict[str, dict[str, float]]
Batch = Mapping[str, torch.Tensor]


@dataclasses.dataclass
class _Sums:
    """Of one linear, over tokens: sizes and extremes of input channels, kurtosis of outputs."""

    sizes: torch.Tensor | None = None
    extremes: torch.Tensor | None = None
    kurtosis: float = 0.0
    tokens: int = 0

    def take_input(self, x: torch.Tensor) -> None:
        rows = x.detach().reshape(-1, x.shape[-1]).float().abs()
        if len(rows):
            self.sizes = rows.sum(dim=0) if self.sizes is None else self.sizes + rows.sum(dim=0)
            most = rows.amax(dim=0)
            self.extremes = most if self.extremes is None else torch.maximum(self.extremes, most)

    def take_output(self, y: torch.Tensor) -> None:
        found = token_kurtosis(y.detach()).flatten()
        self.kurtosis += float(found.sum())
        self.tokens += found.numel()

    def figures(self, weight: torch.Tensor) -> dict[str, float]:
        assert self.sizes is not None and self.extremes is not None
        size, most, w = self.sizes / self.tokens, self.extremes, weight.detach().float()
        median = size.median().clamp(min=1e-12)
        return {
            "kurtosis": self.kurtosis / self.tokens,
            "outlier_channels": int((size > OUTLIER * median).sum()),
            "mean_ratio": float(size.max() / median),
            "max_ratio": float(most.max() / most.median().clamp(min=1e-12)),
            "weight_kurtosis": float(token_kurtosis(w.flatten())),
            "weight_ratio": float(w.abs().max() / w.square().mean().sqrt().clamp(min=1e-12)),
        }


@torch.no_grad()
def measure(model: nn.Module, batches: Iterable[Batch]) -> Figures:
    """For each linear that ``batches`` (keyword arguments of forward) reach, by name:

    kurtosis: mean over tokens of the kurtosis of the output; normal values have 3
    outlier_channels: input channels whose mean size is 6 times the median channel's, mean_ratio: the largest
    max_ratio: the largest value of an input over that of the median channel
    weight_kurtosis, weight_ratio: of all weights; the largest over their root mean square
    Inputs are taken before a clip. Padding counts, so give batches without it.
    """
    linears = {name: part for name, part in model.named_modules() if is_linear(part)}
    if not linears:
        hint = "give the model itself, with its nn.Linear or Conv1D layers"
        raise UserError("the model has no linear layer to look at", where=type(model).__name__, hint=hint)
    sums = {name: _Sums() for name in linears}
    with _watching(linears, sums), _evaluating(model):
        for batch in batches:
            model(**batch)
    seen = {name: found for name, found in sums.items() if found.tokens}
    return {name: found.figures(linears[name].weight) for name, found in seen.items()}


@contextlib.contextmanager
def _watching(linears: Mapping[str, nn.Module], sums: Mapping[str, _Sums]) -> Iterator[None]:
    handles: list[Any] = []
    for name, part in linears.items():
        found = sums[name]
        handles.append(part.register_forward_pre_hook(_on_input(found), prepend=True))
        handles.append(part.register_forward_hook(_on_output(found)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _on_input(found: _Sums) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    return lambda _module, args: found.take_input(args[0])


def _on_output(found: _Sums) -> Callable[[nn.Module, tuple[Any, ...], torch.Tensor], None]:
    return lambda _module, _args, output: found.take_output(output)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


class History:
    """Figures over steps, kept in a file of JSON lines: {"step": 100, "layers": {name: figures}}.

    A step that is recorded again replaces what the file has of it and of later ones: a run was resumed.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.rows: list[dict[str, Any]] = read(self.path) if self.path.is_file() else []

    def record(self, step: int, model: nn.Module, batches: Iterable[Batch], **more: Any) -> Figures:
        """Measure ``model`` and add the row; ``more`` goes into it (the loss, say)."""
        layers = measure(model, batches)
        self.rows = [row for row in self.rows if row["step"] < step]
        self.rows.append({"step": step, "layers": layers, **more})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("".join(json.dumps(row) + "\n" for row in self.rows), encoding="utf-8")
        return layers


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file that ``History`` wrote, by step."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
        return sorted(rows, key=lambda row: int(row["step"]))
    except (ValueError, KeyError, TypeError) as error:
        hint = "a line is {\"step\": 100, \"layers\": {...}}, as training.History writes it"
        raise UserError(f"not a history of training: {error}", where=str(path), hint=hint) from error


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """The checkpoints in ``folder`` (``checkpoint-100`` as transformers.Trainer names them, or ``step-100``)."""
    found = [(int(m[1]), path) for path in folder.iterdir() if path.is_dir() and (m := _CHECKPOINT.match(path.name))]
    return sorted(found)


def token_batches(rows: Iterable[np.ndarray]) -> list[Batch]:
    """One batch a row of token ids (tokens,)."""
    return [{"input_ids": torch.from_numpy(np.asarray(row, np.int64))[None]} for row in rows]


def measure_checkpoints(folder: str | Path, batches: Iterable[Batch]) -> list[dict[str, Any]]:
    """A row, as ``History`` has, for each checkpoint in ``folder``; each is a Hugging Face folder."""
    from qcompile.capture.hf_folder import load_pretrained, read_config

    found, kept = checkpoints(Path(folder)), list(batches)
    if not found:
        hint = "name the output folder of a run: it has folders such as checkpoint-100 in it"
        raise UserError("no checkpoints", where=str(folder), hint=hint)
    rows = []
    for step, path in found:
        model = load_pretrained(path, read_config(path))
        rows.append({"step": step, "layers": measure(model, kept), "aware": find_meter(model) is not None})
    return rows
