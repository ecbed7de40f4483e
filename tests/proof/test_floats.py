"""Floats inside a program are found wherever they hide; those at its boundary are listed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.proof.programs import kinds, proof

CLEAN = (
    "g (int32[4] x) => (int32[4] y) <int32 top = {1000}, int32 low = {-1000}> "
    "{ a = Min (x, top) b = Max (a, low) y = Add (b, b) }"
)

# What is planted, and the value, node or attribute that the finding names.
PLANTED = {
    "constant": (
        "g (int32[4] x) => (int32[4] y) <float f = {0.5}> { z = Mul (f, f) i = Cast <to = 6> (z) y = Max (x, i) }",
        "'f' is float",
    ),
    "hidden_cast": (
        "g (int8[4] x) => (int32[4] y) { f = Cast <to = 1> (x) r = Sqrt (f) y = Cast <to = 6> (r) }",
        "'f' is float, read by Sqrt",
    ),
    "cast_and_back": ("g (int8[4] x) => (int32[4] y) { f = Cast <to = 1> (x) y = Cast <to = 6> (f) }", "'f' is float"),
    "half": ("g (int8[4] x) => (int32[4] y) { f = Cast <to = 10> (x) y = Cast <to = 6> (f) }", "'f' is float16"),
    "bfloat16": ("g (int8[4] x) => (int32[4] y) { f = Cast <to = 16> (x) y = Cast <to = 6> (f) }", "'f' is bfloat16"),
    "float8": ("g (int8[4] x) => (int32[4] y) { f = Cast <to = 17> (x) y = Cast <to = 6> (f) }", "'f' is float8e4m3fn"),
    "alpha": ("g (float[4] x) => (float[4] y) { y = LeakyRelu <alpha = 0.1> (x) }", "attribute 'alpha' is 0.1"),
    "value_float": (
        "g (int8[4] x) => (int32[4] y) { f = Constant <value_float = 2.5> () "
        "i = Cast <to = 6> (f) c = Cast <to = 6> (x) y = Max (c, i) }",
        "'f' is float",
    ),
    "float_shape_filler": (
        "g (int64[1] n) => (int64[a] y) { f = ConstantOfShape <value = float[1] {1.0}> (n) y = Cast <to = 7> (f) }",
        "attribute 'value' is a tensor of floats",
    ),
    "default_filler": (
        "g (int64[1] n) => (int64[a] y) { f = ConstantOfShape (n) y = Cast <to = 7> (f) }",
        "'f' is float",
    ),
    "both_ways": (
        "g (int8[4] x) => (float[4] y, int32[4] z) { y = Cast <to = 1> (x) r = Round (y) z = Cast <to = 6> (r) }",
        "'y' is float, read by Round",
    ),
    "float_through": ("g (float[4] x) => (float[4] y) <float s = {2.0}> { y = Mul (x, s) }", "'x' is float"),
    "product_of_outputs": (
        "g (int8[4] x) => (float[4] y) { a = Cast <to = 1> (x) b = Cast <to = 1> (x) y = Mul (a, b) }",
        "'a' is float, read by Mul",
    ),
    "weights_in_float": (
        "g (int8[4] x) => (int32[4] y) <float s = {0.5}, int8[4] w = {1, 2, 3, 4}> "
        "{ f = DequantizeLinear (w, s) c = Cast <to = 6> (f) i = Cast <to = 6> (x) y = Max (i, c) }",
        "'f' is float",
    ),
    "in_a_branch": (
        "g (int32[4] x, bool p) => (int32[4] y) <float f = {2.0}> { y = If (p) <then_branch = t () => (int32[4] a) "
        "{ a = Cast <to = 6> (f) }, else_branch = e () => (int32[4] b) { b = Identity (x) }> }",
        "'f' is float, read by Cast",
    ),
    "inside_a_branch": (
        "g (int32[4] x, bool p) => (int32[4] y) { y = If (p) <then_branch = t () => (int32[4] a) "
        "{ r = Cast <to = 1> (x) a = Cast <to = 6> (r) }, else_branch = e () => (int32[4] b) { b = Identity (x) }> }",
        "'r' is float",
    ),
    "dead_code": ("g (int32[4] x) => (int32[4] y) { d = Cast <to = 1> (x) y = Identity (x) }", "'d' is float"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_float_is_named(tmp_path: Path, name: str) -> None:
    text, words = PLANTED[name]
    found = proof(tmp_path, text)
    assert not found.holds and "float" in kinds(found.findings)
    assert any(words in one.text for one in found.findings if one.kind == "float"), found.findings


def test_a_clean_program_has_none(tmp_path: Path) -> None:
    found = proof(tmp_path, CLEAN)
    assert found.holds and found.grade == "A" and found.boundary == [] and found.findings == []


SCALE = "s = Constant <value_float = 0.5> ()"
ENTRIES = {
    "quantised": f"{SCALE} q = QuantizeLinear (x, s, z)",
    "scaled": f"{SCALE} a = Mul (x, s) b = Mul (s, a) q = QuantizeLinear (b, s, z)",
    "moved": f"{SCALE} a = Transpose (x) b = Transpose (a) q = QuantizeLinear (b, s, z)",
    "narrowed": f"{SCALE} a = Cast <to = 10> (x) b = Cast <to = 1> (a) q = QuantizeLinear (b, s, z)",
    "cast": "q = Cast <to = 2> (x)",
    "rounded": f"{SCALE} e = Constant <value_float = 9.0> () a = Clip (x, s, e) b = Round (a) q = Cast <to = 2> (b)",
}
OFFSET = "t = Constant <value_float = 1.5> ()"
EXITS = {
    "cast": "y = Cast <to = 1> (m)",
    "scaled": f"{OFFSET} f = Cast <to = 1> (m) g = Mul (f, t) h = Add (t, g) y = Sub (h, t)",
    "dequantised": f"{OFFSET} y = DequantizeLinear (m, t)",
    "moved": "f = Cast <to = 1> (m) r = Transpose (f) y = Transpose (r)",
    "half": "h = Cast <to = 10> (m) y = Cast <to = 1> (h)",
}


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("leave", EXITS)
def test_a_boundary_is_excused_and_listed(tmp_path: Path, entry: str, leave: str) -> None:
    text = (
        "g (float[2, 2] x) => (float[2, 2] y) <uint8 z = {128}, int8[2, 2] w = {1, 2, 3, 4}> "
        f"{{ {ENTRIES[entry]} m = MatMulInteger (q, w, z) {EXITS[leave]} }}"
    )
    found = proof(tmp_path, text)
    assert [one for one in found.findings if "'z'" not in one.text] == [] and found.grade == "A"
    assert found.kinds["float"] == 0 and found.kinds["integer"] == 1
    shown = {crossing.value: crossing.side for crossing in found.boundary}
    assert shown["x"] == "in" and shown["y"] == "out"
    assert shown.get("s", "constant") == shown.get("t", "constant") == "constant"


def test_a_value_without_a_type_fails(tmp_path: Path) -> None:
    found = proof(tmp_path, "g (int32[4] x) => (int32[4] y) { a = other.Unknown (x) y = Add (a, x) }")
    assert "type" in kinds(found.findings) and not found.holds
    assert any("'a' has no known tensor type" in one.text for one in found.findings)


def test_what_the_file_claims_of_a_value_is_not_believed(tmp_path: Path) -> None:
    text = "g (int32[4] x) => (int32[4] y) <int32[4] a> { a = other.Unknown (x) y = Identity (a) }"
    found = proof(tmp_path, text)
    assert any("'a' has no known tensor type" in one.text for one in found.findings)


def test_an_operand_of_a_wrong_type_fails(tmp_path: Path) -> None:
    found = proof(tmp_path, "g (int32[4] x, int64[4] z) => (int32[4] y) { y = Add (x, z) }")
    assert "type" in kinds(found.findings)
