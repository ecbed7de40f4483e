"""``passes``, ``targets`` and ``recipes``: what there is to choose from. Imports no runtime."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import types
import typing
from collections.abc import Iterator
from typing import Any

import click

from qcompile.commands.text import columns, indented, show

_MEANING = re.compile(r"^(\w+): (.+)$", re.MULTILINE)
_KINDS = {bool: "true, false", int: "whole number", float: "number", str: "text", types.NoneType: "none"}


@dataclasses.dataclass(frozen=True)
class Option:
    """One option: its name with the default as the command line writes them, the values it takes, what it is for."""

    spelled: str
    values: str
    meaning: str


@click.command("passes", short_help="list the passes and their options")
def passes() -> None:
    """List the passes that --passes knows, those of installed packages included, and what each option is for.

    Write --passes name{option=value option=value},other. A pass that is only a file, PATH.py:FUNCTION, takes none.
    """
    from qcompile.pipeline import known_passes

    for name, address in known_passes().items():
        title, options = _described(address)
        click.echo(f"{name}  {title}")
        indented([(o.spelled, o.values, o.meaning) for o in options])


@click.command("targets", short_help="list the targets")
def targets() -> None:
    """List the targets that --target knows, what each runs in low bits, and whether this machine can run it.

    Where a recipe asks for something else, compile names the nearest scheme that the target runs.
    """
    from qcompile.backends import TARGETS, by_name, legality, missing

    rows = [(name, by_name(name).target.description, missing(name) or "yes") for name in TARGETS]
    click.echo(columns(rows, ("target", "what it makes", "runs here")))
    alike: dict[tuple[Any, bool], list[str]] = {}
    for name in TARGETS:
        alike.setdefault((tuple(legality.listed(name)), name in legality.INTEGER_ONLY), []).append(name)
    for (rows, integer_only), names in alike.items():
        show(f"in low bits on {', '.join(names)}", rows, ("operator", "weights", "activations", "kernel"))
        if integer_only:
            click.echo("  and integer-only programs, with the same bits on every target that has them")
    for name, place in TARGETS.items():
        show(f"options of {name}, in braces", [(o.spelled, o.values, o.meaning) for o in _described(place)[1]])


@click.command("recipes", short_help="list the recipes, and what a .toml file may say")
def recipes() -> None:
    """List the recipes that --recipe knows by name, and the keys of a .toml file, the other way to give one."""
    from qcompile.quant.schemes import OBSERVERS
    from qcompile.recipe import RECIPES

    click.echo(columns(list(RECIPES.items())))
    click.echo("any wXaY, wXaY_static or wXa16_gN with 2 to 8 bits, also with kv8 or kv4 behind wXaY")
    click.echo('\nA .toml file has base = "NAME" and [[rule]] tables; the last rule that matches a place decides.')
    indented([(o.spelled, o.values, o.meaning) for o in rule_keys()])
    click.echo("\nObservers find static ranges.")
    indented(list(OBSERVERS.items()))


def pass_options(cls: Any) -> list[Option]:
    """The options of a pass: its fields, with the lines ``name: meaning`` of the docstrings of its class and bases."""
    if not dataclasses.is_dataclass(cls):
        return []
    hints, told = typing.get_type_hints(cls), [inspect.cleandoc(one.__doc__ or "") for one in _classes(cls)]
    meanings = dict(_MEANING.findall("\n\n".join(told)))
    return [
        Option(f"{f.name}={_spelled(f.default)}", _values(hints[f.name]), meanings.get(f.name, ""))
        for f in dataclasses.fields(cls)
    ]


def _classes(cls: Any) -> list[type]:
    """``cls`` behind the classes that it is made of."""
    return list(reversed(inspect.getmro(cls)))


def rule_keys() -> list[Option]:
    """The keys of a ``[[rule]]`` table, those of its inner tables with a dot."""
    from qcompile.quant.schemes import ActivationScheme, WeightScheme
    from qcompile.recipe import Rule

    inner = {"weights": WeightScheme, "activations": ActivationScheme}
    return [*_keys(Rule, "", inner), *(key for name, model in inner.items() for key in _keys(model, f"{name}.", {}))]


def _keys(model: Any, prefix: str, left_out: dict[str, Any]) -> Iterator[Option]:
    for name, field in model.model_fields.items():
        if name not in left_out:
            is_open = field.is_required() or field.default is None  # TOML has no null: such a key is left out
            default = "" if is_open else f" = {_spelled(field.default, quoted=True)}"
            values = _values(field.annotation).removesuffix(", none")
            yield Option(f"{prefix}{name}{default}", values, field.description or "")


def _described(address: str) -> tuple[str, list[Option]]:
    """The first line of a pass's file, and its options; a package that does not load is said to be so."""
    module_name, _, attribute = address.partition(":")
    try:
        module = importlib.import_module(module_name)
        found = getattr(module, attribute)
    except Exception as error:  # whatever an installed package raises
        return f"(cannot be loaded: {type(error).__name__}: {error})", []
    return (module.__doc__ or "").partition("\n")[0].rstrip("."), pass_options(found)


def _spelled(value: Any, quoted: bool = False) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if quoted and isinstance(value, str) else str(value)


def _values(kind: Any) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return ", ".join(map(str, typing.get_args(kind)))
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return ", ".join(map(_values, typing.get_args(kind)))
    return _KINDS.get(kind, str(kind))
