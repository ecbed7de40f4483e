"""From the Relax module to machine code: schedules, then TVM's own lowering."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax
from tvm.target import Target

from qcompile.backends.tvm.schedule import schedule


def build(module: tvm.IRModule, target: Target) -> Any:
    """The executable for ``target``."""
    module = schedule(module)
    return tvm.compile(module, target=target, relax_pipeline=_relax(target))


def _relax(target: Target) -> Any:
    steps = [
        relax.transform.ToNonDataflow(),
        relax.transform.RemovePurityChecking(),
        relax.transform.CallTIRRewrite(),
        relax.transform.StaticPlanBlockMemory(),
        relax.transform.LowerAllocTensor(),
        relax.transform.KillAfterLastUse(),
        relax.transform.LowerRuntimeBuiltin(),
        relax.transform.ComputePrimValue(),
        relax.transform.VMShapeLower(),
        relax.transform.AttachGlobalSymbol(),
    ]

    @tvm.transform.module_pass(opt_level=0)
    def lower(module: tvm.IRModule, _: Any) -> tvm.IRModule:
        with target:
            return tvm.transform.Sequential(steps)(module)

    return lower
