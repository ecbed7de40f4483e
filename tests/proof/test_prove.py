"""The whole proof: grades, the optimised graph, bounds that a model carries, and what a file may not be."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from qcompile import manifest
from qcompile.errors import UserError
from qcompile.proof.optimised import LEVELS
from qcompile.proof.prove import IntegerProof, prove
from tests.proof.programs import kinds, parsed, proof

PRODUCT = "m = MatMulInteger (x, w, z)"
CODES = (
    "g (uint8[B, 2] x) => ({out} y) <int8[2, 2] w = {{1, 2, 3, 4}}, uint8 z = {{128}}, float s = {{0.5}}> {{ {body} }}"
)
DOUBLE = '<domain: "{domain}", opset_import: ["": 21]> Double (x) => (y) {{ y = Add (x, x) }}'


def codes(body: str, out: str = "int32[B, 2]") -> str:
    text = CODES.format(out=out, body=body)
    return text if "s)" in body or "s," in body else text.replace(", float s = {0.5}", "")


GRADED = {
    "A": (codes(f"{PRODUCT} y = Add (m, m)"), ""),
    "B": (codes(f"{PRODUCT} y = qcompile.Double (m)"), DOUBLE.format(domain="qcompile")),
    "C": (
        codes(f"{PRODUCT} o = Constant <value = uint8 {{0}}> () "
            "v = QLinearMatMul (x, s, z, w, s, k, s, o) c = Cast <to = 6> (v) y = Add (m, c)")
        .replace("float s", "int8 k = {0}, float s"),
        "",
    ),
    "none": (codes(f"{PRODUCT} f = Cast <to = 1> (m) r = Sqrt (f) y = Cast <to = 6> (r)"), ""),
}  # fmt: skip


@pytest.mark.parametrize("grade", GRADED)
def test_a_program_has_its_grade(tmp_path: Path, grade: str) -> None:
    found = proof(tmp_path, *GRADED[grade], B=4)
    assert found.grade == grade
    assert found.holds == (grade in ("A", "B"))


def test_calls_of_the_project_s_operators_are_counted_and_their_bodies_analysed(tmp_path: Path) -> None:
    found = proof(tmp_path, *GRADED["B"])
    assert found.functions == {"qcompile.Double": 1} and found.kinds["integer"] == 2
    wide = "g (int32[4] x) => (int32[4] y) { y = qcompile.Double (x) }"
    assert kinds(proof(tmp_path, wide, GRADED["B"][1]).findings) == ["overflow"]


def test_a_function_of_another_domain_may_be_replaced_by_any_kernel(tmp_path: Path) -> None:
    text = codes(f"{PRODUCT} y = other.Double (m)")
    found = proof(tmp_path, text, DOUBLE.format(domain="other"))
    assert found.grade == "C" and not found.holds


def test_a_float_that_a_call_is_given_is_found(tmp_path: Path) -> None:
    function = '<domain: "qcompile", opset_import: ["": 21]> Same <factor> (x) => (y) { y = Identity (x) }'
    text = codes(f"{PRODUCT} y = qcompile.Same <factor = 0.5> (m)")
    found = proof(tmp_path, text, function)
    assert [one.text for one in found.findings] == ["the call is given a float attribute"] and not found.holds


def saved(path: Path, text: str, **metadata: str) -> Path:
    model = parsed(text)
    for key, value in metadata.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key.replace("_", "."), value
    onnx.save(model, path / "m.onnx")
    return path / "m.onnx"


BOUNDARY = codes(f"{PRODUCT} f = Cast <to = 1> (m) y = Mul (f, s)", out="float[B, 2]")


@pytest.mark.parametrize("text", [GRADED["A"][0], BOUNDARY])
def test_the_graphs_that_the_runtime_optimises_stay_integer(tmp_path: Path, text: str) -> None:
    found = prove(saved(tmp_path, text), {"B": 4})
    assert found.holds and [graph.level for graph in found.optimised] == list(LEVELS)
    assert [check.name for check in found.checks()] == [
        "types", "grade", "optimised basic", "optimised extended", "optimised all", "intervals",
    ]  # fmt: skip
    assert all(check.holds for check in found.checks())


def test_a_float_that_an_optimiser_makes_is_found(tmp_path: Path) -> None:
    """Quantised operands around a float product: the runtime fuses them into an operator with float scales."""
    text = codes(
        "f = DequantizeLinear (x, s, z) g = DequantizeLinear (w, s) h = MatMul (f, g) "
        "q = QuantizeLinear (h, s, z) y = Cast <to = 6> (q)"
    )
    found = prove(saved(tmp_path, text), levels=("all",))
    (graph,) = found.optimised
    assert graph.findings and all("(optimised, all)" in one.text for one in graph.findings)
    assert graph.kinds["opaque"] >= 1


def test_the_runtime_s_own_integer_operators_are_listed(tmp_path: Path) -> None:
    text = codes(f"{PRODUCT} t = Constant <value = int32[2] {{1, 2}}> () y = Add (m, t)")
    found = prove(saved(tmp_path, text), {"B": 4})
    assert found.holds and found.extensions == {}
    assert all(graph.kinds["float"] == 0 for graph in found.optimised)


def test_a_program_that_the_runtime_refuses_is_found(tmp_path: Path) -> None:
    text = "g (int16[4] x, int16[4] z) => (int16[4] y) { y = Max (x, z) }"
    found = prove(saved(tmp_path, text), levels=("basic",))
    assert kinds(found.all_findings) == ["runtime"] and not found.holds
    assert "no CPU kernel" in found.all_findings[0].hint


SUM = (
    "g (uint8[B, T] x, uint8[B, T, 8] v) => (int32[B, 1, 8] y) <int64[1] a = {1}> "
    "{ u = Unsqueeze (x, a) y = MatMulInteger (u, v) }"
)


def test_a_model_carries_bounds_and_the_caller_s_win(tmp_path: Path) -> None:
    path = saved(tmp_path, SUM, qcompile_bounds=json.dumps({"T": 512}))
    assert prove(path, levels=()).holds and prove(path, levels=()).bounds == {"T": 512}
    assert kinds(prove(path, {"T": 10**6}, levels=()).findings) == ["overflow"]


@pytest.mark.parametrize("text", ["[1]", "{", '{"T": "512"}', '{"T": 0}', '{"T": true}'])
def test_bounds_that_are_none_are_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match="not a JSON object of names and sizes"):
        prove(saved(tmp_path, SUM, qcompile_bounds=text), levels=())


def test_a_bound_of_an_unknown_dim_names_the_nearest(tmp_path: Path) -> None:
    path = saved(tmp_path, SUM.replace("T]", "tokens]").replace("T,", "tokens,"))
    with pytest.raises(UserError, match="unknown dynamic dim 'token'") as error:
        prove(path, {"token": 4}, levels=())
    assert error.value.hint == "did you mean tokens?"


def test_a_proof_is_plain_data(tmp_path: Path) -> None:
    found = proof(tmp_path, *GRADED["none"])
    held = json.loads(manifest.dumps(manifest.plain(found)))
    assert held["grade"] == "none" and held["operators"]["MatMulInteger"]["proven"] == 1
    assert {one["kind"] for one in held["findings"]} == {"float"}
    assert held.keys() == IntegerProof.__dataclass_fields__.keys()


def test_external_weights_are_mapped_and_may_not_leave_the_folder(tmp_path: Path) -> None:
    model = parsed("g (uint8[B, 2000] x) => (int32[B, 700] y) <int8[2000, 700] w> { y = MatMulInteger (x, w) }")
    weights = np.random.default_rng(0).integers(-127, 128, (2000, 700)).astype(np.int8)
    del model.graph.value_info[:]
    model.graph.initializer.append(onnx.numpy_helper.from_array(weights, "w"))
    path = tmp_path / "m.onnx"
    onnx.save(model, path, save_as_external_data=True, location="w.bin", size_threshold=0)
    found = prove(path, levels=("all",))
    assert found.holds
    most = np.maximum(weights, 0).astype(np.int64).sum(axis=0).max() * 255
    assert found.operators["MatMulInteger"].hi == most
    (tmp_path / "w.bin").rename(tmp_path.parent / "w.bin")
    (tmp_path / "w.bin").symlink_to(tmp_path.parent / "w.bin")
    with pytest.raises(UserError, match="link out of the model's folder"):
        prove(path)


def test_a_small_table_beside_the_file_is_read(tmp_path: Path) -> None:
    model = parsed(
        "g (int32[B] x) => (int32[B] y) <int32[3] k, int32[1] z> { s = Shape (x) i = Mod (s, three) p = Gather (k, i)"
        " y = Add (x, z) w = Add (p, z) }".replace("int32[1] z>", "int32[1] z, int64[1] three>")
    )
    del model.graph.value_info[:]
    for name, values in (("k", np.array([1, 2, 4], np.int32)), ("z", np.zeros(1, np.int32)), ("three", np.array([3]))):
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="k.bin", size_threshold=0)
    assert [one.text for one in prove(tmp_path / "m.onnx", levels=()).findings if one.kind == "type"] == []


def test_a_large_table_is_looked_up_without_a_copy(tmp_path: Path) -> None:
    rows = np.zeros((50_000, 16), np.int8)
    rows[7, 3], rows[8, 4] = 100, -99
    model = parsed(
        "g (int64[B, T] ids) => (int32[B, T, 16] y) <int8[50000, 16] w> { r = Gather (w, ids) y = Cast <to = 6> (r) }"
    )
    del model.graph.value_info[:]
    model.graph.initializer.append(onnx.numpy_helper.from_array(rows, "w"))
    onnx.save(model, tmp_path / "m.onnx")
    found = prove(tmp_path / "m.onnx", levels=())
    assert found.holds and (found.operators["Cast"].lo, found.operators["Cast"].hi) == (-99, 100)
    row, index = found.assumptions
    assert (row, index) == ("inputs have at least one row: 'B' is not 0", "input 'ids' indexes 'w' inside 0..49999")
