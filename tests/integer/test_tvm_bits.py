"""An integer-only program gives in TVM the bits that it gives in ONNX Runtime, and where every operator is NumPy's."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
import onnx_ir as ir
import pytest
import tvm

import qcompile
from qcompile.backends.tvm import package
from qcompile.backends.tvm.program import Session
from qcompile.models.architectures import cached_export
from tests.emulated.digests import digest, outputs
from tests.integer.programs import Array, expose, in_numpy, texts
from tests.integer.programs import compiled as on_cpu

programs = pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("bert", "w8a8_static"),
        pytest.param("llama", "w8a8", marks=pytest.mark.slow),
        pytest.param("gpt2", "w8a8_static", marks=pytest.mark.slow),
    ],
)


@functools.cache
def compiled(name: str, recipe: str) -> tuple[Path, Session]:
    """The program as ONNX, its integers exposed, and the same in TVM."""
    folder = Path(tempfile.mkdtemp(prefix="tvm-bits"))
    with qcompile.compile(
        cached_export(name), recipe=recipe, passes="os_plus,int_only", max_samples=8, max_length=24, dump=folder
    ):
        (dumped,) = folder.glob("*-int_only.onnx")
    exposed = expose(onnx.load(dumped))
    path = folder / "exposed.onnx"
    onnx.save(exposed, path)
    made = folder / "tvm"
    made.mkdir()
    package.write(ir.load(path), made, tvm.target.Target("llvm"))
    return path, Session(made, threads=1)


def in_tvm(session: Session, feeds: dict[str, Array]) -> dict[str, Array]:
    names = [port.name for port in session.get_outputs()]
    known = {port.name for port in session.get_inputs()}
    return dict(zip(names, session.run(names, {k: v for k, v in feeds.items() if k in known}), strict=True))


def same(found: dict[str, Array], expected: dict[str, Array]) -> None:
    """Every output, integers and floats, by its digest."""
    assert found.keys() == expected.keys()
    assert {array.dtype.name for array in expected.values()} == {"float32", "int32"}
    for name, array in expected.items():
        assert digest([found[name]]) == digest([array]), name


def padded(rows: int, length: int, count: int) -> dict[str, Array]:
    feeds = {name: np.pad(array, ((0, 0), (0, count))) for name, array in texts(rows, length).items()}
    feeds["attention_mask"][rows - 1, length // 2 :] = 0
    return feeds


@programs
@pytest.mark.parametrize(("rows", "length", "count"), [(1, 1, 0), (1, 17, 0), (4, 11, 0), (1, 9, 7), (4, 9, 7)])
def test_batches_and_padding(name: str, recipe: str, rows: int, length: int, count: int) -> None:
    path, session = compiled(name, recipe)
    feeds = padded(rows, length, count) if count else texts(rows, length)
    same(in_tvm(session, feeds), outputs(path, feeds))


@programs
def test_where_every_operator_is_that_of_numpy(name: str, recipe: str) -> None:
    path, session = compiled(name, recipe)
    feeds = padded(2, 9, 3)
    written_out = path.with_name("written_out.onnx")  # the evaluator does not find functions inside of functions
    onnx.save(onnx.inliner.inline_local_functions(onnx.load(path)), written_out)
    same(in_tvm(session, feeds), in_numpy(written_out, feeds))


def test_on_the_kernels_of_this_processor(tmp_path: Path) -> None:
    """``compiled`` uses loops that any processor has; this is what a user gets here."""
    with qcompile.compile(
        cached_export("bert"), recipe="w8a8_static", passes="os_plus,int_only", target="llvm", max_samples=8,
        max_length=24, output=tmp_path / "out",
    ) as made:  # fmt: skip
        kernels = {kernel["kernel"] for kernel in made.manifest["kernels"]}
        for rows, length in ((1, 1), (1, 17), (3, 9)):
            feeds = texts(rows, length)
            expected = on_cpu("bert", "w8a8_static").run(feeds)
            for name, array in made.run(feeds).items():
                assert digest([array]) == digest([expected[name]]), (name, rows, length)
    assert kernels & {"matmul_integer", "integer_linear"}
