"""compile(): the expanded pipeline, what it accepts, and what it leaves behind."""

from __future__ import annotations

import dataclasses
import errno
import math
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

import qcompile
from qcompile import manifest, planning, publish, recipe
from qcompile.calibration.samples import proof_samples
from qcompile.errors import GateError, UserError
from qcompile.ledger import Preserves
from qcompile.pipeline import Context, IrPass, Pass
from tests.surface.plain import Plain, feeds, write_model


def compile_float(model: Any, **options: Any) -> qcompile.CompiledModel:
    return qcompile.compile(
        model, **{"recipe": "float", "target": "plain", "calibration": [feeds()], **options}
    )


def names(passes: Any, recipe_name: str) -> list[str]:
    return [p.name for p in planning.expand(passes, recipe.by_name(recipe_name), Plain())]


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in which every temporary file of the test is made."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_a_float_recipe_needs_no_transform_and_no_quantiser() -> None:
    assert names(None, "float") == ["canonicalise", "lower"]


def test_the_pipeline_adds_what_the_named_passes_need() -> None:
    assert names("canonicalise", "float") == ["canonicalise", "lower"]
    assert names([lambda model: None], "float") == ["canonicalise", "<lambda>", "lower"]


@pytest.mark.parametrize(
    ("passes", "message", "hint"),
    [
        ("quantise,os_plus{points=7}", "'os_plus' needs the float model, but 'quantise'", "os_plus{points=7},quantise"),
        ("os_plus,quantise,outliers", "pass 'outliers' needs the float model, but 'quantise'", "outliers,quantise"),
        ("quantise,canonicalise", "'quantise' needs the canonical form, but 'canonicalise'", "canonicalise,quantise"),
        ("smoothquant,canonicalise", "pass 'smoothquant' needs the canonical form", "canonicalise,smoothquant"),
        ("canonicalise,quantise,canonicalise", "pass 'canonicalise' needs the float model", "canonicalise,quantise"),
        ("quantise,quantise", "pass 'quantise' needs the float model", "name quantise once"),
        ("int_only,os_plus", "'os_plus' needs the float model, but 'int_only' stands before it", "os_plus,int_only"),
        ("int_only,int_only", "pass 'int_only' needs the float model", "name int_only once"),
        ("int_only,quantise", "pass 'int_only' needs a quantised model", "recipe with low bits"),
    ],
)
def test_passes_in_an_order_that_cannot_work_are_refused(passes: str, message: str, hint: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        names(passes, "w8a8_static")
    assert hint in caught.value.hint


def test_what_reads_a_quantised_model_stands_behind_quantise_and_needs_a_recipe_that_quantises() -> None:
    expected = ["canonicalise", "os_plus", "quantise", "int_only", "lower"]
    assert names("os_plus,int_only", "w8a8_static") == expected
    with pytest.raises(UserError, match="needs a quantised model") as caught:
        names("os_plus,int_only", "float")
    assert "--recipe w8a8_static" in caught.value.hint


def test_a_pass_of_ones_own_may_stand_anywhere() -> None:
    assert names([print, "canonicalise,os_plus,quantise", print], "w8a8_static") == [
        "print", "canonicalise", "os_plus", "quantise", "print", "lower",
    ]  # fmt: skip


def test_run_gives_the_outputs_by_name(model: Path) -> None:
    with compile_float(model) as compiled:
        outputs = compiled.run(feeds(batch=2, length=5))
    assert list(outputs) == ["last_hidden_state"]
    assert outputs["last_hidden_state"].shape == (2, 5, 16)
    assert np.abs(outputs["last_hidden_state"]).max() > 0.1


def test_an_ir_model_is_compiled_and_left_as_it_was(model: Path) -> None:
    given = ir.load(model)
    text = str(given)
    with compile_float(given) as compiled:
        assert compiled.manifest["source"]["kind"] == "onnx_ir"
    assert str(given) == text


def test_a_thing_that_is_no_model_is_refused() -> None:
    with pytest.raises(UserError, match="cannot compile a int"):
        compile_float(7)


def test_save_writes_program_manifest_and_report(model: Path, tmp_path: Path) -> None:
    with compile_float(model) as compiled:
        compiled.save(tmp_path / "out")
    assert {"manifest.json", "model.onnx", "report.html"} <= {p.name for p in (tmp_path / "out").iterdir()}


def test_an_earlier_result_is_replaced(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    compile_float(model, output=out).close()
    (out / "model.onnx").write_bytes(b"old")
    compile_float(model, output=out).close()
    assert (out / "model.onnx").stat().st_size > 100
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "tiny.onnx"]


def test_a_folder_of_someone_else_is_not_touched(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    compile_float(model, output=out).close()
    (out / "thesis.txt").write_text("years")
    with pytest.raises(UserError, match=r"holds files that qcompile did not write: thesis\.txt"):
        compile_float(model, output=out)
    assert (out / "thesis.txt").read_text() == "years"
    compile_float(model, output=out, force=True).close()
    assert not (out / "thesis.txt").exists()


def test_the_destination_is_checked_before_the_work(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(UserError, match="is a file"):
        compile_float(tmp_path / "missing.onnx", output=tmp_path / "out")


def test_force_never_deletes_an_input_or_the_current_folder(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"holds '.*tiny\.onnx', which replacing it would delete"):
        compile_float(model, output=model.parent, force=True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UserError, match="would delete"):
        compile_float(model, output=".")
    assert model.stat().st_size > 0


def test_a_destination_below_a_file_is_refused_before_the_work(model: Path) -> None:
    with pytest.raises(UserError, match=r"tiny\.onnx' is a file"):
        compile_float(model, output=model / "below")


@pytest.mark.parametrize("drop", [float("nan"), float("inf"), -0.1])
def test_a_drop_that_is_no_bound_is_refused(model: Path, drop: float) -> None:
    with pytest.raises(UserError, match=f"max_drop is {drop}, but must be a number from 0 up") as caught:
        compile_float(model, max_drop=drop)
    assert "0.01" in caught.value.hint


@pytest.mark.parametrize(("drop", "words"), [(0, "no loss at all"), (1, "twice as high"), (0.5, "")])
def test_a_drop_that_is_hardly_meant_is_told_before_the_work(
    model: Path, capsys: pytest.CaptureFixture[str], drop: float, words: str
) -> None:
    with pytest.raises(UserError, match="the calibration list is empty"):
        compile_float(model, recipe="w8a8_static", max_drop=drop, calibration=[])
    told = [line for line in capsys.readouterr().err.splitlines() if "--max-drop" in line]
    assert len(told) == bool(words) and all(words in line for line in told)


def test_a_full_disk_is_the_users_error_and_leaves_nothing(
    model: Path, tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(source: Path, target: Path) -> None:
        target.mkdir()
        (target / "model.onnx").write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target / "model.onnx"))

    monkeypatch.setattr(shutil, "copytree", fail)
    with pytest.raises(UserError, match="no disk space left"):
        compile_float(model, output=tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["temporary", "tiny.onnx"]
    assert not list(temporary.glob("qcompile-*"))


@pytest.mark.parametrize(
    "error",
    [
        OSError("1000 requested and 10 written"),  # numpy
        OSError("Not enough free space to write 46881792 bytes after offset 0"),  # onnx_ir
        shutil.Error([("a", "b", "[Errno 28] No space left on device: 'a' -> 'b'")]),
    ],
)
def test_libraries_say_a_full_disk_in_their_own_words(error: OSError) -> None:
    with pytest.raises(UserError, match="no disk space left"), publish.writing():
        raise error


def test_a_gate_that_nothing_measures_is_not_kept_silent(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with compile_float(model, max_drop=0.1) as compiled:
        assert compiled.report["gate"] is None
    assert "the allowed drop was not checked" in capsys.readouterr().err


def test_a_graph_without_matmuls_is_compiled_and_the_user_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    opset = helper.make_opsetid("", 21)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=10), tmp_path / "relu.onnx")
    given = [{"x": np.array([[1.0, -2.0, 3.0, -4.0]], np.float32)}]
    with compile_float(tmp_path / "relu.onnx", calibration=given, recipe="w8a8") as compiled:
        assert compiled.run(given[0])["y"].tolist() == [[1.0, 0.0, 3.0, 0.0]]
    shown = capsys.readouterr().err
    assert "os_plus changed nothing" in shown and "this graph has no matmul" in shown


def test_the_reason_of_most_places_says_why_nothing_changed(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    @dataclasses.dataclass(frozen=True)
    class Reluctant(Pass):
        name: ClassVar[str] = "reluctant"
        preserves: ClassVar[Preserves] = "function"

        def run(self, model: ir.Model, ctx: Context) -> int:
            for place, reason in enumerate(("rare", "early", "late", "early", "late")):
                ctx.ledger.skip(f"place {place}", reason)
            return 0

    compile_float(model, passes=[Reluctant()]).close()
    assert "reluctant changed nothing: late" in capsys.readouterr().err


def test_an_interruption_leaves_nothing(model: Path, tmp_path: Path, temporary: Path) -> None:
    def stop(_: ir.Model) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compile_float(model, passes=[stop], output=tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(temporary.glob("qcompile-*"))


def test_a_failed_rename_puts_the_earlier_result_back(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    compile_float(model, output=out).close()
    before = (out / "manifest.json").read_bytes()
    rename = Path.rename

    def fail_once(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_once)
    with pytest.raises(KeyboardInterrupt):
        compile_float(model, output=out)
    assert (out / "manifest.json").read_bytes() == before


def test_the_temporary_files_go_with_the_result(model: Path, temporary: Path) -> None:
    compiled = compile_float(model)
    assert len(list(temporary.glob("qcompile-*"))) == 1
    compiled.close()
    assert not list(temporary.glob("qcompile-*"))


def test_compiling_twice_gives_identical_bytes(model: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        compile_float(model, output=tmp_path / name).close()
    for path in manifest.files_below(tmp_path / "a"):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_another_folder_gives_the_same_bytes(model: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(model, tmp_path / "elsewhere")
    compile_float(model, output=tmp_path / "a").close()
    compile_float(tmp_path / "elsewhere" / model.name, output=tmp_path / "b").close()
    for name in ("manifest.json", "model.onnx", "report.html"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_a_missed_gate_raises_and_writes_nothing(model: Path, tmp_path: Path) -> None:
    def measure(loaded: ir.Model) -> None:
        return None

    step = IrPass(measure, "measure")
    run = step.run

    def with_gate(loaded: ir.Model, ctx: Any) -> int:
        ctx.ledger.current.facts["gate"] = {"metric": "perplexity", "drop": 0.5, "max_drop": 0.1}
        return run(loaded, ctx)

    step.run = with_gate  # type: ignore[method-assign, assignment]
    with pytest.raises(GateError, match=r"perplexity dropped by 0\.5, allowed 0\.1; nothing was written"):
        compile_float(model, passes=[step], output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def changing(factor: float) -> IrPass:
    """A pass of the user's that multiplies the last weight."""

    def multiply(loaded: ir.Model) -> None:
        value = loaded.graph.initializers["down.weight"]
        with np.errstate(over="ignore", invalid="ignore"):
            value.const_value = ir.tensor(value.const_value.numpy() * np.float32(factor), name=value.name)  # type: ignore[union-attr]

    return IrPass(multiply, "multiply")


def test_a_program_that_overflows_is_not_written(model: Path, tmp_path: Path) -> None:
    with pytest.raises(GateError, match="answers NaN or infinity where the float model does not"):
        compile_float(model, passes=[changing(math.inf)], output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_program_far_from_the_model_is_told(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compile_float(model, passes=[changing(0.0)]).close()
    assert "the outputs are far from the float model's (SQNR 0.0 dB)" in capsys.readouterr().err
    compile_float(model, passes=[changing(0.9)]).close()
    assert "far from" not in capsys.readouterr().err


def test_a_weight_that_is_an_output_too_stays_one(model: Path) -> None:
    loaded = ir.load(model)
    loaded.graph.outputs.append(loaded.graph.initializers["gain"])
    with compile_float(loaded) as compiled:
        found = compiled.run(feeds())
    assert np.array_equal(found["gain"], loaded.graph.initializers["gain"].const_value.numpy())  # type: ignore[union-attr]


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_named_before_any_sample(number: float, tmp_path: Path) -> None:
    loaded = ir.load(write_model(tmp_path / "bad.onnx"))
    value = loaded.graph.initializers["up.weight"]
    assert value.const_value is not None
    weight = value.const_value.numpy().copy()
    weight[3, 5] = number
    value.const_value = ir.tensor(weight, name="up.weight")
    with pytest.raises(UserError, match=rf"the weight 'up\.weight' holds {number} at \[3, 5\]"):
        compile_float(loaded)


def embedded(width: int | str) -> ir.Model:
    """inputs_embeds [batch, seq, ``width``] * attention_mask, plus a constant of width 4, twice."""
    value = helper.make_tensor_value_info
    inputs = [
        value("inputs_embeds", TensorProto.FLOAT, ["batch", "seq", width]),
        value("attention_mask", TensorProto.INT64, ["batch", "seq"]),
    ]
    nodes = [
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "last"], ["column"]),
        helper.make_node("Mul", ["inputs_embeds", "column"], ["masked"]),
        helper.make_node("Add", ["masked", "offset"], ["shifted"]),
        helper.make_node("MatMul", ["shifted", "weight"], ["y"], "fc"),
    ]
    weights = {"last": np.array([2]), "offset": np.ones(4, np.float32), "weight": np.eye(4, dtype=np.float32)}
    held = [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "embedded", inputs, [value("y", TensorProto.FLOAT, ["batch", "seq", 4])], held)
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))


def test_vectors_with_a_mask_compile_on_random_data() -> None:
    with compile_float(embedded(4), recipe="w8a8_static", calibration=None) as result:
        assert result.manifest["calibration"]["held_out"] == 2
        assert result.report["end_to_end"]["samples"] == 2
        assert result.report["end_to_end"]["sqnr_db"] > 30


def test_sizes_that_do_not_go_together_are_shown() -> None:
    given = {"inputs_embeds": np.ones((1, 3, 5), np.float32), "attention_mask": np.ones((1, 3), np.int64)}
    with pytest.raises(UserError, match="cannot run the model") as caught:
        compile_float(embedded("width"), calibration=[given])
    assert caught.value.where == "the float model on inputs_embeds float32 [1, 3, 5], attention_mask int64 [1, 3]"
    assert caught.value.hint == "do its sizes go together in this model?"


def test_guessed_sizes_that_do_not_run_are_said_to_be_guesses() -> None:
    model = embedded("width")
    model.graph.inputs[0].shape = ir.Shape(["batch", 7, "width"])
    model.graph.inputs[1].shape = ir.Shape(["batch", 7])
    with pytest.raises(UserError, match="cannot run the model") as caught:
        compile_float(model, calibration=None)
    assert "inputs_embeds float32 [1, 7, 128]" in caught.value.where and "guesses" in caught.value.hint


def test_proofs_are_made_on_samples_that_nothing_was_calibrated_on(model: Path, tmp_path: Path) -> None:
    seen: list[int] = []

    def watch(self: Plain, loaded: ir.Model, ctx: Any) -> int:
        seen.extend(int(sample.feeds["input_ids"][0, 0]) for sample in proof_samples(loaded, ctx.samples))
        seen.extend(int(sample.feeds["input_ids"][0, 0]) for sample in ctx.samples)
        return 0

    ids = np.arange(6)[:, None].repeat(4, 1)
    np.savez(tmp_path / "c.npz", input_ids=ids)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Plain, "lower", watch)
        compile_float(model, calibration=tmp_path / "c.npz", max_samples=3).close()
    assert seen == [3, 4, 0, 1, 2]


def test_a_model_that_overflows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'last_hidden_state' of the float model is NaN .* sample 0"):
        compile_float(write_model(tmp_path / "bad.onnx", scale=1e30))


@pytest.mark.parametrize(
    ("calibration", "text"),
    [
        ([], "the calibration list is empty"),
        ([3], "calibration sample 0 is a int"),
        ([{"input_ids": np.full((1, 4), 99)}], "99"),
        ([{"input_ids": np.zeros((1, 4, 2), np.int64)}], "input_ids"),
        ([{"attention_mask": np.ones((1, 4), np.int64)}], "input_ids"),
    ],
)
def test_calibration_that_does_not_fit_is_refused(model: Path, calibration: Any, text: str) -> None:
    with pytest.raises(UserError, match=text):
        compile_float(model, calibration=calibration)
