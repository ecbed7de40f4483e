"""The target webgpu: WGSL that an implementation of WebGPU takes, its numbers, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("tvm", reason='TVM is not installed: pip install "qcompile-nn[tvm]"')

import qcompile
from qcompile.backends.base import open_session
from qcompile.backends.gpu.program import Session
from qcompile.backends.webgpu import narrow, wgsl
from qcompile.backends.webgpu.target import WebGpu
from qcompile.errors import UserError
from qcompile.models.architectures import cached_export
from tests.backends.gpu import small
from tests.backends.webgpu.device import OnWgpu
from tests.integer.programs import texts


def test_bytes_are_taken_out_of_words() -> None:
    text = (
        "@group(0) @binding(0) var<storage, read> x_ptr : array<i8>;\n"
        "@group(0) @binding(1) var<storage, read_write> y_ptr : array<u8>;\n"
        "@compute @workgroup_size(256, 1, 1)\nfn __cast(\n  y_ptr[i] = u8(x_ptr[(i + u32(u8(3)))]);\n"
    )
    found = wgsl.written(wgsl.Kernel("__cast", text), packed=[0])
    index = "(i + u32((u32(3) & 255u)))"
    read = f"(bitcast<i32>(x_ptr[u32({index}) >> 2u] << (24u - ((u32({index}) & 3u) * 8u))) >> 24u)"
    assert found.splitlines()[-1] == f"  y_ptr[i] = u32((u32({read}) & 255u));"
    assert "fn cast(" in found and "x_ptr : array<u32>" in found and "y_ptr : array<u32>" in found


def test_a_buffer_under_two_names_is_bound_once() -> None:
    bound = "@group(0) @binding({}) var<storage, {}> {} : array<f32>;\n"
    text = "".join(bound.format(*one) for one in ((0, "read", "x"), (1, "read", "r"), (2, "read_write", "r_1")))
    text += "@group(0) @binding(3) var<uniform> a : A;\nr_1[0] = r[0] + x[0];\n"
    found = wgsl.merged(wgsl.Kernel("k", text), {2: 1})
    assert [line[:60] for line in found.text.splitlines()] == [
        "@group(0) @binding(0) var<storage, read> x : array<f32>;",
        "@group(0) @binding(1) var<storage, read_write> r : array<f32",
        "@group(0) @binding(2) var<uniform> a : A;",
        "r[0] = r[0] + x[0];",
    ]


def test_a_small_program_gives_onnx_runtimes_bits(tmp_path: Path) -> None:
    folder = small.written(WebGpu(), tmp_path / "out")
    small.check(Session(folder, OnWgpu(folder)), tmp_path)


def test_it_is_called_source_and_cannot_be_opened(tmp_path: Path) -> None:
    webgpu = WebGpu()
    folder = small.written(webgpu, tmp_path / "out")
    facts = webgpu.facts(folder, [])
    assert "source only, neither compiled nor run" in facts["not_run"][0]
    assert sorted(facts["ship"])[:2] == ["program.json", "program.parameters"]
    with pytest.raises(UserError, match="source of a program for webgpu, which nothing here compiles or runs"):
        open_session(folder)


def test_integer_programs_are_refused_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="target webgpu cannot run int_only, which multiplies 64-bit") as caught:
        qcompile.compile(tmp_path / "none.onnx", recipe="w8a8_static", passes="os_plus,int_only", target="webgpu")
    assert "--target opencl, metal or cpu" in str(caught.value.hint)


def test_products_of_64_bits_are_refused_by_name() -> None:
    port = ir.Value(name="x", shape=ir.Shape([2]), type=ir.TensorType(ir.DataType.INT64))
    product = ir.Node("", "Mul", [port, port], name="layer.mul", num_outputs=1)
    product.outputs[0].type = port.type
    model = ir.Model(ir.Graph([port], product.outputs, nodes=[product], opset_imports={"": 21}), ir_version=10)
    with pytest.raises(UserError, match="Mul takes products of 64-bit integers, which WGSL does not have") as caught:
        narrow.narrow(model)
    assert "--target opencl or metal" in str(caught.value.hint)


@pytest.mark.slow
def test_a_decoder_of_packed_weights_is_as_close_as_its_sums(tmp_path: Path) -> None:
    path = cached_export("llama")
    options: dict[str, Any] = {"max_samples": 2, "max_length": 16}
    folder = tmp_path / "out"
    qcompile.compile(path, recipe="w4a16_g32", target="webgpu", output=folder, **options).close()
    given = {name: array.astype(np.int32) for name, array in texts(3, 9).items()}
    (found,) = Session(folder, OnWgpu(folder)).run(None, given)
    with qcompile.compile(path, recipe="w4a16_g32", **options) as cpu:
        expected = cpu.run(texts(3, 9))["logits"]
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.slow
def test_a_decoder_goes_on_from_its_cache(tmp_path: Path) -> None:
    """Positions begin behind the cache: a dim in 32 bits."""
    path, options = cached_export("llama", with_past=True), {"max_samples": 2, "max_length": 16}
    folder = tmp_path / "out"
    qcompile.compile(path, recipe="w4a16_g32", target="webgpu", output=folder, **options).close()  # type: ignore[arg-type]
    with qcompile.compile(path, recipe="w4a16_g32", output=tmp_path / "cpu", **options):  # type: ignore[arg-type]
        cpu = open_session(tmp_path / "cpu")
    sizes = {"batch": 2, "sequence": 3, "past_sequence": 4, "past_sequence + sequence": 7}
    generator, given = np.random.default_rng(0), {}
    for port in cpu.get_inputs():
        shape = [sizes.get(side, side) for side in port.shape]
        is_float = "float" in port.type
        given[port.name] = generator.normal(size=shape).astype(np.float32) if is_float else np.ones(shape, np.int64)
    narrow = {name: array.astype(np.int32) if array.dtype == np.int64 else array for name, array in given.items()}
    found = Session(folder, OnWgpu(folder)).run(None, narrow)
    for one, other in zip(found, cpu.run(None, given), strict=True):
        assert one.shape == other.shape and np.abs(one - other).max() <= 1e-5 * np.abs(other).max()
