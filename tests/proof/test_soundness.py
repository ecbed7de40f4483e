"""Whatever ONNX Runtime computes lies in the interval that was proven, on random programs; a wrong rule is caught."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import find as find_example

from qcompile.proof import intervals
from qcompile.proof.spans import Span
from qcompile.proof.step import Rule, Step
from tests.proof.graphs import graphs, violations

CHECKS = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much)


@settings(max_examples=120, deadline=None, suppress_health_check=CHECKS)
@given(graphs())
def test_observed_values_lie_in_their_intervals(program: tuple[onnx.ModelProto, int]) -> None:
    assert violations(*program) == []


def short(rule: Rule) -> Rule:
    """``rule`` with every upper end one too low."""

    def wrong(step: Step) -> list[Span]:
        return [dataclasses.replace(one, hi=np.where(one.hi > one.lo, one.hi - 1, one.hi)) for one in rule(step)]

    return wrong


@pytest.mark.parametrize("name", ["Sub", "Mod", "BitShift", "ReduceSum", "MatMulInteger", "Concat", "Max"])
def test_an_interval_that_is_too_small_by_one_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(intervals.RULES, name, short(intervals.RULES[name]))
    once = settings(
        max_examples=150,
        deadline=None,
        suppress_health_check=CHECKS,
        phases=[Phase.generate],
        derandomize=True,
        database=None,
    )
    assert find_example(graphs(), lambda program: bool(violations(*program)), settings=once)
