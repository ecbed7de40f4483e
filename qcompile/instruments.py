"""Instruments: hooks before and after each pass, so that no pass carries debugging code of its own."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir

from qcompile.calibration.samples import PROOF_TOKENS, proof_samples, shortened
from qcompile.difference import Difference, proof_of
from qcompile.errors import ContractError, QCompileError, UserError
from qcompile.graph.finite import bad_weight
from qcompile.graph.precision import nudged, output_step
from qcompile.graph.provenance import layer_name
from qcompile.ledger import LOWERING, Entry, Proof
from qcompile.pipeline import Arrays, Context, IrPass, Pass
from qcompile.progress import say

MOST_SENSITIVE = 1e-3  # no model is so ill-conditioned that more is forgiven
LAYERS_AT_A_TIME = 256
Interface = list[dict[str, object]]
Stored = Sequence[dict[str, Path]]  # one dict a sample: output name -> .npy file


class Instrument(Protocol):
    """Watches a pipeline. ``before`` and ``after`` surround each pass."""

    def before(self, model: ir.Model, step: Pass, ctx: Context) -> None: ...
    def after(self, model: ir.Model, step: Pass, ctx: Context, entry: Entry) -> None: ...


# --------------------------------------------------------------------------- the model's interface


def interface(model: ir.Model) -> dict[str, Interface]:
    """Names, element types and shapes (numbers, or the names of dynamic axes) of the inputs and outputs."""
    return {
        "inputs": [_described(v) for v in model.graph.inputs if not v.is_initializer()],
        "outputs": [_described(v) for v in model.graph.outputs],
    }


def _without(found: dict[str, Interface], names: set[str]) -> dict[str, Interface]:
    return {side: [port for port in ports if port["name"] not in names] for side, ports in found.items()}


def _described(value: ir.Value) -> dict[str, object]:
    shape = None
    if value.shape is not None:
        shape = [d if isinstance(d, int) else d.value or "?" for d in value.shape]
    return {"name": value.name, "type": value.dtype.name if value.dtype is not None else "?", "shape": shape}


def _broken_interface(before: dict[str, Interface], after: dict[str, Interface]) -> str:
    """What a pass changed in names, types or number of axes of the inputs or outputs; empty if nothing."""
    for side in ("inputs", "outputs"):
        old, new = before[side], after[side]
        if [v["name"] for v in old] != [v["name"] for v in new]:
            return f"{side} were {[v['name'] for v in old]}, now {[v['name'] for v in new]}"
        for one, other in zip(old, new, strict=True):
            if other["type"] != one["type"]:
                return f"'{one['name']}' was {one['type']}, now {other['type']}"
            if one["shape"] is not None and other["shape"] != one["shape"]:
                return f"'{one['name']}' had shape {one['shape']}, now {other['shape']}"
    return ""


# --------------------------------------------------------------------------- instruments


class Verify:
    """Holds each pass to its claim: the same interface, and outputs as close as it promises.

    The outputs of the model as captured stay on disk (``original``), those after each pass until the next.
    """

    def __init__(self) -> None:
        self.samples: list[Any] = []
        self._held: list[dict[str, Path]] = []
        self.original: list[dict[str, Path]] = []
        self._interface: dict[str, Interface] = {}
        self._shape: list[tuple[object, ...]] = []
        self._moved: set[str] = set()  # inputs and outputs of a cache that a lowering has turned into codes

    def before(self, model: ir.Model, step: Pass, ctx: Context) -> None:
        self._interface = self._kept(model)
        if not self.original:
            _refuse_bad_weight(model)
            self.samples = proof_samples(model, ctx.samples)
            self.original = self._held = self._run_original(model, ctx)
            self._source = ctx.workspace.clone(model)
            self._refuse_nan()
        if step.preserves == "analysis":
            self._shape = list(_structure(model))

    def after(self, model: ir.Model, step: Pass, ctx: Context, entry: Entry) -> None:
        self._moved |= set(entry.facts.get("cache_ports", ()))
        broken = _broken_interface(_without(self._interface, self._moved), self._kept(model))
        if broken:
            raise _contract(step, f"changed the model's interface: {broken}")
        if step.preserves == "analysis":
            if list(_structure(model)) != self._shape:
                raise _contract(step, "is an analysis but edited the graph")
            return
        idle = step.name == LOWERING and entry.rewrites == 0 and not isinstance(step, IrPass)
        now = self._held if idle else self._run_after(model, step, ctx)  # the packaged program is run in any case
        tolerance = max(step.tolerance, output_step(model)) if step.preserves == "function" else None
        entry.proof = self.compare(self._held, now, tolerance)
        if tolerance is not None and not entry.proof.holds:
            tolerance = max(tolerance, self._sensitivity(ctx))
            entry.proof = dataclasses.replace(entry.proof, tolerance=tolerance)
            entry.notes.append(f"one step in the last place of every weight moves the outputs; allowed {tolerance:.1e}")
        if not entry.proof.holds:
            figures = f"relative difference {entry.proof.relative:.2e}, allowed {tolerance:.0e}"
            raise _contract(step, f"changed the function: {figures}")
        self._held = now

    def _sensitivity(self, ctx: Context) -> float:
        """How far rounding each weight of the model as captured moves its outputs; as ``Proof.relative``."""
        moved = self._run(nudged(self._source, ctx.workspace), ctx, "nudged", self.samples)
        found = self.compare(self.original, moved, None).relative
        return min(found, MOST_SENSITIVE) if math.isfinite(found) else 0.0

    def compare(self, before: Stored, after: Stored, tolerance: float | None) -> Proof:
        """The Proof that stored outputs are equal over unmasked positions; raises where shapes differ."""
        worst: dict[str, Difference] = {}
        for sample, old, new in zip(self.samples, before, after, strict=True):
            for name, path in old.items():
                if name in self._moved:
                    continue
                one, other = np.load(path, mmap_mode="r"), np.load(new[name], mmap_mode="r")
                if one.shape != other.shape:
                    raise ContractError(f"output '{name}' had shape {one.shape}, now {other.shape}")
                worst.setdefault(name, Difference()).add(one, other, sample.mask)
        return proof_of(worst.values(), len(before), tolerance)

    def _kept(self, model: ir.Model) -> dict[str, Interface]:
        return _without(interface(model), self._moved)

    def keep(self, results: Iterable[Arrays], ctx: Context, stem: str) -> list[dict[str, Path]]:
        """Store outputs, one dict a sample, in the workspace; their memory is free afterwards."""
        kept = []
        for index, arrays in enumerate(results):
            paths = {}
            for number, (name, array) in enumerate(arrays.items()):
                paths[name] = ctx.workspace.root / f"outputs-{stem}-{index}-{number}.npy"
                np.save(paths[name], array)
            kept.append(paths)
        return kept

    def _run(self, model: ir.Model, ctx: Context, stem: str, samples: Iterable[Any]) -> list[dict[str, Path]]:
        names = [v.name for v in model.graph.outputs if v.name is not None]
        stream = ctx.runner.stream(model, samples, names, label="verify")
        return self.keep((arrays for _, arrays in stream), ctx, stem)

    def _run_original(self, model: ir.Model, ctx: Context) -> list[dict[str, Path]]:
        """Raises UserError with the shapes of the sample that the model cannot run."""
        tried: list[Any] = []
        try:
            return self._run(model, ctx, "original", _noted(self.samples, tried))
        except UserError as error:
            if not tried:
                raise  # it does not load
            shapes = ", ".join(f"{k} {v.dtype.name} {list(v.shape)}" for k, v in tried[-1].feeds.items())
            is_random = getattr(ctx.samples, "is_random", False)
            hint = "these sizes are guesses: give --calib" if is_random else "do its sizes go together in this model?"
            raise UserError(error.message, where=f"the float model on {shapes}", hint=hint) from error

    def _run_after(self, model: ir.Model, step: Pass, ctx: Context) -> list[dict[str, Path]]:
        stem = "even" if self._held and "even" not in next(iter(self._held[0].values())).name else "odd"
        try:
            return self._run(model, ctx, stem, self.samples)
        except QCompileError as error:
            raise _contract(step, f"left a model that does not run: {error.message}") from error

    def _refuse_nan(self) -> None:
        for index, paths in enumerate(self.original):
            for name, path in paths.items():
                array = np.load(path, mmap_mode="r")
                if array.dtype.kind == "f" and array.size and np.isnan(array).all():
                    raise UserError(
                        f"output '{name}' of the float model is NaN on calibration sample {index}",
                        hint="does it overflow on this sample, or divide by zero?",
                    )


def _noted(samples: Iterable[Any], tried: list[Any]) -> Iterator[Any]:
    for sample in samples:
        tried.append(sample)
        yield sample


def _refuse_bad_weight(model: ir.Model) -> None:
    if bad := bad_weight(model):
        raise UserError(f"the weight {bad}", hint="the model was broken before: train or export it anew")


def _structure(model: ir.Model) -> Iterator[tuple[object, ...]]:
    for node in model.graph.all_nodes():
        inputs = tuple(v.name if v else None for v in node.inputs)
        yield node.domain, node.op_type, inputs, tuple(v.name for v in node.outputs)


def _contract(step: Pass, what: str) -> QCompileError:
    """A broken promise is a bug of ours, or the user's mistake where the pass is the user's own."""
    kind = UserError if isinstance(step, IrPass) else ContractError
    return kind(f"pass '{step.spec}' {what}", hint="--dump DIR writes the model after each pass")


class LayerErrors:
    """Per-layer SQNR of ``quantise``: outputs of the linears that exist before and after it, on a few
    tokens of one sample: enough for a ratio of squared sums, where long samples cost much memory.

    The figure of a layer includes the error that reaches it from the layers before.
    """

    def __init__(self) -> None:
        self._held: dict[str, Path] = {}
        self._layers: dict[str, str] = {}

    def before(self, model: ir.Model, step: Pass, ctx: Context) -> None:
        self._layers = {}
        if step.preserves == "approximation" and step.name == "quantise":
            self._layers = dict(_linear_outputs(model))
            self._held = self._fetch(model, ctx, list(self._layers), "before")

    def after(self, model: ir.Model, step: Pass, ctx: Context, entry: Entry) -> None:
        if not self._layers or entry.rewrites == 0:
            return
        present = {v.name for node in model.graph for v in node.outputs}
        now = self._fetch(model, ctx, [name for name in self._layers if name in present], "after")
        mask = _short_sample(model, ctx).mask
        layers = [{"site": self._layers[n], "sqnr_db": self._sqnr(n, path, mask)} for n, path in now.items()]
        entry.facts.setdefault("layers", layers)

    def _sqnr(self, name: str, path: Path, mask: np.ndarray | None) -> float:
        difference = Difference()
        difference.add(np.load(self._held[name], mmap_mode="r"), np.load(path, mmap_mode="r"), mask)
        return difference.sqnr_db

    def _fetch(self, model: ir.Model, ctx: Context, names: list[str], stem: str) -> dict[str, Path]:
        """Values of one sample as files, fetched a few at a time so that they never fill the memory."""
        found: dict[str, Path] = {}
        one = [_short_sample(model, ctx)]
        for start in range(0, len(names), LAYERS_AT_A_TIME):
            some = names[start : start + LAYERS_AT_A_TIME]
            for _, arrays in ctx.runner.stream(model, one, some, label="layers"):
                for name, array in arrays.items():
                    found[name] = ctx.workspace.root / f"layer-{stem}-{len(found)}.npy"
                    np.save(found[name], array)
        return found


def _short_sample(model: ir.Model, ctx: Context) -> Any:
    return shortened(model, proof_samples(model, ctx.samples)[-1], PROOF_TOKENS)


def _linear_outputs(model: ir.Model) -> Iterator[tuple[str, str]]:
    """The output value and the user's name of each matmul with constant weights."""
    for node in model.graph:
        weights = node.inputs[1] if node.op_type in ("MatMul", "Gemm") else None
        if weights is not None and weights.is_initializer() and node.outputs[0].name:
            yield node.outputs[0].name, layer_name(node)


class Dump:
    """Writes the model after each pass to ``folder``: ``NN-name.onnx`` with its data, and ``NN-name.txt``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0

    def before(self, model: ir.Model, step: Pass, ctx: Context) -> None:
        if self._count == 0:
            self._write(model, "captured")

    def after(self, model: ir.Model, step: Pass, ctx: Context, entry: Entry) -> None:
        self._write(model, step.name)

    def _write(self, model: ir.Model, name: str) -> None:
        stem = f"{self._count:02d}-{_file_name(name)}"
        copy = model.clone()  # saving redirects tensors to the new data file
        ir.save(copy, self._folder / f"{stem}.onnx", external_data=f"{stem}.data")
        (self._folder / f"{stem}.txt").write_text(str(model), encoding="utf-8")
        self._count += 1


def _file_name(text: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in text)


class Timer:
    """One line on stderr for each pass: what it did and how long it took. Never in the manifest."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._count = 0
        self._start = 0.0

    def before(self, model: ir.Model, step: Pass, ctx: Context) -> None:
        self._start = time.monotonic()

    def after(self, model: ir.Model, step: Pass, ctx: Context, entry: Entry) -> None:
        self._count += 1
        facts = [f"{entry.rewrites} rewrites"]
        if entry.skips:
            facts.append(f"{len(entry.skips)} sites left alone")
        if entry.proof is not None:
            facts.append(describe(entry.proof))
        facts.append(f"{time.monotonic() - self._start:.1f} s")
        say(f"[{self._count}/{self._total}] {entry.spec}: {', '.join(facts)}")


def describe(proof: Proof) -> str:
    """A proof in a few words."""
    if proof.relative == 0.0:
        return "identical outputs"
    if proof.tolerance is not None:
        return f"equal to {proof.relative:.1e}"
    return f"SQNR {proof.sqnr_db:.1f} dB"
