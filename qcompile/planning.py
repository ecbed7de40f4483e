"""The plan of a compilation, made before any work: the passes in order, and whether the target runs the recipe."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir

from qcompile.backends import legality
from qcompile.backends.base import Backend, Lower
from qcompile.errors import UserError
from qcompile.pipeline import IrPass, Pass, check_order, make_pass, split_passes
from qcompile.recipe import Recipe

Step = str | Pass | Callable[[ir.Model], Any]
DEFAULT_TRANSFORMS = ("os_plus",)
NO_START = ("canonicalise", "rotate")  # they change the function as little as a transform, but scale no channel


def check_legal(recipe: Recipe, backend: Backend) -> None:
    """Refuse what the target would not run in low bits, before any work."""
    found = legality.complaint(recipe, backend.target.name)
    if found is not None:
        what, instead = found
        where = f"recipe '{recipe.name}'"
        raise UserError(f"target {backend.target.name} cannot run {what} in low bits", where=where, hint=instead)


def expand(
    passes: str | Sequence[Step] | None, recipe: Recipe, backend: Backend, strict: bool = False
) -> list[Pass]:
    """The whole pipeline: ``canonicalise``, the transforms, ``quantise`` if anything is, the lowering.

    strict: make int_only so

    Raises UserError where a pass stands where it cannot work.
    """
    steps = _with_starts(_steps(passes, recipe), recipe)
    names = [p.name for p in steps]
    if "canonicalise" not in names:
        steps.insert(0, make_pass("canonicalise", {}))
    if "quantise" not in names and recipe.rules:
        last = next((place for place, one in enumerate(steps) if "quantised" in one.reads[:1]), len(steps))
        steps.insert(last, make_pass("quantise", {}))
    check_order(steps)
    if any(one.name == "int_only" for one in steps) and not legality.takes_integers(backend.target.name):
        what = f"target {backend.target.name} cannot run int_only, which multiplies 64-bit integers"
        raise UserError(what, hint="leave int_only out, or take --target opencl, metal or cpu")
    return [*(_strict(steps) if strict else steps), Lower(backend)]


def _strict(pipeline: Sequence[Pass]) -> list[Pass]:
    """``pipeline`` with its int_only strict; UserError where there is none."""
    if all(one.name != "int_only" for one in pipeline):
        raise UserError("--strict says nothing without int_only", hint="add int_only to --passes, or leave it out")
    return [dataclasses.replace(one, strict=True) if one.name == "int_only" else one for one in pipeline]  # type: ignore[type-var]


def _with_starts(steps: Sequence[Pass], recipe: Recipe) -> list[Pass]:
    """``steps``, with the search that a learned transform starts from where no transform stands before it."""
    found: list[Pass] = []
    for one in steps:
        start = one.starts_from(recipe)
        if start is not None and not any(p.preserves == "function" and p.name not in NO_START for p in found):
            found.append(make_pass(start, {}))
        found.append(one)
    return found


def _steps(passes: str | Sequence[Step] | None, recipe: Recipe) -> list[Pass]:
    if passes is None:
        acts = any(r.activations is not None for r in recipe.rules if r.op != "cache")
        passes = DEFAULT_TRANSFORMS if acts else ()
    if isinstance(passes, str):
        passes = [passes]
    found: list[Pass] = []
    for item in passes:
        if isinstance(item, str):
            found.extend(make_pass(name, options) for name, options in split_passes(item))
        elif isinstance(item, Pass):
            found.append(item)
        else:
            found.append(IrPass(item, getattr(item, "__name__", type(item).__name__)))
    return found
