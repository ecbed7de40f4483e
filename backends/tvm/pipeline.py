"""From the Relax module to machine code: schedules, then TVM's own lowering."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax, tirx
from tvm.target import Target

from qcompile.backends.tvm.schedule import SLOW, schedule


def build(module: tvm.IRModule, target: Target) -> Any:
    """The executable for ``target``."""
    module = schedule(module)
    with tvm.transform.PassContext(disabled_pass=[SLOW]):  # `schedule` has run it on the kernels that need it
        return tvm.compile(module, target=target, relax_pipeline=_relax(target))


def _ordered() -> Any:
    """The functions that compute dims, their stores in order: TVM leaves them in the order of addresses in memory."""

    @tvm.transform.module_pass(opt_level=0)
    def run(module: tvm.IRModule, _: Any) -> tvm.IRModule:
        for variable, function in module.functions.items():
            is_of_dims = isinstance(function, tirx.PrimFunc) and variable.name_hint.startswith("shape_func")
            if is_of_dims and isinstance(function.body, tirx.SeqStmt):
                stores = sorted(function.body.seq, key=lambda store: int(store.indices[0]))
                module.update_func(variable, function.with_body(tirx.SeqStmt(stores)))
        return module

    return run


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
        _ordered(),
        relax.transform.AttachGlobalSymbol(),
    ]

    @tvm.transform.module_pass(opt_level=0)
    def lower(module: tvm.IRModule, _: Any) -> tvm.IRModule:
        with target:
            return tvm.transform.Sequential(steps)(module)

    return lower
