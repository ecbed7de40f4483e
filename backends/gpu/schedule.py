"""GPU schedules: a thread for each element of a stage, blocks of 256 or fewer; for a sum or maximum of a row, a block.

elements  loops joined and cut into blocks; products that no kernel of ours takes add up inside a thread
rows      on CUDA a block for each result, its threads side by side along the row, then through shuffles
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import tirx
from tvm.s_tir import Schedule

from qcompile.backends.tvm.schedule import SPATIAL
from qcompile.backends.tvm.stages import ROW
from qcompile.backends.tvm.written import SCHEDULED

THREADS, LANES = 256, 32


def schedule(module: tvm.IRModule, *, rows: bool, threads: int = THREADS) -> tvm.IRModule:
    """``module`` with every PrimFunc bound to the threads of a GPU, ``threads`` to a block.

    rows: a block for each row that is added up
    """
    loops = {
        variable: _bound(function, rows, threads)
        for variable, function in module.functions.items()
        if isinstance(function, tirx.PrimFunc) and not (function.attrs and SCHEDULED in function.attrs)
    }
    found = {**module.functions, **loops}
    return tvm.IRModule(found, attrs=module.attrs)


def _bound(function: tirx.PrimFunc, rows: bool, most: int) -> tirx.PrimFunc:
    sch = Schedule(tvm.IRModule({"main": function.with_attr("global_symbol", "main")}))
    for block in sch.get_child_blocks(sch.get_sblock("root", "main")):
        loops = sch.get_loops(block)
        kinds = [variable.iter_type == SPATIAL for variable in sch.get(block).iter_vars]
        outer = [loop for loop, spatial in zip(loops, kinds, strict=True) if spatial]
        inner = [loop for loop, spatial in zip(loops, kinds, strict=True) if not spatial]
        if not outer:
            outer = [sch.add_unit_loop(loops[0] if loops else block)]
        sch.reorder(*outer, *inner)
        if rows and inner and _is_of_rows(sch, block, outer[-1]):
            _, lanes = sch.split(sch.fuse(*inner), [None, LANES])
            sch.bind(sch.fuse(*outer), "blockIdx.x")
            sch.bind(lanes, "threadIdx.x")
            continue
        blocks, threads = sch.split(sch.fuse(*outer), [None, most])
        sch.bind(blocks, "blockIdx.x")
        sch.bind(threads, "threadIdx.x")
        if inner:
            sch.decompose_reduction(block, inner[0])
    return sch.mod["main"].without_attr("global_symbol").with_attr(SCHEDULED, True)


def _is_of_rows(sch: Schedule, block: Any, last: Any) -> bool:
    """Whether what ``block`` adds up lies along rows of its own, as in a norm, and not in both sides of a product."""
    extent = sch.get(last).extent
    return sch.get(block).name_hint == ROW or (isinstance(extent, tirx.IntImm) and int(extent) == 1)
