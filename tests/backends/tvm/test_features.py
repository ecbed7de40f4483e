"""Integer units of a target: what its description asks for, what comes with the processor, what a machine hides."""

from __future__ import annotations

import importlib

import pytest

pytest.importorskip("tvm", reason='TVM is not installed: pip install "qcompile-nn[tvm]"')

from qcompile.backends.tvm.kernels import features, native_target

module = importlib.import_module("qcompile.backends.tvm.kernels.features")


@pytest.mark.parametrize(
    ("mattr", "unit"),
    [([], "amx"), (["-amx-int8"], "vnni"), (["-amx-int8", "-avx512vnni"], "plain"), (["+avx512vnni"], "amx")],
)
def test_a_unit_of_the_processor_can_be_switched_off(mattr: list[str], unit: str) -> None:
    assert features({"kind": "llvm", "mcpu": "sapphirerapids", "mattr": mattr}).unit == unit


@pytest.mark.parametrize(
    ("flags", "unit"),
    [({"amx_int8", "avx512_vnni"}, "amx"), ({"avx2", "fma", "avx512_vnni"}, "vnni"), ({"avx2", "fma"}, "plain")],
)
def test_this_machine_has_what_it_reports_and_not_what_its_processor_is_known_for(
    flags: set[str], unit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_processor_flags", lambda: flags)
    monkeypatch.setattr(module.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(module.codegen, "llvm_get_system_cpu", lambda: "sapphirerapids")
    assert features(native_target()).unit == unit
