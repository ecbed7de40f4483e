"""Recipes: sentences "quantise op X under scope Z with scheme N", by name or from a TOML file."""

from __future__ import annotations

import fnmatch
import re
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from qcompile.errors import UserError, unknown_name
from qcompile.quant.schemes import ActivationScheme, WeightScheme, parse_name

Op = Literal["linear", "head", "embedding", "attention", "cache"]

RECIPES: dict[str, str] = {
    "auto": "w8a8_static, with more precision where --max-drop (here 0.01 by default) needs it",
    "float": "no quantisation: canonical form and float fusions only",
    "w8a8_static": "8-bit weights per channel, 8-bit activations per tensor, static",
    "w8a8": "8-bit weights per channel, 8-bit activations per token, dynamic",
    "w6a6_static": "6 bit, static per tensor",
    "w6a6": "6 bit, dynamic per token",
    "w4a8_static": "4-bit weights, 8-bit static activations",
    "w4a8": "4-bit weights, 8-bit activations per token",
    "w4a4_static": "4 bit, static per tensor",
    "w4a4": "4 bit, dynamic per token",
    "w8a16": "8-bit weights only",
    "w4a16": "4-bit weights only, per channel",
    "w4a16_g128": "4-bit weights only, groups of 128",
    "w4a16_g64": "4-bit weights only, groups of 64",
    "w4a16_g32": "4-bit weights only, groups of 32",
    "w4a16kv8_g32": "4-bit weights in groups of 32, and an 8-bit key/value cache",
    "w8a8kv4": "8 bit, dynamic per token, and a 4-bit key/value cache",
    "w3a16_g128": "3-bit weights only, groups of 128",
    "w2a16_g64": "2-bit weights only, groups of 64",
}


CACHE_BITS = (8, 4)


class Rule(BaseModel):
    """One sentence. A later rule overrides an earlier one where both match.

    ``op``: which kind of operator; ``scope``: a glob on the user's names; ``weights`` and
    ``activations``: the schemes, or none to keep float.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    op: Op = Field(default="linear", description="the kind of operator")
    scope: str = Field(default="*", description="which of them: a glob on the names in your model")
    weights: WeightScheme | None = None
    activations: ActivationScheme | None = None

    @model_validator(mode="after")
    def _fits(self) -> Rule:
        if self.op == "embedding" and self.activations is not None:
            raise ValueError("an embedding takes token ids, it has no activations to quantise")
        if self.op == "attention" and self.weights is not None:
            raise ValueError("attention has no weights of its own")
        acts = self.activations
        if self.op == "cache" and (self.weights is not None or (acts is not None and not _fits_cache(acts))):
            raise ValueError("a cache takes asymmetric activations of 8 or 4 bits with granularity 'per_token'")
        if self.op == "attention" and acts is not None and not acts.plain:
            raise ValueError("attention takes static activations with granularity 'per_tensor'")
        return self

    def matches(self, op: Op, name: str) -> bool:
        """Whether the sentence speaks of ``op`` at ``name`` (``module#2``: the module's second linear)."""
        module = name.partition("#")[0]
        return self.op == op and any(fnmatch.fnmatchcase(n, self.scope) for n in (name, module))


def _fits_cache(scheme: ActivationScheme) -> bool:
    plain = scheme.dynamic and not scheme.symmetric and scheme.outlier_threshold is None
    return plain and scheme.bits in CACHE_BITS


class _Linear(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def is_head(self) -> bool: ...


class Recipe(BaseModel):
    """An ordered list of rules."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    rules: tuple[Rule, ...] = Field(default=())

    def for_linear(self, linear: _Linear) -> Rule | None:
        """The last rule that speaks of ``linear``; None keeps it float."""
        return self.rule("head" if linear.is_head else "linear", linear.name)

    def rule(self, op: Op, name: str) -> Rule | None:
        """The last rule that speaks of ``op`` at ``name``; None keeps it float."""
        return next((r for r in reversed(self.rules) if r.matches(op, name)), None)


EMBEDDING = WeightScheme(bits=8, granularity="per_channel")
PER_TOKEN_8 = ActivationScheme(bits=8, granularity="per_token")


def by_name(name: str) -> Recipe:
    """A built-in recipe. Linears follow the name; embedding and head have 8 bits per row of the table."""
    if name == "float":
        return Recipe(name=name)
    plain, cache = _without_cache("w8a8_static" if name == "auto" else name)
    schemes = parse_name(plain)
    if schemes is None:
        raise unknown_name("recipe", name, RECIPES)
    weights, activations = schemes
    head = None if activations is None else PER_TOKEN_8
    return Recipe(
        name=name,
        rules=(
            Rule(op="linear", weights=weights, activations=activations),
            Rule(op="embedding", weights=EMBEDDING),
            Rule(op="head", weights=EMBEDDING, activations=head),
            *cache,
        ),
    )


def _without_cache(name: str) -> tuple[str, list[Rule]]:
    """``w8a8kv8_static`` -> ``w8a8_static`` and the rule for the cache."""
    match = re.match(r"^(w\da\d+)kv(\d)(.*)$", name)
    if match is None or int(match[2]) not in CACHE_BITS:
        return name, []
    scheme = ActivationScheme(bits=int(match[2]), granularity="per_token")
    return match[1] + match[3], [Rule(op="cache", activations=scheme)]


def load(text: str) -> Recipe:
    """A recipe by name or from a ``.toml`` file with ``[[rule]]`` tables."""
    if not text.endswith(".toml"):
        return by_name(text)
    path = Path(text)
    if not path.is_file():
        raise UserError(f"no recipe file '{path}'", hint="`qcompile recipes` lists those that have a name")
    try:
        raw: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"recipe file '{path}' is not valid TOML", hint=str(error)) from error
    return _from_table(path, raw)


def _from_table(path: Path, raw: dict[str, Any]) -> Recipe:
    base = by_name(str(raw.pop("base"))) if "base" in raw else Recipe(name=path.stem)
    rules = raw.pop("rule", [])
    if raw:
        raise unknown_name(f"key of recipe '{path}'", next(iter(raw)), ["base", "rule"])
    if not isinstance(rules, list):
        raise UserError(f"recipe '{path}': 'rule' is no list of tables", hint="write [[rule]]")
    added = tuple(_rule(path, number, rule) for number, rule in enumerate(rules, 1))
    return Recipe(name=path.stem, rules=base.rules + added)


def _rule(path: Path, number: int, raw: Any) -> Rule:
    try:
        return Rule.model_validate(raw)
    except ValidationError as error:
        first, where = error.errors()[0], f"recipe '{path}', rule {number}"
        *tables, key = map(str, first["loc"] or ("",))
        if first["type"] == "extra_forbidden":
            unknown = unknown_name("key", key, _keys(tables))
            raise UserError(f"{where}: {unknown.message}", hint=unknown.hint) from error
        message = first["msg"].removeprefix("Value error, ")
        what = f"{'.'.join([*tables, key])}: {message}" if key else message
        raise UserError(f"{where}: {what}", hint="`qcompile recipes` lists the keys and their values") from error


def _keys(tables: list[str]) -> Iterable[str]:
    """The keys of a rule, or of the table in it."""
    inner: dict[str, type[BaseModel]] = {"weights": WeightScheme, "activations": ActivationScheme}
    return (inner[tables[0]] if tables else Rule).model_fields
