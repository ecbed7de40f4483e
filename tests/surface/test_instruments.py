"""Instruments: what a proof measures, and what a pass cannot get away with."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
import pytest

import qcompile
from qcompile.calibration.runner import OrtRunner
from qcompile.difference import LOST_DB, Difference
from qcompile.errors import ContractError, UserError
from qcompile.ledger import Preserves
from qcompile.pipeline import Context, Pass
from tests.graph.models import spelled
from tests.surface.plain import feeds


def compiled(model: Path, *passes: object, **options: object) -> qcompile.CompiledModel:
    settings: dict[str, object] = {"recipe": "float", "target": "plain", "calibration": [feeds()], **options}
    return qcompile.compile(model, passes=list(passes), **settings)  # type: ignore[arg-type]


def scale_initializer(model: ir.Model, name: str, factor: float) -> None:
    value = model.graph.initializers[name]
    assert value.const_value is not None
    value.const_value = ir.tensor(value.const_value.numpy() * np.float32(factor), name=name)


@dataclasses.dataclass(frozen=True)
class Liar(Pass):
    """Says that it keeps the function, and multiplies a weight."""

    name: ClassVar[str] = "liar"
    preserves: ClassVar[Preserves] = "function"
    factor: float = 1.01

    def run(self, model: ir.Model, ctx: Context) -> int:
        scale_initializer(model, "up.weight", self.factor)
        return 1


@dataclasses.dataclass(frozen=True)
class Honest(Liar):
    name: ClassVar[str] = "honest"
    preserves: ClassVar[Preserves] = "approximation"


@dataclasses.dataclass(frozen=True)
class Rounder(Liar):
    """Takes a weight apart and puts it together again, which rounds it twice."""

    name: ClassVar[str] = "rounder"

    def run(self, model: ir.Model, ctx: Context) -> int:
        scale_initializer(model, "w", 0.7)
        scale_initializer(model, "w", self.factor / 0.7)
        return 1


@dataclasses.dataclass(frozen=True)
class Meddler(Pass):
    """An analysis that edits the graph."""

    name: ClassVar[str] = "meddler"
    preserves: ClassVar[Preserves] = "analysis"

    def run(self, model: ir.Model, ctx: Context) -> int:
        node = next(n for n in model.graph if n.op_type == "Relu")
        node.op_type = "Tanh"
        return 0


def test_a_difference_is_taken_over_unmasked_positions_only() -> None:
    before = np.ones((1, 3, 4), np.float32)
    after = before.copy()
    after[0, 2] = 7.0
    masked, whole = Difference(), Difference()
    masked.add(before, after, np.array([[True, True, False]]))
    whole.add(before, after)
    assert masked.relative == 0.0 and masked.sqnr_db == math.inf
    assert whole.relative == 6.0 and whole.sqnr_db == pytest.approx(10 * math.log10(12 / (4 * 36)), abs=1e-9)


def test_a_difference_takes_equal_infinities_as_equal_and_nan_as_lost() -> None:
    same, lost, overflown = Difference(), Difference(), Difference()
    same.add(np.array([[-np.inf, 1.0]]), np.array([[-np.inf, 1.0]]))
    lost.add(np.array([[1.0, 1.0]]), np.array([[np.nan, 1.0]]))
    overflown.add(np.array([[1.0, 1.0]]), np.array([[np.inf, 1.0]]))
    assert same.relative == 0.0
    assert math.isnan(lost.relative) and lost.sqnr_db == LOST_DB
    assert overflown.relative == math.inf and overflown.sqnr_db == LOST_DB


def test_a_fold_that_changes_the_function_is_a_broken_contract(model: Path) -> None:
    with pytest.raises(
        ContractError, match=r"'liar' changed the function: relative difference .*, allowed 1e-05"
    ):
        compiled(model, Liar())


def test_a_fold_within_its_tolerance_passes(model: Path) -> None:
    with compiled(model, Liar(factor=1.000001)) as result:
        proof = result.manifest["passes"][1]["proof"]
    assert 0 < proof["relative"] <= 1e-5 and proof["tolerance"] == 1e-5


def test_a_model_that_rounding_moves_further_is_held_to_that(tmp_path: Path) -> None:
    """y = 1e4 (x W - x W'), W' a few steps from W: what is left of x W is mostly rounding."""
    weight = np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32)
    held = {"w": weight, "near": weight * np.float32(1 + 1e-4), "large": np.array([1e4], np.float32)}
    held["two"] = np.array(2, np.float32)  # a step further, and the power of a negative number is NaN
    body = "a = MatMul (x, w) b = MatMul (x, near) c = Sub (a, b) d = Mul (c, large) y = Pow (d, two)"
    source = spelled(tmp_path / "m.onnx", f"g (float[n, 8] x) => (float[n, 8] y) {{ {body} }}", held)
    samples = [{"x": np.random.default_rng(1).standard_normal((4, 8)).astype(np.float32)}]
    with compiled(source, Rounder(factor=1.0), calibration=samples) as result:
        entry = result.manifest["passes"][1]
    assert 1e-5 < entry["proof"]["relative"] <= entry["proof"]["tolerance"] < 1e-2
    assert "one step in the last place of every weight" in entry["notes"][0]
    with pytest.raises(ContractError, match="'rounder' changed the function"):
        compiled(source, Rounder(), calibration=samples)


def test_outputs_in_half_precision_may_differ_by_a_step_of_it(model: Path) -> None:
    """The program is float32 inside; only what the caller is given is rounded."""
    loaded = ir.load(model)
    (result,) = loaded.graph.outputs
    cast = ir.node("Cast", [result], {"to": ir.AttrInt64("to", int(ir.DataType.FLOAT16))})
    narrow = cast.outputs[0]
    narrow.name, narrow.type, narrow.shape = "narrow", ir.TensorType(ir.DataType.FLOAT16), result.shape
    loaded.graph.append(cast)
    loaded.graph.outputs[0] = narrow
    compiled(loaded, Liar(factor=1.0002)).close()  # type: ignore[arg-type]
    with pytest.raises(ContractError, match="allowed 1e-03"):
        compiled(loaded, Liar())  # type: ignore[arg-type]


def test_a_lossy_pass_has_its_error_recorded(model: Path) -> None:
    with compiled(model, Honest()) as result:
        entries = {e["name"]: e for e in result.manifest["passes"]}
    assert entries["honest"]["proof"]["sqnr_db"] == pytest.approx(40.0, abs=0.1)  # an error of 1 %
    assert entries["honest"]["proof"]["tolerance"] is None
    assert entries["lower"]["proof"]["relative"] == 0  # measured against the step before, not the original
    assert result.report["end_to_end"]["sqnr_db"] == pytest.approx(40.0, abs=0.1)


def test_an_analysis_must_leave_the_graph_alone(model: Path) -> None:
    with pytest.raises(ContractError, match="'meddler' is an analysis but edited the graph"):
        compiled(model, Meddler())


def test_a_pass_must_keep_the_interface(model: Path) -> None:
    def rename(loaded: ir.Model) -> None:
        loaded.graph.outputs[0].name = "other"

    with pytest.raises(UserError, match="'rename' changed the model's interface: outputs were"):
        compiled(model, rename)


def test_a_pass_that_breaks_the_model_is_named(model: Path) -> None:
    def break_it(loaded: ir.Model) -> None:
        next(n for n in loaded.graph if n.op_type == "Relu").op_type = "NoSuchOperator"

    with pytest.raises(UserError, match=r"'break_it' left a model that does not run: .*NoSuchOperator"):
        compiled(model, break_it)


def test_an_exception_inside_a_user_pass_names_it(model: Path) -> None:
    def stumble(_: ir.Model) -> None:
        raise ValueError("no such thing")

    with pytest.raises(UserError, match="pass 'stumble' failed: ValueError: no such thing"):
        compiled(model, stumble)


def test_a_lowering_that_changes_nothing_is_not_run_again(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[int] = []
    run = OrtRunner.opened

    def counted(*given: Any) -> Any:
        opened.append(1)
        return run(*given)

    monkeypatch.setattr(OrtRunner, "opened", counted)
    with compiled(model, Honest(factor=1.5)) as program:
        lower = program.manifest["passes"][-1]
    assert lower["name"] == "lower" and lower["proof"]["max_abs"] == 0
    assert len(opened) == 3  # as captured, after the canonical form, after the pass
    assert program.manifest["end_to_end"]["max_abs"] > 0


def test_dump_numbers_the_model_after_each_pass(model: Path, tmp_path: Path) -> None:
    with compiled(model, Honest(), dump=tmp_path / "steps"):
        pass
    names = sorted(path.name for path in (tmp_path / "steps").glob("*.onnx"))
    assert names == ["00-captured.onnx", "01-canonicalise.onnx", "02-honest.onnx", "03-lower.onnx"]
    assert "LayerNormalization" in (tmp_path / "steps" / "00-captured.txt").read_text()
    first = ir.load(tmp_path / "steps" / "01-canonicalise.onnx").graph.initializers["up.weight"].const_value
    second = ir.load(tmp_path / "steps" / "02-honest.onnx").graph.initializers["up.weight"].const_value
    assert first is not None and second is not None
    np.testing.assert_allclose(second.numpy(), first.numpy() * 1.01, rtol=1e-6)


def test_dump_keeps_the_model_that_failed(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ContractError):
        compiled(model, Liar(), dump=tmp_path / "steps")
    assert (tmp_path / "steps" / "02-liar.onnx").is_file()


def test_each_pass_has_a_line_on_stderr_and_none_on_stdout(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with compiled(model, Honest()):
        pass
    shown = capsys.readouterr()
    assert "[2/3] honest: 1 rewrites, SQNR 40.0 dB" in shown.err
    assert shown.out == ""


def test_a_wide_output_is_compared_in_small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    add_rows = Difference._add_rows

    def spy(self: Difference, before: np.ndarray, after: np.ndarray) -> None:
        sizes.append(before.size)
        add_rows(self, before, after)

    monkeypatch.setattr("qcompile.difference.VALUES", 100)
    monkeypatch.setattr(Difference, "_add_rows", spy)
    found = Difference()
    found.add(np.ones((1, 9, 30)), np.full((1, 9, 30), 1.5), np.ones((1, 9), bool))
    assert max(sizes) <= 100 and sum(sizes) == 270
    assert found.error == 270 * 0.25
