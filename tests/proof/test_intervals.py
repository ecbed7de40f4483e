"""What may overflow, divide by zero, shift away or read outside is found; what cannot is proven, tightly."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from qcompile.proof.intervals import find_intervals
from qcompile.proof.prepared import prepared
from tests.proof.programs import ends, intervals, kinds, parsed

X = "g (int32[B, T, 8] x) => (int32[B, T, 8] y)"
SMALL = (
    "<int32 top = {1000}, int32 low = {-1000}, int32 one = {1}, int32 two = {2}, int32 zero = {0}, "
    "int64[1] last = {-1}>"
)
CLIP = "s = Min (x, top) v = Max (s, low)"


def small(body: str) -> str:
    """A program on v, which lies in -1000..1000."""
    return f"{X} {SMALL} {{ {CLIP} {body} }}"


# name: (what fails, the kind of the finding, words of it, a counterpart that holds)
PLANTED = {
    "sum": (f"{X} {{ y = Add (x, x) }}", "overflow", "int32 holds -2^31..2^31-1", small("y = Add (v, v)")),
    "difference": (f"{X} {{ y = Sub (x, x) }}", "overflow", "may reach", small("y = Sub (v, v)")),
    "product": (f"{X} {{ y = Mul (x, x) }}", "overflow", "0..2^62", small("y = Mul (v, v)")),
    "negation": (f"{X} {{ y = Neg (x) }}", "overflow", "2^31", small("y = Neg (v)")),
    "size": (f"{X} {{ y = Abs (x) }}", "overflow", "0..2^31", small("y = Abs (v)")),
    "power": (
        f"{X} <int32 two = {{2}}> {{ y = Pow (x, two) }}",
        "overflow",
        "0..2^62",
        small("y = Pow (v, two)"),
    ),
    "divisor": (
        small("y = Div (v, v)"),
        "divisor",
        "the divisor may be 0: it is -1000..1000",
        small("d = Max (v, one) y = Div (v, d)"),
    ),
    "modulus": (small("y = Mod (v, v)"), "divisor", "may be 0", small("d = Min (v, low) y = Mod (v, d)")),
    "least_by_minus_one": (
        f"{X} <int32 minus = {{-1}}> {{ y = Div (x, minus) }}",
        "overflow",
        "2^31",
        f"{X} <int32 minus = {{-1}}, int32 edge = {{-2147483647}}> {{ v = Max (x, edge) y = Div (v, minus) }}",
    ),
    "narrowing": (
        small("n = Cast <to = 3> (v) y = Cast <to = 6> (n)"),
        "narrowing",
        "may reach -1000..1000, int8 holds -128..127",
        small("n = Cast <to = 5> (v) y = Cast <to = 6> (n)"),
    ),
    "sign_lost": (
        small("n = Cast <to = 12> (v) y = Cast <to = 6> (n)"),
        "narrowing",
        "uint32 holds",
        small("p = Max (v, zero) n = Cast <to = 12> (p) y = Cast <to = 6> (n)"),
    ),
    "unsigned_difference": (
        "g (uint8[4] x, uint8[4] z) => (uint8[4] y) { y = Sub (x, z) }",
        "overflow",
        "-255..255, uint8 holds 0..255",
        "g (uint8[4] x) => (uint8[4] y) <uint8 top = {255}> { y = Sub (top, x) }",
    ),
    "shift_by_the_width": (
        "g (uint32[4] x) => (uint32[4] y) <uint32 n = {32}> { y = BitShift <direction = \"RIGHT\"> (x, n) }",
        "shift",
        "the shift may be 32..32, of 32 bits",
        "g (uint32[4] x) => (uint32[4] y) <uint32 n = {31}> { y = BitShift <direction = \"RIGHT\"> (x, n) }",
    ),
    "shift_of_bits_away": (
        "g (uint32[4] x) => (uint32[4] y) <uint32 n = {1}> { y = BitShift <direction = \"LEFT\"> (x, n) }",
        "overflow",
        "uint32 holds",
        "g (uint32[4] x) => (uint32[4] y) <uint32 n = {1}, uint32 t = {2147483647}> "
        "{ v = Min (x, t) y = BitShift <direction = \"LEFT\"> (v, n) }",
    ),
    "index": (
        "g (int32[4] x) => (int32[4] y) <int32[3] t = {5, 6, 7}, int32 low = {0}, int32 top = {3}> "
        "{ a = Max (x, low) i = Min (a, top) y = Gather (t, i) }",
        "index",
        "the index may be 0..3, outside 0..2",
        "g (int32[4] x) => (int32[4] y) <int32[3] t = {5, 6, 7}, int32 low = {0}, int32 top = {2}> "
        "{ a = Max (x, low) i = Min (a, top) y = Gather (t, i) }",
    ),
    "element_index": (
        "g (int32[4] x) => (int32[4] y) <int32[3] t = {5, 6, 7}, int32 low = {-4}, int32 top = {2}> "
        "{ a = Max (x, low) i = Min (a, top) y = GatherElements (t, i) }",
        "index",
        "outside 0..2",
        "g (int32[4] x) => (int32[4] y) <int32[3] t = {5, 6, 7}, int32 low = {-3}, int32 top = {2}> "
        "{ a = Max (x, low) i = Min (a, top) y = GatherElements (t, i) }",
    ),
    "long_sum": (
        "g (int32[70000] x) => (int32 y) <int32 t = {32767}, int64[1] a = {0}> "
        "{ v = Min (x, t) w = Max (v, t) y = ReduceSum <keepdims = 0> (w, a) }",
        "overflow",
        "0..2293690000",
        "g (int32[60000] x) => (int32 y) <int32 t = {32767}, int64[1] a = {0}> "
        "{ v = Min (x, t) w = Max (v, t) y = ReduceSum <keepdims = 0> (w, a) }",
    ),
    "partial_sums": (  # the sum is 0, but in some order 2^31 is reached on the way
        "g (bool[4] p) => (int32 y) <int32[4] t = {2000000000, 2000000000, -2000000000, -2000000000}, "
        "int64[1] a = {0}> { w = Where (p, t, t) y = ReduceSum <keepdims = 0> (w, a) }",
        "overflow",
        "may reach -4000000000..4000000000",
        "g (bool[4] p) => (int32 y) <int32[4] t = {1000000000, 1000000000, -1000000000, -1000000000}, "
        "int64[1] a = {0}> { w = Where (p, t, t) y = ReduceSum <keepdims = 0> (w, a) }",
    ),
    "deep_product": (
        "g (uint8[M, 70000] x, int8[70000, 4] w) => (int32[M, 4] y) { y = MatMulInteger (x, w) }",
        "overflow",
        "-2284800000..",
        "g (uint8[M, 65000] x, int8[65000, 4] w) => (int32[M, 4] y) { y = MatMulInteger (x, w) }",
    ),
    "loop": (
        "g (int64 n, bool c, int32 s) => (int32 y) { y = Loop (n, c, s) <body = b (int64 i, bool d, int32 a) => "
        "(bool e, int32 z) { e = Identity (d) z = Identity (a) }> }",
        "operator",
        "no interval rule for Loop",
        "g (int32[4] x, bool p) => (int32[4] y) { y = If (p) <then_branch = t () => (int32[4] a) { a = Identity (x) }, "
        "else_branch = e () => (int32[4] b) { b = Identity (x) }> }",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_found(name: str) -> None:
    text, kind, words, _ = PLANTED[name]
    found, _ = intervals(text)
    assert kind in kinds(found.findings)
    assert any(words in one.text for one in found.findings), found.findings


@pytest.mark.parametrize("name", PLANTED)
def test_its_clean_counterpart_is_proven(name: str) -> None:
    found, _ = intervals(PLANTED[name][3])
    assert found.findings == []


UNBOUNDED = f"g (int32[B, T] x) => (int32[B, 1] y) {SMALL} {{ {CLIP} y = ReduceSum (v, last) }}"
PRODUCT = "g (uint8[B, S, T] p, uint8[B, T, 8] v) => (int32[B, S, 8] y) { y = MatMulInteger (p, v) }"
CACHE = (
    "g (uint8[1, past, 8] before, uint8[1, new, 8] v, uint8[1, 4, n] w) => (int32[1, 4, 8] y) "
    "{ c = Concat <axis = 1> (before, v) y = MatMulInteger (w, c) }"
)


@pytest.mark.parametrize("text", [UNBOUNDED, PRODUCT])
def test_a_sum_over_a_dim_without_a_bound_names_the_dim_and_the_option(text: str) -> None:
    found, _ = intervals(text, {"B": 4})
    (one, *_) = found.findings
    assert one.kind == "unbounded" and "over T" in one.text and one.hint == "give the largest size with --bound T=N"
    assert intervals(text, {"T": 32})[0].findings == []


def test_a_bound_makes_the_sum_as_large_as_it_says() -> None:
    assert ends(UNBOUNDED, T=32) == (-32000, 32000)
    assert ends(PRODUCT, T=100) == (0, 100 * 255 * 255)
    assert kinds(intervals(PRODUCT, {"T": 40000})[0].findings) == ["overflow"]


def test_the_size_of_a_concatenation_is_the_sum_of_its_parts() -> None:
    assert ends(CACHE, past=6, new=4) == (0, 10 * 255 * 255)
    (one,) = intervals(CACHE, {"new": 4})[0].findings
    assert one.kind == "unbounded"


# What a program without findings computes, exactly.
EXACT = {
    "trunc": (small("d = Add (two, one) y = Div (v, d)"), (-333, 333)),
    "mod": (small("d = Add (two, one) y = Mod (v, d)"), (0, 2)),
    "fmod": (small("d = Add (two, one) y = Mod <fmod = 1> (v, d)"), (-2, 2)),
    "negative_mod": (small("d = Neg (two) y = Mod (v, d)"), (-1, 0)),
    "square": (small("y = Mul (v, v)"), (0, 1000000)),
    "whole_part": (f"{X} <int32 k = {{65536}}> {{ r = Mod (x, k) y = Sub (x, r) }}", (-(2**31), 2**31 - 65536)),
    "remainder": (small("d = Max (v, one) q = Div (v, d) m = Mul (q, d) y = Sub (v, m)"), (-1000, 1000)),
    "below_the_largest": (small("m = ReduceMax (v, last) y = Sub (v, m)"), (-2000, 0)),
    "above_the_least": (small("m = ReduceMin (v, last) y = Sub (v, m)"), (0, 2000)),
    "under_the_largest": (small("m = ReduceMax (v, last) y = Sub (m, v)"), (0, 2000)),
    "sign": (small("y = Sign (v)"), (-1, 1)),
    "abs": (small("a = Min (v, low) y = Abs (a)"), (1000, 1000)),
    "clip": (small("y = Clip (v, zero, two)"), (0, 2)),
    "where": (small("c = Greater (v, two) y = Where (c, one, two)"), (1, 2)),
    "decided": (small("c = Greater (v, x) d = LessOrEqual (v, top) y = Where (d, one, two)"), (1, 1)),
    "bits": ("g (int32[4] x) => (int32[4] y) <int32 m = {255}> { y = BitwiseAnd (x, m) }", (0, 255)),
    "or": (small("p = Max (v, zero) y = BitwiseOr (p, two)"), (2, 1023)),
    "flipped": ("g (uint8[4] x) => (uint8[4] y) <uint8 t = {9}> { m = Min (x, t) y = BitwiseNot (m) }", (246, 255)),
    "bool": (small("c = Cast <to = 9> (v) y = Cast <to = 6> (c)"), (0, 1)),
    "rows": (
        "g (uint8[M, 3] x) => (int32[M, 2] y) <int8[3, 2] w = {1, -1, 2, 2, -3, 3}, uint8 z = {128}> "
        "{ y = MatMulInteger (x, w, z) }",
        (-128 * 5 - 127, 127 * 3 + 128 * 3)  # of the second column, of the first,
    ),
    "columns": (
        "g (uint8[M, 3] x) => (int32[M, 2] y) <int8[3, 2] w = {1, -1, 2, 2, -3, 3}, uint8 z = {128}, "
        "int8[2] o = {0, 1}> { y = MatMulInteger (x, w, z, o) }",
        (-128 * 3 - 127 * 3, 127 * 3 + 128 * 3),
    ),
    "convolution": (
        "g (uint8[1, 1, 9] x) => (int32[1, 2, 7] y) <int8[2, 1, 3] w = {1, 2, 3, -1, -1, 4}> "
        "{ y = ConvInteger (x, w) }",
        (-510, 1530),
    ),
    "table": (
        "g (int32[4] x) => (int32[4] y) <int32[5] t = {1, 2, 4, 8, 900}, int32 low = {1}, int32 top = {3}> "
        "{ a = Max (x, low) i = Min (a, top) y = Gather (t, i) }",
        (2, 8),
    ),
    "channels": (
        "g (int32[B, 3] x) => (int32[B, 1] y) <int32[3] t = {1, 20, 300}, int32 z = {0}, int64[1] last = {-1}> "
        "{ a = Max (x, z) m = Min (a, t) y = ReduceSum (m, last) }",
        (0, 321),
    ),
    "heads": (  # one bound a channel survives the split into heads and back
        "g (int32[B, T, 4] x) => (int32[B, T, 4] y) <int32[4] t = {1, 20, 300, 4000}, int32 z = {0}, "
        "int32[4] f = {500000, 50000, 5000, 500}, int64[4] s = {0, 0, 2, 2}, int64[3] u = {0, 0, 4}> "
        "{ a = Max (x, z) m = Min (a, t) r = Reshape (m, s) p = Transpose <perm = [0, 2, 1, 3]> (r) "
        "q = Transpose <perm = [0, 2, 1, 3]> (p) k = Reshape (q, u) y = Mul (k, f) }",
        (0, 2000000),
    ),
    "halves": (
        "g (int32[B, 4] x) => (int32[B, 2] y) <int32[4] t = {1, 20, 300, 4000}, int32 z = {0}> "
        "{ a = Max (x, z) m = Min (a, t) b, c = Split <axis = -1, num_outputs = 2> (m) y = Sub (c, b) }",
        (-20, 4000),
    ),
    "slice": (
        "g (int32[B, 4] x) => (int32[B, 2] y) <int32[4] t = {1, 20, 300, 4000}, int32 z = {0}, int64[1] s = {1}, "
        "int64[1] e = {3}, int64[1] a = {1}> { l = Max (x, z) m = Min (l, t) y = Slice (m, s, e, a) }",
        (0, 300),
    ),
    "places": (
        "g (int32[B, T] x) => (int64[T] y) <int64 z = {0}, int64 o = {1}> "
        "{ n = Shape <start = 1, end = 2> (x) s = Squeeze (n) y = Range (z, s, o) }",
        (0, 15),
    ),
    "count": (
        "g (int32[B, T] x) => (int64[1] y) <int64[1] a = {1}> "
        "{ m = NonZero (x) n = Shape <start = 1> (m) y = Identity (n) }",
        (0, 8 * 16),
    ),
    "running": (small("l = Constant <value_int = -1> () y = CumSum (v, l)"), (-8000, 8000)),
    "log2": (  # as many powers of two as are not above x
        "g (int32[T, 1] x) => (int32[T, 1] y) <int32[4] p = {1, 2, 4, 8}, int64[1] last = {-1}> "
        "{ g = GreaterOrEqual (x, p) c = Cast <to = 6> (g) y = ReduceSum (c, last) }",
        (0, 4),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EXACT)
def test_the_ends_are_those_that_are_reached(name: str) -> None:
    text, expected = EXACT[name]
    assert ends(text, B=8, T=16) == expected


def test_a_column_is_bounded_by_its_own_weights() -> None:
    text = "g (uint8[M, 2] x) => (int32[M, 2] y) <int8[2, 2] w = {1, 100, 1, 100}> { y = MatMulInteger (x, w) }"
    _, by_name = intervals(text)
    assert list(by_name["y"].hi) == [510, 51000] and list(by_name["y"].lo) == [0, 0]


def test_an_extreme_that_is_not_kept_along_its_axis_is_not_the_row_s_own() -> None:
    text = (
        "g (int32[4, 4] x) => (int32[4, 4] y) <int32 t = {9}, int32 z = {0}, int64[1] last = {-1}> "
        "{ a = Max (x, z) v = Min (a, t) m = ReduceMax <keepdims = 0> (v, last) y = Sub (v, m) }"
    )
    assert ends(text) == (-9, 9)


def test_an_index_that_the_caller_feeds_is_assumed_and_listed() -> None:
    text = "g (int64[B, T] ids) => (int32[B, T, 2] y) <int32[3, 2] t = {1, 2, 3, 4, 5, 6}> { y = Gather (t, ids) }"
    found, _ = intervals(text)
    assert found.findings == []
    row, index = found.assumptions
    assert (row, index) == ("inputs have at least one row: 'B' is not 0", "input 'ids' indexes 't' inside 0..2")


def test_a_batch_has_a_row_and_a_text_may_be_empty() -> None:
    text = "g (int64[B, T] ids) => (int64[1] y) { n = Shape <start = %d, end = %d> (ids) y = Div (n, n) }"
    assert intervals(text % (0, 1), {"B": 8, "T": 8})[0].findings == []
    (finding,) = intervals(text % (1, 2), {"B": 8, "T": 8})[0].findings
    assert finding.kind == "divisor"


def test_the_peak_is_the_computed_value_nearest_to_overflow() -> None:
    found, _ = intervals(small("p = Mul (v, v) y = Mul (p, top)"))
    assert found.peak.operator == "Mul" and found.peak.share == 10**9 / 2**31
    assert found.operators["Mul"].nodes == found.operators["Mul"].proven == 2
    assert (found.operators["Mul"].lo, found.operators["Mul"].hi) == (0, 10**9)


def test_a_finding_speaks_of_the_layer_that_the_call_came_from() -> None:
    body = '<domain: "qcompile", opset_import: ["": 21]> Double (x) => (y) { y = Add (x, x) }'
    model = parsed("g (int32[4] x) => (int32[4] y) { y = qcompile.Double (x) }", body)
    model.graph.node[0].name = "/layers.3/mlp/act"
    found = find_intervals(prepared(ir.from_proto(model), "test").model, {})
    (one,) = found.findings
    assert (one.operator, one.node, one.layer) == ("Add", "/layers.3/mlp/act", "layers.3.mlp")
