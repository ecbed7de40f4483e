"""Passes: what they are, how they are named and parsed, and the runner that holds them to their contract."""

from __future__ import annotations

import abc
import dataclasses
import importlib
import importlib.metadata
import importlib.util
import math
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

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
    "awq": "qcompile.passes.awq:Awq",
    "rtn": "qcompile.passes.rtn:Rtn",
    "gptq": "qcompile.passes.gptq:Gptq",
    "rotate": "qcompile.passes.rotate:Rotate",
    "token_clip": "qcompile.passes.token_clip:TokenClip",
    "lwc": "qcompile.passes.lwc:Lwc",
    "let": "qcompile.passes.let:Let",
    "omniquant": "qcompile.passes.omniquant:OmniQuant",
    "fsbr": "qcompile.passes.fsbr:Fsbr",
    "quantise": "qcompile.passes.quantise:Quantise",
    "int_only": "qcompile.passes.int_only:IntOnly",
}
ENTRY_POINTS = "qcompile.passes"

# The form of the model between two passes, in the order in which a pipeline reaches them.
Form = Literal["captured", "canonical", "quantised", "integer"]
FORMS: tuple[Form, ...] = typing.get_args(Form)

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

    def opened(
        self, model: ir.Model, fetch: Sequence[str]
    ) -> AbstractContextManager[Callable[[Arrays], Arrays]]: ...


@dataclasses.dataclass(frozen=True)
class Target:
    """What a pass may know of a backend: data only. ``kernels``: the low-bit operators that it can reach."""

    name: str
    backend: str
    description: str
    kernels: tuple[str, ...] = ()


@dataclasses.dataclass
class Context:
    """What the runner gives to a pass.

    resume: the folder where a pass keeps what is done, to go on behind it
    exact: the model before the first pass that approximates; None until then
    """

    workspace: Workspace
    ledger: Ledger
    recipe: Recipe
    target: Target
    samples: Samples
    runner: Runner
    max_drop: float | None = None
    seed: int = 0
    resume: Path | None = None
    exact: ir.Model | None = None


class Pass(ir.passes.InPlacePass, abc.ABC):
    """A pass is a frozen dataclass; its fields are its options.

    ``preserves`` is the claim that the runner checks: ``function`` (equal outputs up to ``tolerance``,
    relative), ``approximation`` (the difference is measured and recorded) or ``analysis`` (the graph
    is not touched). ``reads``: the forms of the model that the pass works on; ``makes``: the form that it
    leaves, None where it leaves the one that it found.
    """

    name: ClassVar[str]
    preserves: ClassVar[Preserves]
    tolerance: ClassVar[float] = 1e-5
    reads: ClassVar[tuple[Form, ...]] = FORMS
    makes: ClassVar[Form | None] = None

    @abc.abstractmethod
    def run(self, model: ir.Model, ctx: Context) -> int:
        """Rewrite ``model`` in place and return the number of rewrites."""

    def starts_from(self, recipe: Recipe) -> str | None:
        """The pass that should stand before this one where no other transform does."""
        return None

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        raise UserError(f"pass '{self.name}' needs a context", hint="run it through qcompile.compile(...)")

    @property
    def spec(self) -> str:
        """The pass as the command line writes it: ``name{option=value}`` with the non-default options."""
        changed = [
            f"{f.name}={'none' if (value := getattr(self, f.name)) is None else value}"
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
            model.functions.clear()
            model.functions.update(changed.functions)
        unmade = _unmade(model.graph)
        if unmade:
            what = f"pass '{self.name}' removed what makes '{unmade[0]}', which is still read or an output"
            raise UserError(what, hint="replace every use of a value, outputs included, before removing its node")
        return int(getattr(result, "modified", True))


def _unmade(graph: ir.Graph) -> list[str]:
    """The names of values that the graph reads or gives out, and nothing in it makes."""
    made = {id(v) for v in (*graph.inputs, *graph.initializers.values())}
    made |= {id(v) for node in graph for v in node.outputs}
    wanted = [v for node in graph for v in node.inputs if v is not None and v.name]
    return [str(v.name) for v in (*graph.outputs, *wanted) if id(v) not in made]


def check_range(one: Pass, low: float, high: float, *options: str, hint: str = "") -> None:
    """UserError for the first of the ``options`` outside ``low`` .. ``high``. NaN is outside; None is no number."""
    for option in options:
        value = getattr(one, option)
        if value is None or low <= value <= high:
            continue
        bound = f"lie in {low:g}..{high:g}" if math.isfinite(high) else f"be {low:g} or more"
        raise UserError(f"{option} is {value:g}, but must {bound}", where=f"{one.name}{{{option}}}", hint=hint)


def check_order(steps: Sequence[Pass]) -> None:
    """UserError for the first pass that does not read the form that the passes before it have made."""
    form: Form = "captured"
    maker = ""
    for number, one in enumerate(steps):
        if form not in one.reads:
            raise _misplaced(one, form, maker, steps[number + 1 :])
        if one.makes is not None:
            form, maker = one.makes, one.name


def _misplaced(one: Pass, form: Form, maker: str, later: Sequence[Pass]) -> UserError:
    """``one`` meets the model in ``form``, which ``maker`` has made, and does not read that."""
    if FORMS.index(form) >= FORMS.index("quantised"):
        what = f"pass '{one.name}' needs the float model, but '{maker}' stands before it"
        again = one.name == maker
        return UserError(what, hint=f"name {maker} once" if again else f"write --passes {one.spec},{maker}")
    wanted = next((p.name for p in later if p.makes in one.reads), "canonicalise")
    if "canonical" not in one.reads:
        what = f"pass '{one.name}' needs a quantised model, but nothing before it quantises"
        return UserError(what, hint="name a recipe with low bits, such as --recipe w8a8_static")
    what = f"pass '{one.name}' needs the canonical form, but '{wanted}' does not stand before it"
    return UserError(what, hint=f"write --passes {wanted},{one.spec}")


# --------------------------------------------------------------------------- names and options

_ITEM = re.compile(r"\s*([^,{}\s]+)\s*(?:\{([^{}]*)\})?\s*(?:,|$)")


def split_passes(text: str) -> list[tuple[str, dict[str, str]]]:
    """``a,b{x=1 y=2}`` -> ``[("a", {}), ("b", {"x": "1", "y": "2"})]``."""
    found, position = [], 0
    while position < len(text):
        match = _ITEM.match(text, position)
        if match is None:
            raise UserError(
                f"cannot read --passes at '{text[position:]}'",
                hint="write name or name{option=value}, with commas between",
            )
        found.append((match[1], _split_options(match[1], match[2] or "")))
        position = match.end()
    return found


def _split_options(name: str, text: str) -> dict[str, str]:
    options = {}
    for item in re.split(r"[\s,]+", text.strip()) if text.strip() else []:
        key, equals, value = item.partition("=")
        if not equals or not key or not value:
            raise UserError(f"cannot read option '{item}' of pass '{name}'", hint="write option=value")
        if key in options:
            raise UserError(f"option '{key}' of pass '{name}' is given twice", hint="keep one of them")
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
            hint = "set them in the file, or register the pass as an entry point 'qcompile.passes', which takes options"
            raise UserError(f"'{name}' takes no options, since it is named by its file", hint=hint)
        return _load_user_pass(name)
    table = known_passes()
    if name not in table:
        raise unknown_name("pass", name, table)
    step = _registered(name, table[name])
    if isinstance(step, type) and issubclass(step, Pass):
        return step(**typed_options(step, options))
    if options:
        raise UserError(f"pass '{name}' takes no options", hint="it is a plain onnx_ir pass or function")
    return _as_pass(step, name)


def _registered(name: str, place: str) -> Any:
    module, _, attribute = place.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        if name in PASSES:
            raise
        hint = "the package that registers it is broken, or only partly installed"
        raise UserError(f"pass '{name}' cannot be loaded from '{place}': {error}", hint=hint) from error


def typed_options(cls: type, options: dict[str, str]) -> dict[str, Any]:
    """``options`` as values of the fields of dataclass ``cls``, whose ``name`` errors speak of."""
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
        return _convert(text, next(a for a in typing.get_args(kind) if a is not type(None)), where)
    if kind is bool:
        if text.lower() in ("1", "true", "on", "yes"):
            return True
        if text.lower() in ("0", "false", "off", "no"):
            return False
        raise UserError(f"'{text}' is not a yes or no", where=where, hint="use 1 or 0")
    try:
        return kind(text)
    except ValueError as error:
        hint = "give a whole number" if kind is int else "give a number"
        raise UserError(f"'{text}' is not a valid {kind.__name__}", where=where, hint=hint) from error


def _load_user_pass(name: str) -> Pass:
    path_text, _, function = name.rpartition(":")
    path = Path(path_text)
    if not path.is_file():
        raise UserError(f"no file '{path}' for pass '{name}'", hint="write PATH.py:FUNCTION")
    module = _imported(path)
    if not hasattr(module, function):
        known = [n for n in vars(module) if not n.startswith("_")]
        raise unknown_name(f"function in {path}", function, known)
    step = getattr(module, function)
    if isinstance(step, type) and issubclass(step, Pass):
        return step()
    return _as_pass(step, f"{path.name}:{function}")


def _imported(path: Path) -> types.ModuleType:
    """The user's file as a module."""
    spec = importlib.util.spec_from_file_location(f"qcompile_user_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and typing look a class's module up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's file raises
        what = f"'{path}' cannot be imported: {type(error).__name__}: {error}"
        raise UserError(what, hint="--debug shows the traceback") from error
    return module


def _as_pass(step: Any, name: str) -> Pass:
    """A plain onnx_ir pass (or its class), a function on the IR, or one on a graph-surgeon graph."""
    if isinstance(step, type) and issubclass(step, ir.passes.PassBase):
        step = step()
    if not callable(step) or isinstance(step, type):
        raise UserError(f"'{name}' is no pass", hint="give an onnx_ir pass, or a function on ir.Model")
    return IrPass(_through_graph_surgeon(step) if _wants_graph_surgeon(step) else step, name)


def _wants_graph_surgeon(step: Callable[..., Any]) -> bool:
    hints = [str(h) for h in getattr(step, "__annotations__", {}).values()]
    return any("onnx_graphsurgeon" in h or h.startswith("gs.") for h in hints)


def _through_graph_surgeon(step: Callable[[Any], Any]) -> Callable[[ir.Model], ir.Model]:
    """Adapt a function on ``onnx_graphsurgeon.Graph`` (edited in place or returned) to the IR.

    The model is held in memory as a whole while it runs. Metadata, which graph-surgeon drops, is put back.
    """

    def adapted(model: ir.Model) -> ir.Model:
        try:
            import onnx_graphsurgeon as gs
        except ImportError as error:
            hint = "pip install 'qcompile-nn[graphsurgeon]'"
            raise UserError("onnx-graphsurgeon is not installed", hint=hint) from error
        whole = model.clone()
        ir.external_data.load_to_model(whole)
        graph = gs.import_onnx(ir.to_proto(whole))
        result = step(graph)
        changed: ir.Model = ir.from_proto(gs.export_onnx(graph if result is None else result))
        _put_back_metadata(model, changed)
        return changed

    return adapted


def _put_back_metadata(before: ir.Model, after: ir.Model) -> None:
    """Give the nodes and values of ``after`` the metadata of their namesakes: the user's names live there."""
    nodes = {node.outputs[0].name: node for node in before.graph}
    for node in after.graph:
        known = nodes.get(node.outputs[0].name)
        if known is not None and known.op_type == node.op_type:
            node.metadata_props.update(known.metadata_props)
            for value, old in zip(node.outputs, known.outputs, strict=False):
                value.metadata_props.update(old.metadata_props)
    for name, value in after.graph.initializers.items():
        if name in before.graph.initializers:
            value.metadata_props.update(before.graph.initializers[name].metadata_props)
