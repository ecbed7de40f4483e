"""Passes: what they are, how they are named and parsed, and the runner that holds them to their contract."""

from __future__ import annotations

import abc
import dataclasses
import importlib
import importlib.metadata
import importlib.util
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import onnx_ir as ir

from qcompile.errors import UserError, unknown_name
from qcompile.graph.workspace import Workspace
from qcompile.ledger import Ledger, Preserves
from qcompile.recipe import Recipe

# name -> "module:class". A string table, so that listing the passes imports none of them.
PASSES: dict[str, str] = {
    "canonicalise": "qcompile.passes.canonicalise:Canonicalise",
    "outliers": "qcompile.passes.outliers:Outliers",
    "os_plus": "qcompile.passes.os_plus:OsPlus",
    "smoothquant": "qcompile.passes.smoothquant:SmoothQuant",
    "outlier_suppression": "qcompile.passes.outlier_suppression:OutlierSuppression",
    "quantise": "qcompile.passes.quantise:Quantise",
}
ENTRY_POINTS = "qcompile.passes"

Arrays = dict[str, np.ndarray]


class Sample(Protocol):
    """One calibration sample: the feeds and which positions of them are real."""

    feeds: Arrays
    mask: np.ndarray | None


class Samples(Protocol):
    """A re-iterable stream of samples; iterating does not keep earlier samples alive."""

    def __iter__(self) -> Iterator[Any]: ...
    def __len__(self) -> int: ...


class Runner(Protocol):
    """Runs the IR on samples and hands back named values, one sample at a time."""

    def stream(
        self, model: ir.Model, samples: Iterable[Any], fetch: Sequence[str], label: str = ""
    ) -> Iterator[tuple[Any, Arrays]]: ...


@dataclasses.dataclass(frozen=True)
class Target:
    """What a pass may know of a backend: data only.

    ``activation_zero_point`` is the side int8 activations live on (uint8 codes for x86 CPU).
    """

    name: str
    backend: str
    description: str
    per_token: bool = True
    kernels: tuple[str, ...] = ()


@dataclasses.dataclass
class Context:
    """What the runner gives to a pass."""

    workspace: Workspace
    ledger: Ledger
    recipe: Recipe
    target: Target
    samples: Samples
    runner: Runner
    max_drop: float | None = None
    seed: int = 0


class Pass(ir.passes.InPlacePass, abc.ABC):
    """A pass is a frozen dataclass; its fields are its options.

    ``preserves`` is the claim that the runner checks: ``function`` (equal outputs up to ``tolerance``,
    relative), ``approximation`` (the difference is measured and recorded) or ``analysis`` (the graph
    is not touched).
    """

    name: ClassVar[str]
    preserves: ClassVar[Preserves]
    tolerance: ClassVar[float] = 1e-5

    @abc.abstractmethod
    def run(self, model: ir.Model, ctx: Context) -> int:
        """Rewrite ``model`` in place and return the number of rewrites."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        raise UserError(f"pass '{self.name}' needs a context", hint="run it through qcompile.compile(...)")

    @property
    def spec(self) -> str:
        """The pass as the command line writes it: ``name{option=value}`` with the non-default options."""
        changed = [
            f"{f.name}={getattr(self, f.name)}"
            for f in dataclasses.fields(self)  # type: ignore[arg-type]
            if getattr(self, f.name) != f.default
        ]
        return f"{self.name}{{{' '.join(changed)}}}" if changed else self.name


class IrPass(Pass):
    """Any plain ``onnx_ir`` pass, or a function model -> model (or None for in place), as a step."""

    preserves: ClassVar[Preserves] = "approximation"

    def __init__(self, step: Callable[[ir.Model], Any], name: str) -> None:
        self._step = step
        self.name = name  # type: ignore[misc]

    @property
    def spec(self) -> str:
        return self.name

    def run(self, model: ir.Model, ctx: Context) -> int:
        result = self._step(model)
        changed = getattr(result, "model", result)
        if changed is not None and changed is not model:
            model.graph = changed.graph
        return int(getattr(result, "modified", True))


# --------------------------------------------------------------------------- names and options

_ITEM = re.compile(r"\s*([^,{}\s]+)\s*(?:\{([^{}]*)\})?\s*(?:,|$)")


def split_passes(text: str) -> list[tuple[str, dict[str, str]]]:
    """``a,b{x=1 y=2}`` -> ``[("a", {}), ("b", {"x": "1", "y": "2"})]``."""
    found, position = [], 0
    while position < len(text):
        match = _ITEM.match(text, position)
        if match is None:
            raise UserError(f"cannot read --passes at '{text[position:]}'", hint="write name or name{option=value}, with commas between")
        found.append((match[1], _split_options(match[1], match[2] or "")))
        position = match.end()
    return found


def _split_options(name: str, text: str) -> dict[str, str]:
    options = {}
    for item in re.split(r"[\s,]+", text.strip()) if text.strip() else []:
        key, equals, value = item.partition("=")
        if not equals or not key or not value:
            raise UserError(f"cannot read option '{item}' of pass '{name}'", hint="write option=value")
        options[key] = value
    return options


def known_passes() -> dict[str, str]:
    """Built-in passes and those that installed packages register under ``qcompile.passes``."""
    found = dict(PASSES)
    for point in importlib.metadata.entry_points(group=ENTRY_POINTS):
        found.setdefault(point.name, point.value)
    return found


def make_pass(name: str, options: dict[str, str]) -> Pass:
    """The pass called ``name``: a registered one, or ``path.py:function`` (onnx_ir or graph-surgeon)."""
    if ".py:" in name:
        if options:
            raise UserError(f"'{name}' takes no options", hint="give options inside the function")
        return _load_user_pass(name)
    table = known_passes()
    if name not in table:
        raise unknown_name("pass", name, table)
    module, _, attribute = table[name].partition(":")
    cls = getattr(importlib.import_module(module), attribute)
    if not (isinstance(cls, type) and issubclass(cls, Pass)):
        return IrPass(cls() if isinstance(cls, type) else cls, name)
    return cls(**_typed(cls, options))


def _typed(cls: type, options: dict[str, str]) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    fields = {f.name: hints[f.name] for f in dataclasses.fields(cls)}
    typed = {}
    for key, text in options.items():
        if key not in fields:
            raise unknown_name(f"option of pass '{cls.name}'", key, fields)  # type: ignore[attr-defined]
        typed[key] = _convert(text, fields[key], f"{cls.name}{{{key}}}")  # type: ignore[attr-defined]
    return typed


def _convert(text: str, kind: Any, where: str) -> Any:
    origin = typing.get_origin(kind)
    if origin is typing.Literal:
        choices = typing.get_args(kind)
        for choice in choices:
            if str(choice) == text:
                return choice
        raise unknown_name(f"value of {where}", text, map(str, choices))
    if origin in (typing.Union, types.UnionType):
        if text == "none":
            return None
        kind = next(a for a in typing.get_args(kind) if a is not type(None))
    if kind is bool:
        if text.lower() in ("1", "true", "on", "yes"):
            return True
        if text.lower() in ("0", "false", "off", "no"):
            return False
        raise UserError(f"'{text}' is not a yes or no", where=where, hint="use 1 or 0")
    try:
        return kind(text)
    except ValueError as error:
        raise UserError(f"'{text}' is not a valid {kind.__name__}", where=where) from error


def _load_user_pass(name: str) -> Pass:
    path_text, _, function = name.rpartition(":")
    path = Path(path_text)
    if not path.is_file():
        raise UserError(f"no file '{path}' for pass '{name}'")
    spec = importlib.util.spec_from_file_location(f"qcompile_user_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    step = getattr(module, function, None)
    if step is None:
        raise unknown_name(f"function in {path}", function, [n for n in vars(module) if not n.startswith("_")])
    if isinstance(step, type) and issubclass(step, Pass):
        return step()
    if isinstance(step, type) and issubclass(step, ir.passes.PassBase):
        return IrPass(step(), f"{path.name}:{function}")
    if _wants_graph_surgeon(step):
        return IrPass(_through_graph_surgeon(step), f"{path.name}:{function}")
    return IrPass(step, f"{path.name}:{function}")


def _wants_graph_surgeon(step: Callable[..., Any]) -> bool:
    hints = [str(h) for h in getattr(step, "__annotations__", {}).values()]
    return any("onnx_graphsurgeon" in h or h.startswith("gs.") for h in hints)


def _through_graph_surgeon(step: Callable[[Any], Any]) -> Callable[[ir.Model], ir.Model]:
    """Adapt a function on ``onnx_graphsurgeon.Graph`` (edited in place or returned) to the IR."""

    def adapted(model: ir.Model) -> ir.Model:
        try:
            import onnx_graphsurgeon as gs
        except ImportError as error:
            raise UserError("onnx-graphsurgeon is not installed", hint="pip install 'qcompile-nn[graphsurgeon]'") from error
        graph = gs.import_onnx(ir.to_proto(model))
        result = step(graph)
        return ir.from_proto(gs.export_onnx(graph if result is None else result))

    return adapted
