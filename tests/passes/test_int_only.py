"""The pass ``int_only``: its options, what it counts, records and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import qcompile
from qcompile.errors import UserError
from qcompile.passes.int_only import IntOnly
from qcompile.proof.prepared import BOUNDS
from tests.integer.graphs import context, drawn, parsed

SAMPLES = [{"x": drawn(2, 3, 16)}]
ISLAND = "g (float[B, S, 16] x) => (float[B, S, 16] y) { a = Neg (x) b = Erf (a) y = Add (b, c) }"
ROW = {"c": np.linspace(-1, 1, 16)}


@pytest.mark.parametrize(("text", "more"), [(ISLAND, ""), (ISLAND.replace("Add (b, c)", "Erf (b)"), " and 1 more")])
def test_strict_makes_an_operator_without_an_integer_form_an_error(text: str, more: str) -> None:
    with context(SAMPLES) as ctx, pytest.raises(UserError) as error:
        IntOnly(strict=True).run(parsed(text, ROW), ctx)
    assert str(error.value).startswith(f"Erf of 'Erf:b'{more} would stay float: it has no integer form")
    assert error.value.hint == "leave out strict to keep it float"


def test_the_option_of_the_command_reaches_the_pass_and_says_nothing_without_it(tmp_path: Path) -> None:
    source = tmp_path / "model.onnx"
    ir.save(parsed(ISLAND, ROW), source)
    with pytest.raises(UserError, match="would stay float: it has no integer form"):
        qcompile.compile(source, passes="int_only", calibration=SAMPLES, strict=True)
    with pytest.raises(UserError, match="--strict says nothing without int_only"):
        qcompile.compile(source, strict=True)


def test_it_counts_floats_and_records_for_which_sizes_it_is_proven() -> None:
    with context(SAMPLES) as ctx:
        model = parsed(ISLAND, ROW)
        entry = ctx.ledger.open("int_only", "int_only", "approximation")
        assert IntOnly(positions=128).run(model, ctx) > 0
        assert entry.facts["float operators"] == len(entry.skips) == 1
        assert json.loads(model.metadata_props[BOUNDS]) == {"B": 1024, "S": 128}


def test_a_table_of_positions_bounds_the_sizes_before_it_becomes_integers() -> None:
    text = """g (int64[B, S] p, float[B, S] x) => (float[B, S] y)
        { t = Expand (table, whole) r = GatherElements <axis = 1> (t, p) y = Add (r, x) }"""
    table = {"table": np.linspace(-1, 1, 40)[None], "whole": np.array([2, 40])}
    with context([{"p": np.zeros((2, 3), np.int64), "x": drawn(2, 3)}]) as ctx:
        model = parsed(text, table)
        ctx.ledger.open("int_only", "int_only", "approximation")
        IntOnly().run(model, ctx)
        assert json.loads(model.metadata_props[BOUNDS]) == {"B": 1024, "S": 40}


@pytest.mark.parametrize("positions", (0, 2**15 + 1))
def test_more_positions_than_31_bits_add_up_are_refused(positions: int) -> None:
    with pytest.raises(UserError, match=r"must lie in 1\.\.32768"):
        IntOnly(positions=positions)


def test_a_cache_doubles_the_tokens_of_a_mask() -> None:
    text = """g (int64[B, S] ids, int64[B, T] mask, float[B, P, 16] past, float[B, S, 16] x)
        => (float[B, T, 16] present, float[B, S, 16] y) { present = Concat <axis = 1> (past, x) y = Neg (x) }"""
    samples = [{"ids": np.ones((2, 3), np.int64), "mask": np.ones((2, 3), np.int64), "past": drawn(2, 3, 16)[:, :0],
                "x": drawn(2, 3, 16)}]  # fmt: skip
    with context(samples) as ctx:
        model = parsed(text)
        ctx.ledger.open("int_only", "int_only", "approximation")
        with pytest.raises(UserError, match="positions=32768 is too long for a model with a cache"):
            IntOnly(positions=2**15).run(model, ctx)
        IntOnly(positions=128).run(model, ctx)
        assert json.loads(model.metadata_props[BOUNDS]) == {"B": 1024, "S": 128, "T": 256, "P": 128}
