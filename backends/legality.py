"""What runs in low bits where, as data: operator x weights x activations x target.

Passes and the driver read these rows; they never ask a backend.
"""

from __future__ import annotations

import dataclasses

from qcompile.quant.schemes import ActivationScheme, WeightScheme
from qcompile.recipe import Op, Recipe, Rule

ALL = (2, 3, 4, 5, 6, 7, 8)
FLOAT = "float"


@dataclasses.dataclass(frozen=True)
class Legal:
    """Schemes of one kind of operator that a target computes on codes.

    weights, activations: granularities, with "float" for what keeps floats; bits: of the codes
    """

    op: Op
    weights: tuple[str, ...]
    weight_bits: tuple[int, ...]
    activations: tuple[str, ...]
    activation_bits: tuple[int, ...]
    kernel: str

    def takes(self, rule: Rule) -> bool:
        """Whether ``rule`` asks for nothing else."""
        weights, activations = rule.weights, rule.activations
        return (
            rule.op == self.op
            and _within(weights, self.weights, self.weight_bits)
            and _within(activations, self.activations, self.activation_bits)
        )


def _within(
    scheme: WeightScheme | ActivationScheme | None, granularities: tuple[str, ...], bits: tuple[int, ...]
) -> bool:
    if scheme is None:
        return FLOAT in granularities
    return scheme.granularity in granularities and scheme.bits in bits


WHOLE, TOKEN = ("per_tensor",), ("per_tensor", "per_token")
COLUMN, GROUP = ("per_tensor", "per_channel"), ("per_tensor", "per_channel", "group")
_INTEGER = "int8 x int8 in int32, codes of fewer bits in bytes"


_LLVM = (
    Legal("linear", COLUMN, (2, 3, 4), TOKEN, ALL, "packed weights x int8 in int32"),
    Legal("linear", GROUP, ALL, TOKEN, ALL, "packed weights x int8 in int32 with AVX-512 VNNI, else in float32"),
)


def _tvm(bits: str) -> tuple[Legal, ...]:
    """``bits``: that packed weights have a kernel for."""
    packed = f"packed weights of {bits} bits x float32"
    return (
        Legal("linear", COLUMN, ALL, TOKEN, ALL, _INTEGER),
        Legal("linear", GROUP, ALL, (FLOAT,), (), packed),
        Legal("head", COLUMN, ALL, TOKEN, ALL, _INTEGER),
        Legal("head", GROUP, ALL, (FLOAT,), (), packed),
        Legal("embedding", GROUP, ALL, (FLOAT,), (), "rows of bytes, dequantised where they are read"),
    )


_CPU = (
    Legal("linear", COLUMN, ALL, TOKEN, ALL, "MatMulIntegerToFloat, QGemm"),
    Legal("linear", GROUP, ALL, (FLOAT,), (), "MatMulNBits of 2, 4 or 8 bits"),
    Legal("head", COLUMN, ALL, TOKEN, ALL, "QGemm"),
    Legal("head", GROUP, ALL, (FLOAT,), (), "MatMulNBits of 2, 4 or 8 bits"),
    Legal("embedding", GROUP, ALL, (FLOAT,), (), "rows of bytes, dequantised where they are read"),
    Legal("cache", (FLOAT,), (), ("per_token",), (8, 4), "codes, scales and zero points as inputs and outputs"),
)
BY_TVM = ("llvm", "cuda", "opencl", "metal", "android", "ios")
TABLE: dict[str, tuple[Legal, ...]] = {
    "cpu": _CPU,
    **dict.fromkeys((*BY_TVM, "webgpu"), _tvm("2, 4 or 8")),
    "llvm": (*_LLVM, *_tvm("2, 3, 4 or 8")),
}
LENIENT = ("cpu",)  # runs what it has no kernel for in float, and says so for each place
INTEGER_ONLY = ("cpu", *BY_TVM)  # targets that run what int_only writes, with the same bits


def _plain(target: str) -> str:
    """The row of TABLE for ``target``: without options, but for the one that takes another runtime."""
    return "cpu" if "runtime=onnxruntime" in target else target.partition("{")[0]


def refused(rule: Rule, target: str) -> bool:
    """Whether ``target`` cannot run ``rule`` in low bits; a target without rows takes what it is given."""
    plain = _plain(target)
    rows = None if plain in LENIENT else TABLE.get(plain)
    quantises = rule.weights is not None or rule.activations is not None
    return rows is not None and quantises and not any(row.takes(rule) for row in rows)


def takes_integers(target: str) -> bool:
    """Whether ``target`` runs what int_only writes; a target without rows takes what it is given."""
    plain = _plain(target)
    return plain not in TABLE or plain in INTEGER_ONLY


def nearest(rule: Rule, target: str) -> Rule | None:
    """The rule closest to ``rule`` that ``target`` runs; None where it runs none and the rule must go."""
    rows = [row for row in TABLE[_plain(target)] if row.op == rule.op]
    changed = [(_distance(rule, found), place, found) for place, row in enumerate(rows) for found in _fitted(rule, row)]
    return min(changed, key=lambda entry: entry[:2])[2] if changed else None


def _fitted(rule: Rule, row: Legal) -> list[Rule]:
    """``rule`` with as little changed as ``row`` wants."""
    weights, activations = rule.weights, rule.activations
    found: dict[str, object] = {}
    if weights is not None and not _within(weights, row.weights, row.weight_bits):
        kept = weights.granularity if weights.granularity in row.weights else row.weights[-1]
        bits = min(row.weight_bits, key=lambda b: (abs(b - weights.bits), -b))
        group = weights.group_size if kept == "group" else None
        found["weights"] = weights.model_copy(update={"granularity": kept, "bits": bits, "group_size": group})
    if activations is not None and not _within(activations, row.activations, row.activation_bits):
        if not row.activation_bits:
            found["activations"] = None
        else:
            kept = activations.granularity if activations.granularity in row.activations else row.activations[-1]
            bits = min(row.activation_bits, key=lambda b: (abs(b - activations.bits), -b))
            found["activations"] = activations.model_copy(update={"granularity": kept, "bits": bits})
    made = rule.model_copy(update=found)
    return [made] if row.takes(made) else []


def _distance(a: Rule, b: Rule) -> tuple[int, int]:
    """(what became float, what else changed)."""
    lost = (a.activations is None) != (b.activations is None)
    return int(lost), sum(one != other for one, other in ((a.weights, b.weights), (a.activations, b.activations)))


def listed(target: str) -> list[tuple[str, str, str, str]]:
    """(operator, weights, activations, kernel) for each row of ``target``."""
    return [
        (row.op, _listed(row.weights, row.weight_bits), _listed(row.activations, row.activation_bits), row.kernel)
        for row in TABLE.get(target, ())
    ]


def _listed(granularities: tuple[str, ...], bits: tuple[int, ...]) -> str:
    if granularities == (FLOAT,):
        return FLOAT
    count = f"{bits[0]}-{bits[-1]}" if bits == ALL else "/".join(map(str, bits))
    return f"{count} bits {', '.join(granularities)}"


def spelled(rule: Rule) -> str:
    """The schemes of ``rule`` in words."""
    parts = [str(scheme) for scheme in (rule.weights, rule.activations) if scheme is not None]
    return f"{rule.op}: " + (" x ".join(parts) or "float")


def complaint(recipe: Recipe, target: str) -> tuple[str, str] | None:
    """(what ``target`` cannot run of ``recipe``, the nearest that it can), or None."""
    for rule in recipe.rules:
        if refused(rule, target):
            instead = nearest(rule, target)
            if instead is None:
                return spelled(rule), f"leave {rule.op} out: {target} has no low-bit kernel for it"
            return spelled(rule), f"the nearest that {target} runs in low bits is {spelled(instead)}"
    return None
