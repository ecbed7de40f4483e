"""GPU schedules: a thread for each element of a stage, blocks of ``THREADS``; sums run inside of a thread.

No stage shares memory between threads, so what a kernel computes is the same in whatever order its threads run.
"""

from __future__ import annotations

import tvm
from tvm import tirx
from tvm.s_tir import Schedule

from qcompile.backends.tvm.schedule import SPATIAL
from qcompile.backends.tvm.written import SCHEDULED

THREADS = 256


def schedule(module: tvm.IRModule) -> tvm.IRModule:
    """``module`` with every PrimFunc bound to the threads of a GPU."""
    found = {
        variable: _bound(function) if isinstance(function, tirx.PrimFunc) else function
        for variable, function in module.functions.items()
    }
    return tvm.IRModule(found, attrs=module.attrs)


def _bound(function: tirx.PrimFunc) -> tirx.PrimFunc:
    sch = Schedule(tvm.IRModule({"main": function.with_attr("global_symbol", "main")}))
    for block in sch.get_child_blocks(sch.get_sblock("root", "main")):
        loops = sch.get_loops(block)
        kinds = [variable.iter_type == SPATIAL for variable in sch.get(block).iter_vars]
        outer = [loop for loop, spatial in zip(loops, kinds, strict=True) if spatial]
        inner = [loop for loop, spatial in zip(loops, kinds, strict=True) if not spatial]
        if not outer:
            outer = [sch.add_unit_loop(loops[0] if loops else block)]
        sch.reorder(*outer, *inner)
        blocks, threads = sch.split(sch.fuse(*outer), [None, THREADS])
        sch.bind(blocks, "blockIdx.x")
        sch.bind(threads, "threadIdx.x")
        if inner:
            sch.decompose_reduction(block, inner[0])
    return sch.mod["main"].without_attr("global_symbol").with_attr(SCHEDULED, True)
