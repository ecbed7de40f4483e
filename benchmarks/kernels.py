"""The kernels in TensorIR against ONNX Runtime's, in turns on one thread, with what the processor reaches at best.

    python -m benchmarks.kernels --out benchmarks/results/kernels

Each shape has float32 first. The bound of a kernel is the longer of two times: its bytes at the rate at which a loop
that only sums reads as many bytes, and its operations at the rate of a loop that only multiplies registers.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from onnx import TensorProto, helper, numpy_helper
from tvm.target import Target

from benchmarks import options
from benchmarks.results import Results
from benchmarks.speed import in_turns
from qcompile.backends.tvm import kernels
from qcompile.backends.tvm.kernels import limits
from qcompile.backends.tvm.kernels.program import compiled
from qcompile.calibration.runner import open_session

Run = Callable[[], Any]
MICROSOFT = "com.microsoft"
VNNI = {"kind": "llvm", "mattr": ["+avx512f", "+avx512bw", "+avx512dq", "+avx512vl", "+avx512vnni"]}
ORT, OURS = "ONNX Runtime", "TensorIR"


@dataclasses.dataclass(frozen=True)
class Case:
    """One line of a shape. ``peer``: the name of the line that it is compared with; ``operations``: of integers."""

    name: str
    run: Run
    peer: str = ""
    bytes_read: int = 0
    operations: float = 0.0


def onnx_product(op: str, inputs: dict[str, np.ndarray], x: np.ndarray, **attributes: Any) -> Run:
    """One node of ONNX Runtime: ``x`` at run time, ``inputs`` constant."""
    domain = MICROSOFT if op in ("MatMulNBits", "DynamicQuantizeMatMul") else ""
    node = helper.make_node(op, ["x", *inputs], ["y"], domain=domain, **attributes)
    result = TensorProto.INT32 if op == "MatMulInteger" else TensorProto.FLOAT
    graph = helper.make_graph(
        [node], "product",
        [helper.make_tensor_value_info("x", helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)],
        [helper.make_tensor_value_info("y", result, None)],
        [numpy_helper.from_array(array, name) for name, array in inputs.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = open_session(model.SerializeToString(), threads=1)
    return lambda: session.run(None, {"x": x})


def our_product(kernel: Any, target: Any, operands: Sequence[np.ndarray], shape: tuple[int, int], dtype: str) -> Run:
    call = compiled([kernel], target)[str(kernel.attrs["global_symbol"])]
    held = [tvm.runtime.tensor(operand) for operand in operands]
    y = tvm.runtime.empty(shape, dtype)
    return lambda: call(*held, y)


@dataclasses.dataclass(frozen=True)
class Shape:
    """x (m, k) times W (k, n)."""

    m: int
    k: int
    n: int

    def __str__(self) -> str:
        return f"{self.m}x{self.k}x{self.n}"

    @property
    def operations(self) -> float:
        return 2.0 * self.m * self.k * self.n


def drawn() -> np.random.Generator:
    return np.random.default_rng(0)


def float_case(shape: Shape) -> Case:
    x = drawn().standard_normal((shape.m, shape.k)).astype(np.float32)
    w = drawn().standard_normal((shape.k, shape.n)).astype(np.float32)
    return Case("float32, ONNX Runtime", onnx_product("MatMul", {"w": w}, x), bytes_read=w.nbytes)


def low_bit_cases(shape: Shape, settings: Sequence[tuple[int, int]]) -> list[Case]:
    """(bits, group): ONNX Runtime's level 4 where it has those bits, ours rounded the same way, and ours in float32."""
    x = drawn().standard_normal((shape.m, shape.k)).astype(np.float32)
    cases, target = [], kernels.host_target()
    for bits, group in settings:
        codes = drawn().integers(0, 2**bits, (shape.k, shape.n)).astype(np.uint8)
        scale = drawn().uniform(0.01, 0.1, (shape.k // group, shape.n)).astype(np.float32)
        named, peer = f"{bits} bits, groups of {group}", ""
        if bits != 3:
            peer = f"{named}, x in 8 bits, {ORT}"
            blobs = drawn().integers(0, 256, (shape.n, shape.k // group, group * bits // 8)).astype(np.uint8)
            inputs: dict[str, np.ndarray] = {"w": blobs, "scale": np.ascontiguousarray(scale.T)}
            about = {"K": shape.k, "N": shape.n, "bits": bits, "block_size": group, "accuracy_level": 4}
            run = onnx_product("MatMulNBits", inputs, x, **about)
            cases.append(Case(peer, run, bytes_read=blobs.nbytes + scale.nbytes, operations=shape.operations))
        packed = kernels.pack_nbits(codes, scale, None, bits, group)
        size, result = sum(one.nbytes for one in packed), (shape.m, shape.n)
        for kind, name in ((kernels.matmul_nbits_int8, "x in 8 bits"), (kernels.matmul_nbits, "x in float32")):
            kernel = kind(shape.k, shape.n, bits, group, target, zero_points=False)
            run = our_product(kernel, target, (x, *packed), result, "float32")
            rounded = kind is kernels.matmul_nbits_int8
            work = shape.operations if rounded else 0.0
            cases.append(Case(f"{named}, {name}, {OURS}", run, peer if rounded else "", size, work))
    return cases


def integer_cases(shape: Shape) -> list[Case]:
    x = drawn().integers(0, 256, (shape.m, shape.k)).astype(np.uint8)
    w = drawn().integers(-127, 128, (shape.k, shape.n)).astype(np.int8)
    peer = f"int8, MatMulInteger, {ORT}"
    about: dict[str, Any] = {"bytes_read": w.nbytes, "operations": shape.operations}
    cases = [Case(peer, onnx_product("MatMulInteger", {"w": w}, x), **about)]
    floats = drawn().standard_normal((shape.m, shape.k)).astype(np.float32)
    dynamic: dict[str, np.ndarray] = {"w": w, "scale": np.ones(shape.n, np.float32)}
    run = onnx_product("DynamicQuantizeMatMul", dynamic, floats)
    cases.append(Case(f"int8, DynamicQuantizeMatMul, {ORT}", run, **about))
    host = kernels.host_target()
    targets = [host] + ([Target(VNNI)] if kernels.features(host).unit == "amx" else [])
    for target in targets:
        kernel = kernels.matmul_integer(shape.k, shape.n, "uint8", target)
        run = our_product(kernel, target, (x, kernels.pack_integer(w)), (shape.m, shape.n), "int32")
        cases.append(Case(f"int8, {kernels.features(target).unit.upper()}, {OURS}", run, peer, **about))
    return cases


SHAPES: dict[Shape, Callable[[Shape], list[Case]]] = {
    Shape(1, 4096, 4096): lambda s: low_bit_cases(s, ((4, 32), (4, 128), (3, 128), (2, 64), (8, 128))),
    Shape(16, 4096, 4096): lambda s: low_bit_cases(s, ((4, 32), (4, 128))),
    Shape(128, 768, 3072): lambda s: [*integer_cases(s), *low_bit_cases(s, ((4, 32), (4, 128)))],
    Shape(1, 768, 3072): integer_cases,
}


def bounds(shape: Shape, rounds: int) -> Callable[[Case], float]:
    """Milliseconds that the processor needs at least for a case."""
    host = kernels.host_target()
    kernel, operations = limits.multiplying(kernels.features(host))
    seed = np.zeros((1, 16), np.int32)
    (wall, _), = in_turns([our_product(kernel, host, (seed,), (1, 16), "int32")], rounds)
    rate, reads = operations / min(wall), {}

    def bound(case: Case) -> float:
        size = case.bytes_read // 4096 * 4096
        if size not in reads:
            data = np.zeros((size // 64, 16), np.int32)
            (found, _), = in_turns([our_product(limits.reading(size), host, (data,), (1, 16), "int32")], rounds)
            reads[size] = min(found)
        return float(max(reads[size], case.operations / rate))

    return bound


def measured(shape: Shape, rounds: int) -> dict[str, Any]:
    cases = [float_case(shape), *SHAPES[shape](shape)]
    bound = bounds(shape, rounds)
    times = in_turns([case.run for case in cases], rounds)
    lines = [
        {"name": case.name, "peer": case.peer, "min_ms": min(wall), "median_ms": float(np.median(wall)),
         "cpu_ms": float(np.median(cpu)), "bound_ms": bound(case) if case.bytes_read else None}
        for case, (wall, cpu) in zip(cases, times, strict=True)
    ]  # fmt: skip
    lines[0]["bound_ms"] = None  # the bound counts integer operations
    return {"key": str(shape), "shape": str(shape), "lines": lines, "rounds": rounds, "load": options.load()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=100, metavar="N", help="default 100")
    parser.add_argument("--shapes", metavar="MxKxN,...", help=f"default {','.join(map(str, SHAPES))}")
    parser.add_argument("--out", required=True, type=Path, metavar="NAME", help="NAME.json and NAME.md; rows are added")
    given = parser.parse_args(arguments)
    wanted = set((given.shapes or ",".join(map(str, SHAPES))).split(","))
    command = f"python -m benchmarks.kernels --out {given.out}"
    results = Results(given.out, "kernels", model="kernels", threads=1, command=command)
    for shape in SHAPES:
        if str(shape) in wanted:
            results.add(measured(shape, given.rounds))
    print(results.markdown())


if __name__ == "__main__":
    main()
