"""Jobs are measured one by one, and their results become tables."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import accuracy, jobs, outputs, summary, tables
from benchmarks.options import Wanted
from benchmarks.results import Results


def measured(name: str, **changes: Any) -> dict[str, Any]:
    scored = jobs.Finished({"value": 82.128, "kernels": {"MatMul": 2}, "file_mb": 23.06}, 1.0, 100.0)
    return accuracy.row(name, "128 samples", jobs.Finished({}, 12.4, 440.4), scored) | changes


def accuracy_table(path: Path, **about: Any) -> Results:
    settings: dict[str, Any] = {
        "model": "minilm",
        "metric": "score",
        "digits": 2,
        "limit": None,
        "command": "run",
    }
    return Results(path, "accuracy", **settings | about)


@pytest.mark.parametrize(
    ("text", "name", "passes", "drop"),
    [
        ("w8a8", "`w8a8`", None, None),
        ("w8a8:none", "`w8a8`, no transform", "", None),
        (
            "w6a6_static:os_plus+other@0.15",
            "`w6a6_static`, os_plus,other, --max-drop 0.15",
            "os_plus,other",
            0.15,
        ),
        ("w8a8:int_only=cpu{kernels=1}", "`w8a8`, int_only, `cpu{kernels=1}`", "int_only", None),
        ("w4a4:rotate{online=1}=cpu", "`w4a4`, rotate{online=1}", "rotate{online=1}", None),
    ],
)
def test_a_row_is_spelled_in_one_word(text: str, name: str, passes: str | None, drop: float | None) -> None:
    wanted = Wanted.parse(text)
    assert (wanted.name, wanted.passes, wanted.max_drop) == (name, passes, drop)


def test_a_job_gives_its_result_or_the_last_line_of_its_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "jobs.py").write_text(
        "import sys\n"
        "if sys.argv[1] == 'bad': raise SystemExit(f'no file {sys.executable} here\\n  hint: look')\n"
        'open(sys.argv[3], \'w\').write(\'{"result": {"done": 1}, "peak_mb": 9}\')\n'
    )
    monkeypatch.setattr(jobs, "ROOT", tmp_path)
    finished = jobs.run_job("good", size=1)
    assert (finished.result, finished.peak_mb, finished.error) == ({"done": 1}, 9, "")
    assert 0 < finished.cpu_seconds < 5
    failed = jobs.run_job("bad")
    assert failed.peak_mb is None
    assert failed.error == f"no file {Path(sys.executable).name} here"


def test_the_peak_is_of_this_process_and_not_of_the_one_that_started_it() -> None:
    held = np.ones(40 * 10**6)  # 320 MB
    code = "from benchmarks.jobs import peak_mb; print(peak_mb())"
    child = subprocess.run([sys.executable, "-c", code], cwd=jobs.ROOT, stdout=subprocess.PIPE, check=True)
    assert jobs.peak_mb() > held.nbytes / 1e6 > float(child.stdout)


def test_a_second_run_replaces_its_own_row_only(tmp_path: Path) -> None:
    path = tmp_path / "new" / "minilm_accuracy"
    first = accuracy_table(path)
    first.add(measured("one"))
    first.add(measured("two"))
    accuracy_table(path).add(measured("one", value=80.0))
    lines = path.with_suffix(".md").read_text().splitlines()
    assert lines[2] == "| one | 128 samples | 80.00 | 12 | 440 | 23.1 | 2 MatMul |  |"
    assert lines[3].startswith("| two | 128 samples | 82.13 |")
    assert tables.all_results(path.parent).startswith("### MiniLM (all-MiniLM-L6-v2): accuracy")


def test_a_trial_does_not_mix_with_results_and_says_so(tmp_path: Path) -> None:
    accuracy_table(tmp_path / "a").add(measured("whole"))
    trial = accuracy_table(tmp_path / "a", limit=4)
    trial.add(measured("part"))
    assert "whole" not in trial.markdown()
    assert "Not the protocol" in trial.markdown()


def test_exceptions_and_failures_are_in_the_table(tmp_path: Path) -> None:
    results = accuracy_table(tmp_path / "a")
    compiled = {
        "linears": {
            "layer.0.down": {"activations": "uint8 per_token symmetric dynamic", "low_bit": True},
            "layer.0.up": {"activations": "uint8 per_tensor asymmetric static mse", "low_bit": True},
            "layer.0.gate": {"activations": "uint8 per_tensor asymmetric static mse", "low_bit": False},
            "lm_head": {"activations": "uint8 per_tensor asymmetric static mse", "low_bit": True},
        },
        "gate": {"exceptions": {"v9": "per token"}, "linears": {"v9": ["layer.3.down", "layer.0.down", "head"]}},
    }
    results.add(measured("gated") | accuracy.linears(compiled, "lm_head"))
    results.add(measured("broken", error="it | fell", value=None))
    text = results.markdown()
    assert "| 1 / 3 |" in text
    assert "Exceptions of gated (128 samples): per token: `layer.*.down` of 0, 3, `head`." in text
    assert r"no result: it \| fell" in text


def test_ours_stand_below_what_is_known_of_the_same_setting(tmp_path: Path) -> None:
    found = accuracy_table(tmp_path / "t")
    for row in (
        measured("`w4a4`, os_plus"), measured("`w4a4`, rotate,gptq"), measured("`w4a4`, os_plus", key="b", value=1.0),
        measured("`w7a7`, os_plus"), measured("`w4a4`, awq", error="no memory"), measured("float export"),
    ):  # fmt: skip
        found.add(row)
    lines = summary.methods(found.as_dict()).splitlines()
    assert lines[0] == "### MiniLM (all-MiniLM-L6-v2): score, float 82.13"
    assert lines[2] == "|  | `w8a8_static` | `w7a7` | `w6a6_static` | `w4a4` | `w4a4_static` |"
    assert "| *RTN* | 81.80 |  | 80.37 | 80.14 | 77.62 |" in lines
    assert lines[-2:] == ["| `os_plus` |  | **82.13** |  | **82.13** |  |", "| `rotate,gptq` |  |  |  | **82.13** |  |"]


def test_a_program_timed_twice_is_listed_once(tmp_path: Path) -> None:
    base = {"name": "float export", "min_ms": 4.0, "median_ms": 5.0}
    program = {"name": "x", "min_ms": 2.0, "median_ms": 3.0}
    timed = {"kind": "speed", "model": "minilm", "rows": [{"batch": 1, "tokens": 8, "programs": [base, program]}]}
    for name in ("a", "b"):
        (tmp_path / f"{name}.json").write_text(json.dumps(timed))
    assert summary.summary(tmp_path).count("| MiniLM, 1 x 8 | x | 2.00 | 1.67 |") == 1


def test_ratios_are_of_the_float_export() -> None:
    programs = [
        {"name": "float export", "min_ms": 10.0, "median_ms": 12.0, "cpu_ms": 9.0},
        {"name": "int8", "min_ms": 4.0, "median_ms": 6.0, "cpu_ms": 3.0},
    ]
    row = {"batch": 1, "tokens": 8, "rounds": 3, "load": 0.5, "programs": programs}
    text = tables.speed({"threads": 1, "rows": [row | {"bounds": [{"name": "bound", "ms": 2.0}]}]})
    assert "| int8 | 4.00 | 6.00 | 3.00 | 2.50 | 2.00 | 3.00 |" in text
    assert "| bound | 2.00 |  |  | 5.00 |  |  |" in text


def test_growth_is_between_few_and_many_samples() -> None:
    row = {"name": "mse", "error": "", "cpu_seconds": [10.0, 20.0], "peak_mb": [400.0, 430.0]}
    assert "| mse | 10 | 20 | 400 | 430 | +7.5 % |" in tables.cost({"samples": [32, 256], "rows": [row]})


def test_an_operator_without_a_time_has_an_error_only() -> None:
    row = {"operator": "softmax", "variant": "DI-Exp", "max_error": 0.034, "ms": None, "float_ms": None}
    timed = row | {"variant": "table", "max_error": 1e-4, "ms": 3.0, "float_ms": 2.0}
    row |= {"rounds": 5, "load": 0.5}
    text = tables.integer_operators({"threads": 1, "rows": [row, timed]})
    assert "| softmax | DI-Exp | 0.034 |  |  |  |" in text
    assert "| softmax | table | 0.0001 | 3.00 | 2.00 | 1.5 |" in text and "5 rounds in turns, 1 thread" in text


def test_programs_of_targets_stand_beside_the_cpu_program() -> None:
    logits = np.array([[1.0, 3.0], [2.0, 0.0], [0.5, 0.0]])
    moved = logits + np.array([[0.0, 0.25], [-4.0, 0.0], [0.0, 0.0]])
    compared = {
        "prefill": outputs.difference([logits[:2], logits[2:]], [moved[:2], moved[2:]]),
        "decode": outputs.difference([logits], [logits]),
    }
    row: dict[str, Any] = {
        "model": "smollm2", "name": "`w4a8`", "target": "llvm", "seconds": 80.4, "cpu_seconds": 120.0,
        "peak_mb": 1500.0, "load": 0.5, "error": "", "mb": 90.0, "low_bit": 1,
        "kernels": {"matmul_w4a8": 1, "Attention": 1}, "compared": compared,
    }  # fmt: skip
    failed = row | {"target": "ios", "error": "no linker", "compared": {}, "seconds": None, "peak_mb": None}
    del failed["mb"]
    elsewhere = row | {"target": "cuda", "error": "no GPU", "compared": {}, "run": ["as LLVM"], "sqnr_db": [23.8, 24.1]}
    text = tables.targets({"samples": 8, "context": 4, "tokens": 2, "rows": [row, failed, elsewhere]})
    assert "| not run here; as LLVM: 23.8 dB from the float model, `cpu` 24.1 |" in text
    assert "| 80 | 120 | 1,500 | 90.0 | 1 / 2 | 1 matmul_w4a8, 1 Attention |" in text
    assert "| prefill: 4 / 3, 66.7 %; decode: the same bits |" in text
    assert "| `ios` |  | 120 |  |  |  |  | no result: no linker |" in text


def test_scores_of_two_machines_share_a_table_and_say_so_but_times_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "render", lambda result: "")
    found = {}
    for kind in ("accuracy", "decode"):
        for machine, keys in (("first", "abc"), ("second", "bd")):
            monkeypatch.setattr("benchmarks.results.machine", lambda machine=machine: machine)
            held = Results(tmp_path / kind, kind, command="run")
            for key in keys:
                held.add({"key": key})
        found[kind] = {row["key"]: row["machine"] for row in held.as_dict()["rows"]}
    assert found["accuracy"] == {"a": "first", "b": "second", "c": "first", "d": "second"}
    assert found["decode"] == {"b": "second", "d": "second"}
    monkeypatch.undo()
    rows = [measured(key) | {"command": "run", "machine": where} for key, where in found["accuracy"].items()]
    about = {"kind": "accuracy", "metric": "score", "digits": 2, "limit": None, "machine": "second", "versions": {}}
    assert "rows 1, 3: first; rows 2, 4: second; . `run`" in tables.render(about | {"rows": rows})
