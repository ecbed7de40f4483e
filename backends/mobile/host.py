"""A plan run here: the phone's kernels, compiled for this processor, in the phone's order."""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm
from tvm import ir
from tvm.target import Target

from qcompile.backends.mobile.plan import Plan, Slot, derived
from qcompile.backends.tvm.program import check_indices
from qcompile.errors import UserError
from qcompile.pipeline import Arrays


class Host:
    """``plan`` as a function from feeds to outputs, both by name."""

    def __init__(self, plan: Plan, module: ir.IRModule) -> None:
        functions = {name: module[name].with_attr("global_symbol", name) for name in plan.kernels}
        made = tvm.compile(ir.IRModule(functions), target=Target({"kind": "llvm"}))
        self._kernels = [made[name] for name in plan.kernels]
        self._plan = plan
        slots = [slot for slot in plan.slots if slot.place == "parameter"]
        places = {slot.source: plan.parameters[slot.source] for slot in slots}
        self._parameters = {place: tvm.runtime.tensor(array) for place, array in places.items()}
        self._derived = {
            number: tvm.runtime.tensor(_derived(slot, plan))
            for number, slot in enumerate(plan.slots) if slot.place == "derived"
        }  # fmt: skip

    def __call__(self, feeds: Arrays) -> Arrays:
        plan = self._plan
        given = [np.asarray(feeds[name], order="C") for name, _ in plan.inputs]
        for (name, _), array in zip(plan.inputs, given, strict=True):
            check_indices(name, array, plan.rows.get(name, 0), plan.longest)
        values = plan.values([array.shape for array in given])
        held: dict[int, Any] = {}
        for number, step in enumerate(plan.steps):
            arguments = [
                values[one] if kind == "dim" else self._tensor(one, held, given, values)
                for kind, one in step.arguments
            ]
            self._kernels[step.kernel](*arguments)
            over = [slot for slot in held if plan.slots[plan.root(slot)].last == number]
            for slot in over:
                del held[slot]
        return {name: self._tensor(slot, held, given, values).numpy() for name, slot in plan.outputs}

    def _tensor(self, number: int, held: dict[int, Any], given: list[np.ndarray], values: list[int]) -> Any:
        if number in held:
            return held[number]
        slot = self._plan.slots[number]
        shape = [values[dim] for dim in slot.dims]
        if slot.place == "temporary":
            made = tvm.runtime.empty(shape, slot.dtype)
        elif slot.place == "input":
            if list(given[slot.source].shape) != shape:
                name = self._plan.inputs[slot.source][0]
                what = f"input '{name}' has the shape {list(given[slot.source].shape)}, not {shape}"
                raise UserError(what, hint="give all inputs the same batch and length")
            made = tvm.runtime.tensor(given[slot.source])
        elif slot.place == "parameter":
            return self._parameters[slot.source]
        elif slot.place == "derived":
            return self._derived[number]
        else:
            made = self._tensor(slot.source, held, given, values)._create_view(shape)
        held[number] = made
        return made


def _derived(slot: Slot, plan: Plan) -> np.ndarray:
    table = plan.parameters[plan.slots[slot.source].source]
    return derived(table, slot.addend).view(slot.dtype)
