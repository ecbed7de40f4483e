"""Recipes: built-in names, TOML files, and the error for each mistake in one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from qcompile import backends
from qcompile.errors import UserError
from qcompile.planning import expand
from qcompile.quant.schemes import ActivationScheme
from qcompile.recipe import RECIPES, Recipe, Rule, by_name, load


def write(folder: Path, text: str) -> str:
    path = folder / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", RECIPES)
def test_every_name_that_is_listed_parses(name: str) -> None:
    recipe = by_name(name)
    assert recipe.name == name
    if name == "float":
        assert not recipe.rules
        return
    if name == "auto":
        assert recipe.rules == by_name("w8a8_static").rules
        return
    linear = recipe.rule("linear", "any.layer")
    assert linear is not None and linear.weights is not None
    bits = re.match(r"w(\d)a(\d+)", name)
    assert bits is not None and linear.weights.bits == int(bits[1])
    assert (16 if linear.activations is None else linear.activations.bits) == int(bits[2])
    assert recipe.rule("embedding", "wte") is not None and recipe.rule("head", "lm_head") is not None
    assert recipe.rule("attention", "attn") is None


@pytest.mark.parametrize(
    ("wrong", "hint"), [("w8a8_statc", "w8a8_static"), ("w4a16g128", "w4a16_g128"), ("flot", "float")]
)
def test_a_misspelt_name_gets_the_nearest(wrong: str, hint: str) -> None:
    with pytest.raises(UserError, match=f"unknown recipe '{wrong}'") as caught:
        load(wrong)
    assert "did you mean" in caught.value.hint and hint in caught.value.hint


def test_a_group_that_is_too_small_is_no_recipe() -> None:
    with pytest.raises(UserError, match="unknown recipe 'w4a16_g4'"):
        load("w4a16_g4")


def test_a_file_adds_sentences_to_its_base_and_the_last_that_matches_speaks(tmp_path: Path) -> None:
    recipe = load(
        write(
            tmp_path,
            """
            base = "w8a8_static"
            [[rule]]
            scope = "*.down_proj"
            weights = { bits = 4, granularity = "group", group_size = 64 }
            activations = { bits = 8, granularity = "per_token" }
            [[rule]]
            scope = "*.0.down_proj"
            [[rule]]
            op = "attention"
            activations = { bits = 8 }
            """,
        )
    )
    assert recipe.name == "mine"
    plain, down, first = (
        recipe.rule("linear", name) for name in ("a.0.up_proj", "a.1.down_proj", "a.0.down_proj")
    )
    assert plain is not None and plain.weights is not None and plain.weights.bits == 8
    assert down is not None and down.weights is not None and down.weights.group_size == 64
    assert down.activations is not None and down.activations.dynamic
    assert first is not None and first.weights is None and first.activations is None
    attention = recipe.rule("attention", "a.0.attn")
    assert attention is not None and attention.activations is not None


def test_a_file_without_base_says_all_there_is(tmp_path: Path) -> None:
    recipe = load(write(tmp_path, '[[rule]]\nweights = {bits = 8}\nscope = "model.*"'))
    assert recipe.rule("linear", "model.0") is not None
    assert recipe.rule("linear", "other.0") is None and recipe.rule("embedding", "model.wte") is None


def test_the_second_linear_of_a_module_is_found_by_the_modules_name() -> None:
    rule = Rule(scope="encoder.attn")
    assert rule.matches("linear", "encoder.attn") and rule.matches("linear", "encoder.attn#2")
    assert not Rule(scope="encoder.attn#2").matches("linear", "encoder.attn")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rule = [", "is not valid TOML"),
        ('bace = "w8a8"', "unknown key of recipe"),
        ('base = "w8a8_statc"', "unknown recipe"),
        ("base = 8", "unknown recipe '8'"),
        ("rule = 3", "'rule' is no list of tables"),
        ("rule = [3]", "rule 1: Input should be a valid dictionary"),
        ("[[rule]]\nscop = 'x'", "rule 1: unknown key 'scop'\n  hint: did you mean scope"),
        ("[[rule]]\nweights = {bits = 8, clp = 1}", "rule 1: unknown key 'clp'\n  hint: did you mean clip"),
        (
            "[[rule]]\n[[rule]]\nweights = {bits = 9}",
            "rule 2: weights.bits: Input should be less than or equal to 8",
        ),
        ("[[rule]]\nop = 'liner'", "rule 1: op: Input should be 'linear'"),
        ("[[rule]]\nop = 'embedding'\nactivations = {bits = 8}", "rule 1: an embedding takes token ids"),
        ("[[rule]]\nop = 'attention'\nweights = {bits = 8}", "attention has no weights"),
        (
            "[[rule]]\nop = 'attention'\nactivations = {bits = 8, granularity = 'per_token'}",
            "attention takes static activations",
        ),
    ],
)
def test_a_mistake_in_a_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load(write(tmp_path, text))
    assert message in str(caught.value)


def test_a_missing_file_is_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no recipe file"):
        load(str(tmp_path / "none.toml"))


def test_recipes_do_not_change(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        by_name("w8a8").name = "other"
    assert by_name("w8a8") == by_name("w8a8") and isinstance(by_name("float"), Recipe)


@pytest.mark.parametrize(
    ("name", "plain", "bits"), [("w8a8kv8_static", "w8a8_static", 8), ("w4a16kv4_g32", "w4a16_g32", 4)]
)
def test_a_cache_is_one_rule_more(name: str, plain: str, bits: int) -> None:
    *rules, cache = by_name(name).rules
    assert tuple(rules) == by_name(plain).rules
    assert cache == Rule(op="cache", activations=ActivationScheme(bits=bits, granularity="per_token"))


@pytest.mark.parametrize("name", ["w8a8kv6", "w8a8kv", "kv8"])
def test_a_cache_has_8_or_4_bits(name: str) -> None:
    with pytest.raises(UserError, match="recipe"):
        by_name(name)
    with pytest.raises(ValueError, match="8 or 4 bits"):
        Rule(op="cache", activations=ActivationScheme(bits=6, granularity="per_token"))
    with pytest.raises(ValueError, match="8 or 4 bits"):
        Rule(op="cache", activations=ActivationScheme(bits=8))


def test_a_cache_alone_asks_for_no_transform_of_activations() -> None:
    names = [[p.name for p in expand(None, by_name(n), backends.by_name("cpu"))] for n in ("w4a16kv8_g32", "w4a16_g32")]
    assert names[0] == names[1] and "os_plus" not in names[0]
