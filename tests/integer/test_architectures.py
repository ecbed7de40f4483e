"""What of every architecture is in integers, and what stays float today."""

from __future__ import annotations

from collections import Counter

import pytest

from qcompile.models.architectures import ARCHITECTURES, cached_export
from tests.passes.planted import bench

# Relative positions are float functions of positions that are added to scores; a router picks experts by a float
# softmax, and the experts' matrices have three axes; a patch projection is a convolution.
FLOATS: dict[str, dict[str, int]] = {
    "mixtral": {"Softmax": 2, "TopK": 2, "ReduceSum": 4, "Div": 2, "MatMul": 4},
    "t5": {
        "Cast": 4, "Div": 4, "Log": 2, "Mul": 2, "Gather": 2, "Transpose": 2, "Unsqueeze": 2, "Where": 2,
        "Attention": 4,
    },
    "vit": {"Conv": 1},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ("w8a8_static", "w8a8"))
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_stays_float(name: str, recipe: str) -> None:
    with bench(cached_export(name), recipe=recipe) as made:
        made.run("quantise")
        entry = made.run("int_only")
    found = Counter(skip.reason.split(" stays float: ")[0] for skip in entry.skips)
    assert dict(found) == FLOATS.get(name, {}), entry.skips
    assert entry.facts["float operators"] == found.total()


@pytest.mark.parametrize("name", ("bert", "llama"))
def test_an_encoder_and_a_decoder_have_no_float_inside(name: str) -> None:
    with bench(cached_export(name)) as made:
        made.run("quantise")
        assert not made.run("int_only{strict=1}").skips
