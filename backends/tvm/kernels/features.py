"""What a target multiplies integers with, read off TVM's description of it."""

from __future__ import annotations

import dataclasses
import platform
from pathlib import Path
from typing import Any, Literal

from tvm.target import Target, codegen

Unit = Literal["amx", "vnni", "sdot", "plain", "loops"]  # loops: no vectors, a GPU or C

PANEL = 16  # columns of a panel of packed weights, on every processor
_PROCESSORS_WITH = {
    "amx": ("sapphirerapids", "emeraldrapids", "graniterapids", "graniterapids-d", "diamondrapids"),
    "vnni": ("cascadelake", "cooperlake", "icelake-client", "icelake-server", "rocketlake", "tigerlake", "znver4",
             "znver5"),
}  # fmt: skip
_FLAGS = {"amx_int8": "+amx-int8", "avx512_vnni": "+avx512vnni", "asimddp": "+dotprod"}
# what a virtual machine may hide of a processor that LLVM knows by its name: Linux's names and LLVM's
_HIDDEN = {
    "avx2": "avx2", "fma": "fma", "avx_vnni": "avxvnni", "avx512f": "avx512f", "avx512bw": "avx512bw",
    "avx512cd": "avx512cd", "avx512dq": "avx512dq", "avx512vl": "avx512vl", "avx512ifma": "avx512ifma",
    "avx512vbmi": "avx512vbmi", "avx512_vbmi2": "avx512vbmi2", "avx512_bitalg": "avx512bitalg",
    "avx512_vpopcntdq": "avx512vpopcntdq", "avx512_vnni": "avx512vnni", "avx512_bf16": "avx512bf16",
    "avx512_fp16": "avx512fp16", "amx_tile": "amx-tile", "amx_int8": "amx-int8", "amx_bf16": "amx-bf16",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Features:
    """``unit``: what multiplies int8; ``lanes``: int32 in the register that it adds to."""

    unit: Unit
    lanes: int

    @property
    def wide(self) -> bool:
        """Whether a panel's columns fill one AVX-512 register."""
        return self.unit in ("amx", "vnni")


def features(target: Any) -> Features:
    """Of a ``tvm.target.Target``, or what makes one (a kind, a dictionary)."""
    target = target if isinstance(target, Target) else Target(target)
    if target.kind.name != "llvm":
        return Features("loops", 1)
    attributes = {str(name) for name in target.attrs.get("mattr", None) or ()}
    processor = str(target.attrs.get("mcpu", "") or "")

    def has(name: str, unit: str) -> bool:
        known = processor in _PROCESSORS_WITH[unit] or processor in _PROCESSORS_WITH["amx"]
        return f"+{name}" in attributes or (known and f"-{name}" not in attributes)

    if has("amx-int8", "amx"):
        return Features("amx", PANEL)
    if has("avx512vnni", "vnni"):
        return Features("vnni", PANEL)
    if "+dotprod" in attributes:
        return Features("sdot", 4)
    return Features("plain", PANEL)


def host_target() -> Target:
    """This machine, with the integer units that its processor reports."""
    flags = _processor_flags()
    found = [attribute for flag, attribute in _FLAGS.items() if flag in flags]
    if "+amx-int8" in found:
        found += ["+amx-tile"]
    if "+avx512vnni" in found:
        found += ["+avx512f", "+avx512bw", "+avx512dq", "+avx512vl", "+avx2", "+fma"]
    if platform.machine() in ("x86_64", "AMD64") and not found and {"avx2", "fma"} <= flags:
        found = ["+avx2", "+fma"]
    if "+dotprod" in found:
        found += ["+neon"]
    return Target({"kind": "llvm", "mattr": found} if found else "llvm")


def native_target() -> Target:
    """This machine by the name of its processor, less what its system hides of it."""
    flags = _processor_flags()
    held = [str(name) for name in host_target().attrs.get("mattr", None) or ()]
    if platform.machine() in ("x86_64", "AMD64") and flags:
        held += [f"-{name}" for flag, name in _HIDDEN.items() if flag not in flags]
    return Target({"kind": "llvm", "mcpu": codegen.llvm_get_system_cpu(), **({"mattr": held} if held else {})})


def _processor_flags() -> set[str]:
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return set()
    lines = info.read_text().splitlines()
    named = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return set(named.partition(":")[2].split())
