"""The command line: exit codes, error lines, what goes to stdout, and the verbs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from qcompile import cli, environment, pipeline
from qcompile.commands import tables
from tests.surface.plain import feeds
from tests.surface.record import record

PLAIN = ("--recipe", "float", "--target", "plain")


@pytest.fixture
def calib(tmp_path: Path) -> Path:
    path = tmp_path / "calib.npz"
    given = feeds(batch=2)
    np.savez(path, input_ids=given["input_ids"], attention_mask=given["attention_mask"])
    return path


@pytest.fixture
def out(model: Path, calib: Path, tmp_path: Path) -> Path:
    """A compiled folder."""
    assert cli.main([str(model), *PLAIN, "--calib", str(calib), "-o", "out"]) == 0
    return tmp_path / "out"


def failed(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, the error line and the hint of a command that must fail without a traceback."""
    capsys.readouterr()
    code = cli.main(list(arguments))
    shown = capsys.readouterr()
    lines = shown.err.splitlines()
    assert "Traceback" not in shown.err
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1 and shown.out == ""
    hints = [line for line in lines if line.startswith("hint: ")]
    return code, errors[0], hints[0] if hints else ""


def test_a_compilation_ends_with_its_figures_on_stdout(
    model: Path, calib: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([str(model), *PLAIN, "--calib", str(calib), "-o", "out"]) == 0
    shown = capsys.readouterr()
    rows = dict(line.split(maxsplit=1) for line in shown.out.splitlines())
    assert rows["kernels"] == "0 of 2 matmuls in low bits: MatMul 2" and "random" not in shown.out
    assert rows["report"] == "out/report.html" and Path("out/report.html").is_file()
    assert "pipeline: canonicalise, lower{target=plain}" in shown.err


def test_a_figure_of_random_data_says_so(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([str(model), *PLAIN, "-o", "out"]) == 0
    (row,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("end to end"))
    assert row.endswith("identical, on random data")
    assert json.loads(Path("out/manifest.json").read_text())["calibration"]["kind"] == "random"
    assert "against the float model, on random data" in Path("out/report.html").read_text()


def test_without_o_the_folder_is_named_after_model_and_recipe(model: Path, calib: Path) -> None:
    assert cli.main([str(model), *PLAIN, "--calib", str(calib)]) == 0
    assert Path("tiny-float/model.onnx").is_file()


@pytest.mark.parametrize(
    ("arguments", "error", "hint"),
    [
        (["tiny.onnx", "--recipe", "w8a8_statc"], "unknown recipe 'w8a8_statc'", "w8a8_static"),
        (["tiny.onnx", "--recipe", "mine.toml"], "no recipe file 'mine.toml'", ""),
        (["tiny.onnx", "--passes", "osplus", *PLAIN], "unknown pass 'osplus'", "did you mean os_plus"),
        (
            ["tiny.onnx", "--passes", "canonicalise{deep=1}", *PLAIN],
            "option of pass 'canonicalise' 'deep'",
            "",
        ),
        (["tiny.onnx", "--passes", "os_plus{", *PLAIN], "cannot read --passes", "name{option=value}"),
        (["tiny.onnx", "--passes", "mine.py:fold", *PLAIN], "no file 'mine.py'", ""),
        (["tiny.onnx", "--target", "cpus"], "unknown target 'cpus'", "did you mean cpu"),
        (["tiny.onnx", "--recip", "x"], "No such option '--recip'", "--help"),
        (["tiny.onnx", "--samples", "0"], "--samples", ""),
        (["tiny.onnx", "--max-drop=-0.1"], "--max-drop", "--help"),
        (["tiny.onnx", "--max-drop", "nan"], "max_drop is nan", "0.01 allows one hundredth"),
        (["tiny.onnx", "--max-drop", "1%"], "'1%' is not a valid number.", "--help"),
        (["tiny.onnx", "--length", "x"], "'x' is not a valid whole number.", "--help"),
        (["tiny.onnx", "--seed", "-1"], "seed is -1", ""),
        (["tiny.onnx", *PLAIN, "--dump", "tiny.onnx"], "'tiny.onnx' is no folder", "name a folder"),
        (["tiny.onnx", *PLAIN, "--resume", "tiny.onnx/x"], "'tiny.onnx/x' is no folder", "name a folder"),
        (["tiny.onnx", *PLAIN, "--tokenizer", "nowhere"], "no tokenizer.json at nowhere", ""),
        (["tiny.onnx", *PLAIN, "-o", 300 * "a"], "file name too long", "-o"),
        (["missing.onnx", *PLAIN], "no model at 'missing.onnx'", ""),
        (["no_module:factory", *PLAIN], "cannot import 'no_module'", ""),
        ([".", *PLAIN], "holds neither model.onnx nor config.json", ""),
        (["tiny.onnx", *PLAIN, "--calib", "missing.npz"], "missing.npz", ""),
        (["tiny.onnx", *PLAIN, "--calib", "tiny.onnx"], "cannot read calibration data", ".npz"),
        (["explian", "out"], "unknown verb 'explian', and no file or folder", "did you mean explain"),
        (["explain", "nothing"], "'nothing' is no compiled model", ""),
        (["verify", "nothing"], "'nothing' is no compiled model", ""),
        (["bench", "nothing", "--against", "tiny.onnx"], "no program at 'nothing'", ""),
        (["bench", "tiny.onnx"], "--against", "bench --help"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    model: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], error: str, hint: str
) -> None:
    code, line, helped = failed(capsys, *arguments)
    assert code == 2 and error in line and hint in helped
    assert sorted(p.name for p in model.parent.iterdir()) == ["tiny.onnx"]


@pytest.mark.parametrize("content", [b"", b"not an onnx file at all", None])
def test_a_file_that_is_no_model_is_a_mistake(
    model: Path, capsys: pytest.CaptureFixture[str], content: bytes | None
) -> None:
    Path("bad.onnx").write_bytes(model.read_bytes()[:2000] if content is None else content)
    code, line, _ = failed(capsys, "bad.onnx", *PLAIN)
    assert code == 2 and "bad.onnx" in line


def test_missing_external_data_is_a_mistake(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save(onnx.load(model), "split.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    Path("w.bin").unlink()
    code, line, _ = failed(capsys, "split.onnx", *PLAIN)
    assert code == 2 and "w.bin" in line


def test_an_operator_that_onnx_runtime_lacks_is_named(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    proto = onnx.load(model)
    next(n for n in proto.graph.node if n.op_type == "Relu").CopyFrom(
        helper.make_node("Unheard", ["wide"], ["active"], "act", domain="some.company")
    )
    proto.opset_import.append(helper.make_opsetid("some.company", 1))
    onnx.save(proto, "odd.onnx")
    code, line, _ = failed(capsys, "odd.onnx", *PLAIN)
    assert code == 2 and "Unheard" in line


def test_calibration_keys_that_do_not_fit_are_a_mistake(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez("calib.npz", input_idz=np.zeros((2, 4), np.int64))
    code, line, helped = failed(capsys, "tiny.onnx", *PLAIN, "--calib", "calib.npz")
    assert code == 2 and "input_idz" in line and "input_ids" in helped


def test_a_bug_is_exit_code_3_and_a_traceback_only_with_debug(
    model: Path, calib: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stumble(*_: object, **__: object) -> None:
        raise RuntimeError("the tower leans")

    monkeypatch.setattr("qcompile.driver.expand", stumble)
    code, line, helped = failed(capsys, str(model), *PLAIN)
    assert code == 3 and "internal error: RuntimeError: the tower leans" in line and "--debug" in helped
    assert cli.main([str(model), *PLAIN, "--debug"]) == 3
    assert "Traceback" in capsys.readouterr().err


def test_running_out_of_memory_is_no_bug(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stumble(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("qcompile.driver.expand", stumble)
    code, line, _ = failed(capsys, str(model), *PLAIN)
    assert code == 2 and "not enough memory" in line


def test_ctrl_c_cleans_up_and_exits_130(model: Path, calib: Path, tmp_path: Path) -> None:
    Path("slow.py").write_text(
        "import time\n\ndef wait(model):\n    print('waiting', flush=True)\n    time.sleep(60)\n"
    )
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    code = (
        "import signal, sys; from qcompile import backends, cli; "
        "signal.signal(signal.SIGINT, signal.default_int_handler); "  # a background run has none
        "backends.TARGETS['plain'] = 'tests.surface.plain:Plain'; sys.exit(cli.main(sys.argv[1:]))"
    )
    root = Path(__file__).parents[2]
    running = subprocess.Popen(
        [sys.executable, "-c", code, str(model), *PLAIN, "--passes", "slow.py:wait", "--calib", str(calib),
         "-o", "out"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        env=os.environ | {"TMPDIR": str(scratch), "PYTHONPATH": str(root)},
    )  # fmt: skip
    assert running.stdout is not None and running.stdout.readline() == "waiting\n"
    time.sleep(0.2)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 130
    assert "error: interrupted" in err and "Traceback" not in err
    assert not (tmp_path / "out").exists() and not list(scratch.glob("qcompile-*"))


def test_help_and_tables_need_no_runtime() -> None:
    code = (
        "import sys; from qcompile import cli\n"
        "for verb in (['--help'], ['--version'], ['passes'], ['recipes'], ['bench', '--help']):\n"
        "    assert cli.main(verb) == 0\n"
        "print('heavy:', *({'torch', 'onnxruntime', 'tvm', 'matplotlib'} & set(sys.modules)))\n"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.splitlines()[-1].split() == ["heavy:"]
    assert "--max-drop X" in shown.stdout and "os_plus" in shown.stdout and "w8a8_static" in shown.stdout


@pytest.mark.parametrize("name", pipeline.PASSES)
def test_every_option_of_every_pass_says_what_it_is_for(name: str) -> None:
    options = tables.pass_options(type(pipeline.make_pass(name, {})))
    assert [o.spelled for o in options if not o.meaning or not o.values] == []
    for option in options:  # what is listed as the default can be typed
        key, _, text = option.spelled.partition("=")
        assert pipeline.make_pass(name, {key: text}).spec == name


def test_passes_lists_options_with_defaults_values_and_meanings(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(pipeline.PASSES, "theirs", "no_such_package.passes:Theirs")
    assert cli.main(["passes"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "search=false true, false take the best of 0.3 .. 0.9 at each site instead" in lines
    assert any(line.startswith("mode=auto fold, insert, auto fold into producers") for line in lines)
    assert "norm=true true, false transform what norms feed" in lines
    assert any(line.startswith("alpha=none number, none quantile") for line in lines)
    assert any(line.startswith("theirs (cannot be loaded: ModuleNotFoundError") for line in lines)


def test_recipes_lists_the_keys_of_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipes"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert 'op = "linear" linear, head, embedding, attention, cache the kind of operator' in lines
    assert "weights.group_size whole number inputs in a group" in lines
    assert "minmax smallest and largest value seen" in lines
    assert all(key.meaning and key.values for key in tables.rule_keys())


def test_analyze_prints_a_row_for_each_site_or_json(
    model: Path, calib: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(pipeline.PASSES, "outliers", "tests.surface.plain:OneOutlier")
    assert cli.main(["analyze", str(model), "--calib", str(calib)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[:2] == [["site", "largest", "channel"], ["norm:norm", "30.5", "7"]]
    assert lines[-1] == ["norm:other", "nothing", "reads", "it", "other_node"]
    assert cli.main(["analyze", str(model), "--calib", str(calib), "--json"]) == 0
    entry = json.loads(capsys.readouterr().out)
    assert entry["sites"] == [{"site": "norm:norm", "largest": 30.5, "channel": 7}]
    assert cli.main(["analyze", str(model), "--calib", str(calib), "--csv"]) == 0
    assert capsys.readouterr().out.splitlines() == ["site,largest,channel", "norm:norm,30.5,7"]
    assert sorted(p.name for p in model.parent.iterdir()) == ["calib.npz", "tiny.onnx"]


def test_explain_shows_sites_skips_and_kernels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps(record()))
    assert cli.main(["explain", str(tmp_path)]) == 0
    whole = capsys.readouterr().out
    for words in (
        "equal to 3.1e-07",
        "encoder.layer.5.output.LayerNorm",
        "share the <bias>",
        "kept float by",
    ):
        assert words in whole, words
    assert cli.main(["explain", str(tmp_path), "layer.1.*"]) == 0
    some = capsys.readouterr().out
    assert "layer.1.dense" in some and "encoder.layer.5" not in some and "layer.0.dense" not in some


def test_verify_holds_for_what_was_just_compiled(
    out: Path, model: Path, calib: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert cli.main(["verify", str(out), "--model", str(model), "--calib", str(calib)]) == 0
    rows = {line.split()[0]: line.split()[1] for line in capsys.readouterr().out.splitlines()}
    assert rows == dict.fromkeys(("files", "interface", "runs", "original", "outputs", "kernels"), "ok")


def test_a_processor_whose_kernels_saturate_is_told_by_compile_and_verify(
    model: Path, calib: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "lacks_vnni", lambda: True)
    assert cli.main([str(model), "--calib", str(calib), "-o", "out"]) == 0
    assert "has no VNNI" in capsys.readouterr().err
    assert cli.main(["verify", "out", "--calib", str(calib)]) == 0
    assert "has no VNNI" in capsys.readouterr().err


def test_verify_fails_with_exit_code_1_for_a_changed_file(
    out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (out / "model.onnx").open("ab") as file:
        file.write(b"\0")
    capsys.readouterr()
    assert cli.main(["verify", str(out)]) == 1
    shown = capsys.readouterr()
    assert "model.onnx is not the file that was written" in shown.out
    assert "verification of" in shown.err


def test_verify_fails_for_another_original(
    out: Path, model: Path, calib: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.surface.plain import write_model

    other = write_model(model.parent / "other.onnx", scale=2.0)
    assert cli.main(["verify", str(out), "--model", str(other), "--calib", str(calib)]) == 1
    shown = capsys.readouterr().out
    assert "is not the model that was compiled" in shown and "outputs" in shown


def test_bench_takes_turns_and_shows_the_bound(
    out: Path, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qcompile.roofline.BUDGET_S", 0.01)
    capsys.readouterr()
    assert cli.main(["bench", str(out), "--against", str(model), "--seq", "8", "--rounds", "3"]) == 0
    shown = capsys.readouterr().out
    assert "original" in shown and "compiled" in shown
    assert "bound, float32 linears" in shown and "bound, int8 linears" in shown


def test_the_package_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "qcompile", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("qcompile")
