"""CPU schedules of the kernels that the translator writes.

tiles        each tile in registers: k outside, rows unrolled, a vector of columns inside
lanes        a reduction of floats: k outside, a vector of its lanes in a register
other loops  the outer ones joined and spread over the threads; LLVM makes vectors of the innermost
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import tirx
from tvm.s_tir import Schedule

from qcompile.backends.tvm.stages import IN_LANES, TAIL
from qcompile.backends.tvm.tiles import PRODUCT
from qcompile.backends.tvm.written import SCHEDULED

SLOW = "s_tir.CompactBufferAllocation"  # minutes on long integer kernels, which hold no buffers to shrink
SPATIAL = 0  # the type of a block variable that is no reduction
RUNS = (64, 32, 16)


def schedule(module: tvm.IRModule) -> tvm.IRModule:
    """``module`` with every PrimFunc that has no schedule yet scheduled."""
    found = {}
    for variable, function in module.functions.items():
        if isinstance(function, tirx.PrimFunc) and not (function.attrs and SCHEDULED in function.attrs):
            function = _scheduled(function)
        found[variable] = function
    return tvm.IRModule(found, attrs=module.attrs)


def _scheduled(function: tirx.PrimFunc) -> tirx.PrimFunc:
    sch = Schedule(tvm.IRModule({"main": function.with_attr("global_symbol", "main")}))
    tiled = False
    root = sch.get_sblock("root", "main")
    for block in sch.get_child_blocks(root):
        name = sch.get(block).name_hint
        if name == PRODUCT:
            _tile(sch, block)
            tiled = True
        elif name.startswith(IN_LANES):
            _in_lanes(sch, block)
            tiled = True
        else:
            _spread(sch, block)
            if name.startswith(TAIL):  # of no elements too, whose result must be set
                sch.decompose_reduction(block, sch.get_loops(block)[-1])
    done = _compact(sch.mod) if tiled else sch.mod
    return done["main"].without_attr("global_symbol").with_attr(SCHEDULED, True)


def _compact(module: tvm.IRModule) -> tvm.IRModule:
    """Shrink the registers' buffers to a tile."""
    passes = tvm.s_tir.transform
    steps = [
        passes.LowerInitBlock(),
        passes.PlanAndUpdateBufferAllocationLocation(),
        passes.ConvertBlocksToOpaque(),
        passes.CompactBufferAllocation(),
    ]
    return tvm.transform.Sequential(steps)(module)


def _tile(sch: Schedule, block: Any) -> None:
    """Loops (*batch, block, strip, row, lane, k) -> parallel(batch, block, strip), k, row, lane."""
    *outer, row, lane, k = sch.get_loops(block)
    held = sch.cache_write(block, 0, "local")
    sch.reorder(*outer, k, row, lane)
    sch.reverse_compute_at(held, outer[-1], preserve_unit_loops=True)
    sch.parallel(sch.fuse(*outer))
    sch.vectorize(lane)
    sch.unroll(row)
    sch.vectorize(sch.get_loops(held)[-1])
    sch.unroll(sch.get_loops(held)[-2])
    start = sch.decompose_reduction(block, k)
    sch.vectorize(sch.get_loops(start)[-1])
    sch.unroll(sch.get_loops(start)[-2])


def _in_lanes(sch: Schedule, block: Any) -> None:
    """Loops (*row, lane, k) -> parallel(*row), k, a vector of lanes."""
    *outer, lane, k = sch.get_loops(block)
    held = sch.cache_write(block, 0, "local")
    sch.reorder(*outer, k, lane)
    if outer:
        sch.reverse_compute_at(held, outer[-1], preserve_unit_loops=True)
        sch.parallel(sch.fuse(*outer))
    sch.vectorize(lane)
    sch.vectorize(sch.get_loops(held)[-1])
    sch.vectorize(sch.get_loops(sch.decompose_reduction(block, k))[-1])


def _spread(sch: Schedule, block: Any) -> None:
    """Join the outer loops; cut the innermost into runs of fixed length, in which columns of tiles are neighbours."""
    loops = sch.get_loops(block)
    variables = list(sch.get(block).iter_vars)
    outer = [loop for loop, variable in zip(loops, variables, strict=True) if variable.iter_type == SPATIAL]
    if len(outer) == len(loops):
        extent = sch.get(loops[-1]).extent
        run = next((w for w in RUNS if isinstance(extent, tirx.IntImm) and int(extent) > w and int(extent) % w == 0), 0)
        if run:
            sch.split(loops[-1], [None, run])
        outer = outer[:-1]
    if outer:
        sch.parallel(sch.fuse(*outer))
