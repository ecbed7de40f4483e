"""A Relax function that only calls kernels, as a plan: no virtual machine is needed to run it.

rewrite:  call_tir, reshape, tuples and match_cast of ``main``  ->  steps, views and names
needs:    every dim an expression over the dims of the inputs
ensures:  the same kernels on the same data in the same order
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tvm import ir, relax, tirx

from qcompile.backends.mobile.plan import Code, Plan, Slot, Step
from qcompile.backends.tvm.dims import Numbers, coded
from qcompile.errors import ContractError, UserError

_RESHAPES = ("relax.reshape", "vm.builtin.reshape", "relax.memory.view", "relax.expand_dims", "relax.squeeze")


def extract(
    module: ir.IRModule, parameters: Mapping[str, np.ndarray], inputs: Sequence[str], outputs: Sequence[str]
) -> Plan:
    """The plan of ``module``'s ``main``, whose parameters beyond ``inputs`` are ``parameters``, by name."""
    return _Reader(parameters).read(module["main"], inputs, outputs)


class _Reader:
    def __init__(self, parameters: Mapping[str, np.ndarray]) -> None:
        self.plan = Plan()
        self._parameters = parameters
        self._arrays: dict[int, np.ndarray] = {}
        self._variables: dict[Any, int] = {}
        self._numbers = Numbers(self.plan.expressions)
        self._kernels: dict[str, int] = {}
        self._held: dict[Any, Any] = {}  # relax.Var -> slot, or a list of them for a tuple

    def read(self, main: Any, inputs: Sequence[str], outputs: Sequence[str]) -> Plan:
        plan = self.plan
        for number, var in enumerate(main.params):
            if number < len(inputs):
                self._bind(number, var)
                self._held[var] = self._slot("input", number, var.ty)
                plan.inputs.append((inputs[number], self._held[var]))
            else:
                self._held[var] = self._slot("parameter", 0, var.ty)
                self._arrays[self._held[var]] = self._parameters[var.name]
        for block in main.body.blocks:
            for binding in block.bindings:
                if isinstance(binding, relax.MatchCast):  # only shapes, which the inputs have told already
                    self._held[binding.var] = self._view(binding.value, binding.var)
                else:
                    self._held[binding.var] = self._value(binding.value, binding.var)
        result = self._value(main.body.body, None)
        plan.outputs = list(zip(outputs, result if isinstance(result, list) else [result], strict=True))
        plan.place_parameters(self._arrays)
        plan.set_lifetimes()
        return plan

    def _bind(self, number: int, var: Any) -> None:
        for axis, dim in enumerate(var.ty.shape):
            if isinstance(dim, tirx.Var) and dim not in self._variables:
                self._variables[dim] = len(self._variables)
                self.plan.variables.append((number, axis))

    def _value(self, value: Any, var: Any) -> Any:
        if isinstance(value, ir.Var):
            return self._held[value]
        if isinstance(value, ir.Tuple):
            return [self._value(field, None) for field in value.fields]
        if isinstance(value, ir.TupleGetItem):
            return self._value(value.tuple_value, None)[value.index]
        if isinstance(value, ir.Call):
            return self._call(value, var)
        raise self._unknown(type(value).__name__)

    def _call(self, call: Any, var: Any) -> Any:
        name = call.op.name if isinstance(call.op, ir.Op) else getattr(call.op, "global_symbol", "")
        if name in _RESHAPES:
            return self._view(call.args[0], var)
        if name != "relax.call_tir":
            raise self._unknown(str(name) or str(call.op))
        kernel, given = call.args[0].name_hint, call.args[1]
        kinds = call.ty_args[0]
        fields = list(kinds.fields) if isinstance(kinds, ir.TupleType) else [kinds]
        made = [self._slot("temporary", 0, kind) for kind in fields]
        arguments = [self._argument(one) for one in given.fields]
        arguments += [self._argument(one) for one in (call.args[2] if len(call.args) > 2 else ())]
        number = self._kernels.setdefault(kernel, len(self._kernels))
        if number == len(self.plan.kernels):
            self.plan.kernels.append(kernel)
        self.plan.steps.append(Step(number, (*arguments, *(("tensor", slot) for slot in made))))
        return made if isinstance(kinds, ir.TupleType) else made[0]

    def _argument(self, one: Any) -> Any:
        if isinstance(one, ir.Var) and not isinstance(one.ty, ir.PrimType):
            return ("tensor", self._value(one, None))
        return ("dim", self._dim(getattr(one, "value", one) if not isinstance(one, tirx.IntImm) else one))

    def _view(self, source: Any, var: Any) -> int:
        held = self._value(source, None)
        kind = var.ty
        dims = tuple(self._dim(dim) for dim in kind.shape)
        slot = self.plan.slots[held]
        if dims == slot.dims:
            return int(held)
        self.plan.slots.append(Slot("view", held, slot.dtype, dims))
        return len(self.plan.slots) - 1

    def _slot(self, place: Any, source: int, kind: Any) -> int:
        dims = tuple(self._dim(dim) for dim in kind.shape)
        self.plan.slots.append(Slot(place, source, str(kind.dtype), dims))
        return len(self.plan.slots) - 1

    def _dim(self, dim: Any) -> int:
        return self._numbers.of(coded(dim, self._variable, lambda what: self._unknown(f"the dim {what}")))

    def _variable(self, dim: Any) -> Code:
        if dim not in self._variables:
            raise ContractError(f"dim '{dim}' is no dim of an input", where="the plan of the program")
        return (("variable", self._variables[dim]),)

    def _unknown(self, what: str) -> UserError:
        return UserError(
            f"the program needs {what} while it runs, which a phone's package cannot do",
            hint="take runtime=onnxruntime, which runs every program",
        )
