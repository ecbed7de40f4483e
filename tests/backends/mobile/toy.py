"""A program as the translator writes them, small enough to compile in a second: an embedding, a product, positions."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import relax, s_tir, te, tirx

Array = np.ndarray
INPUTS, OUTPUTS = ["ids"], ["scores", "positions", "embedded"]
WIDTH, ROWS = 16, 32


def module() -> tuple[Any, dict[str, Array]]:
    """The Relax module, and its parameters."""
    batch, length = tirx.Var("batch", "int64"), tirx.Var("length", "int64")
    builder = relax.BlockBuilder()
    ids = relax.Var("ids", relax.TensorType((batch, length), "int64"))
    table = relax.Var("table", relax.TensorType((ROWS, WIDTH), "int8"))
    weight = relax.Var("weight", relax.TensorType((WIDTH, ROWS), "uint8"))
    with builder.function("main", [ids, table, weight]):
        kernels = [builder.add_func(kernel, name) for name, kernel in _kernels().items()]
        kinds = [
            relax.TensorType((batch, length, WIDTH), "float32"),
            relax.TensorType((batch * length, ROWS), "int32"),
            relax.TensorType((length,), "int32"),
        ]
        embedded = builder.emit(relax.call_tir(kernels[0], [ids, table], kinds[0]))
        rows = builder.emit(_reshape(embedded, [batch * length, WIDTH], "float32"))
        flat = builder.emit(relax.call_tir(kernels[1], [rows, weight], kinds[1]))
        scores = builder.emit(_reshape(flat, [batch, length, ROWS], "int32"))
        positions = builder.emit(relax.call_tir(kernels[2], [length], kinds[2]))
        builder.emit_func_output(relax.Tuple([scores, positions, embedded]))
    return builder.get(), parameters()


def parameters() -> dict[str, Array]:
    """A table of bytes, and the same transposed and moved up by 128."""
    generator = np.random.default_rng(0)
    table = generator.integers(-8, 8, (ROWS, WIDTH)).astype(np.int8)
    return {"table": table, "weight": (table.T.astype(np.int16) + 128).astype(np.uint8, order="C")}


def expected(ids: Array) -> dict[str, Array]:
    """What the program computes, in NumPy."""
    held = parameters()
    embedded = np.abs(held["table"][ids].astype(np.float32))
    scores = np.rint(4 * embedded).astype(np.int32) @ held["table"].T.astype(np.int32)
    return {"scores": scores, "positions": 3 * np.arange(ids.shape[1], dtype=np.int32), "embedded": embedded}


def _kernels() -> dict[str, Any]:
    batch, length, rows = (tirx.Var(name, "int64") for name in ("batch", "length", "rows"))
    ids, table = te.placeholder((batch, length), "int64"), te.placeholder((ROWS, WIDTH), "int8")
    embedded = te.compute((batch, length, WIDTH), lambda i, j, k: te.abs(table[ids[i, j], k].astype("float32")))
    x, weight = te.placeholder((rows, WIDTH), "float32"), te.placeholder((WIDTH, ROWS), "uint8")
    k = te.reduce_axis((0, WIDTH))
    whole = te.compute((rows, WIDTH), lambda i, j: te.round(x[i, j] * 4).astype("int32"))
    scores = te.compute((rows, ROWS), lambda i, j: te.sum(whole[i, k] * (weight[k, j].astype("int32") - 128), axis=k))
    count = tirx.Var("count", "int64")
    positions = te.compute((count,), lambda i: (i * 3).astype("int32"))
    made = {
        "embed": te.create_prim_func([ids, table, embedded], "int64"),
        "product": te.create_prim_func([x, weight, scores], "int64"),
        "positions": te.create_prim_func([count, positions], "int64"),
    }
    return {name: s_tir.renew_defs(kernel).without_attr("global_symbol") for name, kernel in made.items()}


def _reshape(x: Any, shape: list[Any], dtype: str) -> Any:
    kind = relax.TensorType(shape, dtype)
    return relax.Call(relax.ExternFunc("vm.builtin.reshape"), [x, relax.ShapeExpr(shape)], ty_args=[kind])
