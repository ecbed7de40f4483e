"""The same products as plain loops in TensorIR, for TVM's own schedules (GPUs): no intrinsic of a processor.

They read the layouts of ``packing``. ``scheduled`` binds their loops to a GPU's threads.
"""

from __future__ import annotations

from typing import Any

from tvm import te, tirx
from tvm.script import tirx as T

from qcompile.backends.tvm.kernels.packing import CodeLayout, integer_shape


def matmul_integer(k: int, n: int, x_dtype: str, symbol: str) -> Any:
    """x (M, K), packed W, y (M, N) int32."""
    shape = integer_shape(k, n)

    @T.prim_func(s_tir=True)  # type: ignore[untyped-decorator]
    def product(x_handle: T.handle, w: T.Buffer(shape, "int8"), y_handle: T.handle) -> None:  # type: ignore[valid-type]
        T.func_attr({"tirx.noalias": True})
        m = T.int64()
        x = T.match_buffer(x_handle, (m, k), x_dtype)
        y = T.match_buffer(y_handle, (m, n), "int32")
        for i, j, q in T.grid(m, n, k):
            with T.sblock("product"):
                row, column, inner = T.axis.remap("SSR", [i, j, q])
                with T.init():
                    y[row, column] = T.int32(0)
                y[row, column] = y[row, column] + T.Cast("int32", x[row, inner]) * T.Cast(
                    "int32", w[column // 16, inner // 4, column % 16, inner % 4]
                )

    return product.with_attr("global_symbol", symbol)


def matmul_nbits(layout: CodeLayout, middle: int | None, symbol: str) -> Any:
    """x (M, K) float32, packed codes, scales[, zero points], y (M, N) float32; W is expanded where it is read."""
    m, k, n = tirx.Var("m", "int64"), tirx.const(layout.depth, "int64"), tirx.const(layout.columns, "int64")
    x = te.placeholder((m, k), "float32", "x")
    w = te.placeholder(layout.shape, "uint8", "w")
    scale, zero = (
        te.placeholder(layout.scale_shape, dtype, name) for name, dtype in (("scale", "float32"), ("zero", "uint8"))
    )
    inner = te.reduce_axis((0, k), "q")

    def element(row: Any, column: Any) -> Any:
        at = column // 16, inner.var // layout.group, column % 16
        less = T.Cast("int32", zero(*at)) if middle is None else middle
        moved = T.Cast("float32", code_at(w, layout, column, inner.var) - less)
        return te.sum(x(row, inner.var) * (moved * scale(*at)), axis=inner)

    y = te.compute((m, n), element, "product")
    return te.create_prim_func([x, w, scale, *([zero] if middle is None else []), y]).with_attr("global_symbol", symbol)


def code_at(w: Any, layout: CodeLayout, column: Any, row: Any) -> Any:
    """The code of (row, column), int32."""
    panel, lane, place, bits = column // 16, column % 16, row % 4, layout.bits
    if bits == 3:
        first = row // 32 * 3
        low = T.Cast("int32", w[panel, first + row % 32 // 16, lane, place])
        high = T.Cast("int32", w[panel, first + 2, lane, place])
        return (T.shift_right(low, row % 16 // 4 * 2) & 3) | (T.shift_right(high, row % 32 // 4) & 1) << 2
    held = T.Cast("int32", w[panel, row // layout.rows, lane, place])
    return T.shift_right(held, row % layout.rows // 4 * bits) & (2**bits - 1)


def scheduled(module: Any, target: Any) -> Any:
    """``module`` with the loops of these functions bound to the threads of a GPU."""
    from tvm.s_tir import dlight

    rules = (dlight.gpu.GEMV(), dlight.gpu.Reduction(), dlight.gpu.GeneralReduction(), dlight.gpu.Fallback())
    with target:
        return dlight.ApplyDefaultSchedule(*rules)(module)
