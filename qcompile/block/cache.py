"""What a walk over the blocks keeps on disk: values of every sample, and the model after the last finished block.

    <folder>/state.json                     blocks that are done, and what was noted of them; written last
    <folder>/model-<done>.onnx, *.bin       the model then; the .bin files are those that the walk has added
    <folder>/*.npz                          codes that a solver chose for weights of that model
    <folder>/float|quantised/<value>/<sample>.npy

A folder belongs to one pass with its options, and one key: the model, the recipe, the seed, the samples, the versions.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from qcompile.graph.grids import Grid, all_grids, remember_grid
from qcompile.graph.workspace import Workspace
from qcompile.manifest import versions
from qcompile.quant.numerics import QuantizedWeight
from qcompile.quant.schemes import WeightScheme
from qcompile.recipe import Recipe

Stream = Literal["float", "quantised"]
Facts = dict[str, Any]
_STATE = "state.json"


@dataclasses.dataclass(frozen=True)
class State:
    """parts: how many parts of the model are done; facts: by block, in order, what was noted
    grids: by the weight's name, the file of its codes
    """

    parts: int = 0
    facts: dict[str, Facts] = dataclasses.field(default_factory=dict)
    grids: dict[str, str] = dataclasses.field(default_factory=dict)


def make_key(model: ir.Model, recipe: Recipe, seed: int, samples: Iterable[Any]) -> str:
    """A digest of all that decides the result of a pass; ``model`` must have its tensors in a workspace."""
    digest = hashlib.sha256()
    about = {"seed": seed, "recipe": recipe.model_dump(mode="json"), "versions": versions()}
    digest.update(json.dumps(about, sort_keys=True).encode())
    digest.update(ir.to_proto(model).SerializeToString(deterministic=True))  # large tensors by their digests
    for sample in samples:
        mask = {} if sample.mask is None else {"mask of the sample": sample.mask}
        for name, array in sorted((sample.feeds | mask).items()):
            digest.update(f"{name}{array.dtype}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


class Cache:
    """The folder of one walk below ``parent``; in ``workspace`` and without snapshots when that is None.

    ``workspace`` is where the tensors of ``model`` live. Snapshots are kept relative to the model as it is now,
    before the walk.
    """

    def __init__(self, parent: Path | None, label: str, key: str, model: ir.Model, workspace: Workspace) -> None:
        self.folder = (parent or workspace.root / "blocks") / f"{_slug(label)}-{key[:16]}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._workspace, self._outlives = workspace, parent is not None
        self._known = _locations(model)
        self._kept: dict[str, tuple[QuantizedWeight, str]] = {}
        self.state = self._read_state() if self._outlives else State()

    # ----------------------------------------------------------------- values

    def put(self, stream: Stream, name: str, sample: int, array: np.ndarray) -> None:
        path = self._file(stream, name, sample)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, array, allow_pickle=False)

    def get(self, stream: Stream, name: str, sample: int) -> np.ndarray:
        """The array, mapped and not to be written to."""
        array: np.ndarray = np.load(self._file(stream, name, sample), mmap_mode="r", allow_pickle=False)
        return array

    def keep(self, names: Iterable[str]) -> None:
        """Remove the values of both streams but ``names``."""
        kept = {_slug(name) for name in names}
        for folder in self.folder.glob("*/*"):
            if folder.is_dir() and folder.name not in kept:
                shutil.rmtree(folder)

    def _file(self, stream: Stream, name: str, sample: int) -> Path:
        return self.folder / stream / _slug(name) / f"{sample:05d}.npy"

    # ----------------------------------------------------------------- the model and how far it is

    def finish(self, model: ir.Model, state: State) -> None:
        """Keep ``model`` and ``state``; a kill at any moment leaves the ones before or these."""
        self.state = state
        self._workspace.adopt(model)
        if not self._outlives:
            return
        for location in sorted(_locations(model) - self._known):
            _copy(self._workspace.root / location, self.folder / location)
        path = self._snapshot(state.parts)
        ir.save(model, path)
        self._write_state(dataclasses.replace(state, grids=self._keep_grids(model)))
        for old in set(self.folder.glob("model-*.onnx")) - {path}:
            old.unlink()

    def restore(self, model: ir.Model) -> None:
        """Put the model of ``state`` into ``model``; nothing where no block is done."""
        if not self.state.parts:
            return
        held = ir.load(self._snapshot(self.state.parts))
        for value in held.graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor) and not (self.folder / tensor.location).exists():
                value.const_value = self._in_workspace(tensor)
        model.graph = held.graph
        model.functions.clear()
        model.functions.update(held.functions)
        self._workspace.adopt(model)
        for name, file in self.state.grids.items():
            weight, scheme, before = _read_grid(self.folder / file)
            kept = self._workspace.tensor(before, name)
            remember_grid(model.graph.initializers[name], weight, scheme, self._workspace, kept)

    def _keep_grids(self, model: ir.Model) -> dict[str, str]:
        """The file of each weight's codes, by the weight's name; files are named by what they hold."""
        for value, grid in all_grids(model):
            name = str(value.name)
            if name not in self._kept or self._kept[name][0] is not grid.weight:
                self._kept[name] = grid.weight, _write_grid(self.folder, grid)
        return {str(value.name): self._kept[str(value.name)][1] for value, _ in all_grids(model)}

    def _in_workspace(self, tensor: ir.ExternalTensor) -> ir.ExternalTensor:
        return ir.ExternalTensor(
            tensor.location, tensor.offset, tensor.length, tensor.dtype,
            shape=ir.Shape(tensor.shape.numpy()), name=str(tensor.name), base_dir=self._workspace.root,
        )  # fmt: skip

    def _snapshot(self, parts: int) -> Path:
        return self.folder / f"model-{parts}.onnx"

    def _read_state(self) -> State:
        path = self.folder / _STATE
        if not path.exists():
            return State()
        state = State(**json.loads(path.read_text(encoding="utf-8")))
        return state if self._snapshot(state.parts).exists() else State()

    def _write_state(self, state: State) -> None:
        whole = self.folder / f".{_STATE}"
        whole.write_text(json.dumps(dataclasses.asdict(state), indent=1), encoding="utf-8")
        os.replace(whole, self.folder / _STATE)


def _locations(model: ir.Model) -> set[str]:
    """The files of the model's large tensors; in a workspace they are named by their content."""
    held = (value.const_value for value in model.graph.initializers.values())
    return {str(tensor.location) for tensor in held if isinstance(tensor, ir.ExternalTensor)}


def _copy(source: Path, target: Path) -> None:
    """The file at ``target`` as well, whole or not at all."""
    if target.exists():
        return
    beside = target.with_name(f".{target.name}")
    shutil.copyfile(source, beside)
    os.replace(beside, target)


def _write_grid(folder: Path, grid: Grid) -> str:
    """The name of the file that was written."""
    weight, before = grid.weight, grid.before.numpy()
    about = json.dumps({"group_size": weight.group_size, "scheme": grid.scheme.model_dump(mode="json")}, sort_keys=True)
    digest = hashlib.blake2b(about.encode(), digest_size=16)
    for array in (weight.codes, weight.scale, weight.zero_point, before):
        digest.update(np.ascontiguousarray(array).tobytes())
    name = f"{digest.hexdigest()}.npz"
    beside = folder / f".{name}"
    np.savez(
        beside, about=np.array(about), before=before,
        codes=weight.codes, scale=weight.scale, zero_point=weight.zero_point,
    )  # fmt: skip
    os.replace(beside, folder / name)
    return name


def _read_grid(path: Path) -> tuple[QuantizedWeight, WeightScheme, np.ndarray]:
    """Codes, their format, and the weight that they stand for."""
    with np.load(path, allow_pickle=False) as held:
        about = json.loads(str(held["about"]))
        weight = QuantizedWeight(held["codes"], held["scale"], held["zero_point"], about["group_size"])
        before = held["before"]
    return weight, WeightScheme.model_validate(about["scheme"]), before


def _slug(name: str) -> str:
    """A name for a file: readable, and different for different names."""
    digest = hashlib.blake2b(name.encode(), digest_size=6).hexdigest()
    return f"{re.sub(r'[^A-Za-z0-9_.-]+', '_', name)[:60]}-{digest}"
