"""The environment is refused in words that a user can act on."""

import importlib
import importlib.metadata
import types
from pathlib import Path

import pytest

from qcompile import environment
from qcompile.environment import lacks_vnni, require_onnxruntime, warn_of_saturation
from qcompile.errors import UserError


def _install(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Pretend that exactly these distributions are installed."""

    def version(name: str) -> str:
        if name not in names:
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(importlib.metadata, "version", version)


def _import_gives(monkeypatch: pytest.MonkeyPatch, module: types.ModuleType | None) -> None:
    def import_module(name: str) -> types.ModuleType:
        if module is None:
            raise ImportError(f"No module named '{name}'")
        return module

    monkeypatch.setattr(importlib, "import_module", import_module)


def test_the_installed_runtime_is_returned() -> None:
    assert require_onnxruntime() is importlib.import_module("onnxruntime")


def test_no_runtime_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch)
    _import_gives(monkeypatch, None)
    with pytest.raises(UserError, match="ONNX Runtime is not installed") as caught:
        require_onnxruntime()
    assert "qcompile-nn[cpu]" in caught.value.hint
    assert caught.value.exit_code == 2


def test_two_runtimes_are_refused_although_they_import(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, "onnxruntime", "onnxruntime-gpu")
    with pytest.raises(UserError, match="both installed") as caught:
        require_onnxruntime()
    assert "pip uninstall" in caught.value.hint


def test_a_runtime_of_another_distribution_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch)
    assert hasattr(require_onnxruntime(), "InferenceSession")


@pytest.mark.parametrize("leftover", [None, types.ModuleType("onnxruntime")])
def test_a_damaged_runtime_asks_for_a_reinstall(
    monkeypatch: pytest.MonkeyPatch, leftover: types.ModuleType | None
) -> None:
    _install(monkeypatch, "onnxruntime-gpu")
    _import_gives(monkeypatch, leftover)
    with pytest.raises(UserError, match="onnxruntime-gpu is installed but cannot be used") as caught:
        require_onnxruntime()
    assert "--force-reinstall" in caught.value.hint


@pytest.mark.parametrize(
    ("text", "lacks"),
    [
        ("model name\t: X\nflags\t\t: fpu avx2 avx512f\n", True),
        ("flags\t\t: fpu avx2 avx512f avx512_vnni amx_int8\n", False),
        ("flags\t\t: fpu avx2 avx_vnni\n", False),
        ("Features\t: fp asimd asimddp\n", False),  # arm64
        (None, False),
    ],
)
@pytest.mark.parametrize(("kernel", "low_bit"), [("QGemm", True), ("MatMul", False), ("MatMulNBits", True)])
def test_only_an_x86_processor_without_vnni_is_warned_about_and_only_for_int8_kernels(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    text: str | None, lacks: bool, kernel: str, low_bit: bool,
) -> None:  # fmt: skip
    monkeypatch.setattr(environment, "CPUINFO", tmp_path / "cpuinfo")
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text)
    assert lacks_vnni() is lacks
    warn_of_saturation([{"kernel": kernel, "low_bit": low_bit}])
    assert ("session.x64quantprecision" in capsys.readouterr().err) is (lacks and kernel == "QGemm")
