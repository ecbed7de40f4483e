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
    if _has("amx-int8", attributes, processor, "amx"):
        return Features("amx", PANEL)
    if _has("avx512vnni", attributes, processor, "amx", "vnni"):
        return Features("vnni", PANEL)
    if "+dotprod" in attributes:
        return Features("sdot", 4)
    return Features("plain", PANEL)


def _has(unit: str, attributes: set[str], processor: str, *kinds: str) -> bool:
    """Whether ``unit`` is asked for, or comes with the ``processor`` and is not switched off."""
    comes = any(processor in _PROCESSORS_WITH[kind] for kind in kinds)
    return f"+{unit}" in attributes or (comes and f"-{unit}" not in attributes)


def host_target() -> Target:
    """This machine, with the integer units that its processor reports."""
    held = _units()
    return Target({"kind": "llvm", "mattr": held} if held else "llvm")


def native_target() -> Target:
    """This machine as LLVM names its processor, less the units that the name promises and that are not here.

    A virtual machine may hide them: Linux then refuses tiles, and other instructions end the process.
    """
    held, flags = _units(), _processor_flags()
    if flags and platform.machine() in ("x86_64", "AMD64"):
        held += [f"-{_FLAGS[flag][1:]}" for flag in ("amx_int8", "avx512_vnni") if flag not in flags]
    units = {"mattr": held} if held else {}  # LLVM may not know the processor's name
    return Target({"kind": "llvm", "mcpu": codegen.llvm_get_system_cpu(), **units})


def _units() -> list[str]:
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
    return found


def _processor_flags() -> set[str]:
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return set()
    lines = info.read_text().splitlines()
    named = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return set(named.partition(":")[2].split())
