"""Plans: read from Relax, run here, and run by the package's own loader."""

from __future__ import annotations

import functools
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tvm")

from qcompile.backends.mobile import kernels
from qcompile.backends.mobile import plan as plans
from qcompile.backends.mobile.extract import extract
from qcompile.backends.mobile.host import Host
from qcompile.backends.mobile.link import ANDROID, LINUX
from qcompile.backends.mobile.plan import ALIGNMENT, Plan, encode, evaluate
from qcompile.errors import UserError
from tests.backends.mobile import native, toy

IDS = np.array([[1, 2, 3], [30, 31, 0]])
LONGEST = 5
BEYOND = {
    "the id 32, its table 32 rows": np.array([[1, 2], [toy.ROWS, 0]]),
    "the id -1, its table 32 rows": np.array([[0, -1]]),
    "6 tokens, but the program has 5 positions": np.zeros((1, LONGEST + 1), np.int64),
}
needs_compiler = pytest.mark.skipif(not native.has_compiler(), reason="there is no C compiler")


@functools.cache
def planned() -> tuple[Plan, Any]:
    module, parameters = toy.module()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plans, "LEAST", 0)
        plan = extract(module, parameters, toy.INPUTS, toy.OUTPUTS)
    plan.rows, plan.longest = {"ids": toy.ROWS}, LONGEST
    return plan, module


def write(folder: Path, triple: str = "x86_64-linux-gnu") -> list[str]:
    """The toy as a package for this machine; the arguments that run it."""
    plan, module = planned()
    (folder / "program.plan").write_bytes(encode(plan, triple, ""))
    (folder / "program.parameters").write_bytes(b"".join(plan.pieces()))
    kernels.write_library(module, plan.kernels, folder / "libprogram.so", LINUX["x86_64"])
    return [str(native.runner()), str(folder), str(folder / "libprogram.so")]


def test_a_plan_has_a_step_for_each_call_and_views_cost_nothing() -> None:
    plan, _ = planned()
    assert plan.kernels == ["embed", "product", "positions"]
    assert [step.kernel for step in plan.steps] == [0, 1, 2]
    places = [slot.place for slot in plan.slots]
    assert places.count("view") == 2
    assert places.count("temporary") == 3
    embedded, scores = dict(plan.outputs)["embedded"], dict(plan.outputs)["scores"]
    assert plan.slots[plan.root(scores)].last == len(plan.steps)
    assert plan.slots[embedded].first == 0
    assert all(place % ALIGNMENT == 0 for place in plan.parameters)


def test_a_table_that_is_also_a_matrix_is_in_the_file_once() -> None:
    plan, _ = planned()
    (held,) = plan.parameters.values()
    assert held.shape == (toy.ROWS, toy.WIDTH)
    derived = next(slot for slot in plan.slots if slot.place == "derived")
    assert (plan.slots[derived.source].place, derived.addend) == ("parameter", 128)
    assert plan.parameter_bytes == toy.ROWS * toy.WIDTH


def test_dims_are_computed_from_those_of_the_inputs() -> None:
    plan, _ = planned()
    flat = plan.slots[plan.root(dict(plan.outputs)["scores"])]
    assert [plan.values([(2, 3)])[dim] for dim in flat.dims] == [6, toy.ROWS]
    code = (("variable", 0), ("number", -3), ("*", 0), ("number", 4), ("//", 0))
    assert evaluate(code, [3]) == -3
    assert evaluate((*code[:-1], ("%", 0)), [3]) == 3


def test_a_plan_run_here_computes_what_numpy_does() -> None:
    plan, module = planned()
    host = Host(plan, module)
    for ids in (IDS, IDS[:1, :2]):
        results = host({"ids": ids})
        for name, array in toy.expected(ids).items():
            np.testing.assert_array_equal(results[name], array)


@needs_compiler
def test_the_loader_in_c_computes_the_same_bits_in_memory_that_it_may_use(tmp_path: Path) -> None:
    arguments = write(tmp_path)
    checked = native.runner("cc", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
    for number, ids in enumerate((IDS, IDS[:1, :2])):
        (tmp_path / str(number)).mkdir()
        inputs = native.write_inputs(tmp_path / str(number), [ids])
        for program in (arguments[0], str(checked)):
            done = subprocess.run([program, *arguments[1:], *inputs], capture_output=True, text=True, check=False)
            assert done.stderr == ""
            assert done.stdout == native.digests(toy.expected(ids))


@needs_compiler
def test_the_loader_says_what_is_wrong(tmp_path: Path) -> None:
    arguments = write(tmp_path)

    def error(*more: str) -> str:
        done = subprocess.run([*arguments, *more], capture_output=True, text=True, check=False)
        assert done.returncode != 0
        return done.stderr

    plan = (tmp_path / "program.plan").read_bytes()
    (tmp_path / "program.plan").write_bytes(encode(planned()[0], ANDROID["aarch64"].triple, ""))
    assert "is for aarch64-linux-android, and this is x86_64" in error()
    (tmp_path / "program.plan").write_bytes(plan[: len(plan) // 16 * 8])
    assert "is damaged" in error()
    (tmp_path / "program.plan").write_bytes(b"something")
    assert "is no plan of this version" in error()
    (tmp_path / "program.plan").write_bytes(plan)
    wrong = native.write_inputs(tmp_path, [IDS.reshape(-1)])
    assert "cannot read" in error(*wrong)
    weights = (tmp_path / "program.parameters").read_bytes()
    (tmp_path / "program.parameters").write_bytes(weights[:-100])
    assert "parameters is not the plan's" in error()


@needs_compiler
def test_the_loader_and_the_plan_run_here_refuse_what_is_beyond_the_tables(tmp_path: Path) -> None:
    program, *arguments = write(tmp_path)
    host = Host(*planned())
    for what, ids in BEYOND.items():
        inputs = native.write_inputs(tmp_path, [ids])
        done = subprocess.run([program, *arguments, *inputs], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (1, "", f"error: input 'ids' has {what}\n")
        with pytest.raises(UserError, match="input 'ids' has"):
            host({"ids": ids})


@needs_compiler
def test_no_cut_of_a_plan_reads_beyond_its_end(tmp_path: Path) -> None:
    arguments = write(tmp_path)
    checked = str(native.runner("cc", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"))
    plan = (tmp_path / "program.plan").read_bytes()
    for end in range(8, len(plan), 8 * 13):
        (tmp_path / "program.plan").write_bytes(plan[:end])
        done = subprocess.run([checked, *arguments[1:]], capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert done.stderr.startswith("error: ")
        assert "Sanitizer" not in done.stderr


def test_a_shape_that_does_not_fit_is_refused() -> None:
    plan, module = planned()
    with pytest.raises(UserError, match=r"'ids' has the shape"):
        Host(plan, module)({"ids": IDS[..., None]})
