"""Linked libraries: what their headers say, that they stand alone, and what is said where the linker is missing."""

from __future__ import annotations

import functools
import plistlib
import tempfile
from pathlib import Path

import pytest

pytest.importorskip("tvm")

from qcompile.backends.mobile import apple, headers, kernels, link
from qcompile.backends.mobile.link import ANDROID, IOS, System
from qcompile.errors import UserError
from tests.backends.mobile import toy


@functools.cache
def linked(system: System) -> headers.Header:
    module, _ = toy.module()
    path = Path(tempfile.mkdtemp(prefix="linked")) / "library"
    kernels.write_library(module, ["embed", "product", "positions"], path, system)
    return headers.read(path)


@pytest.mark.parametrize("arch", sorted(ANDROID))
def test_an_android_library_needs_only_the_system(arch: str) -> None:
    header = linked(ANDROID[arch])
    assert (header.format, header.machine, header.name) == ("elf", arch, "libprogram.so")
    assert set(header.needed) <= {"libm.so", "libc.so"}
    assert set(header.undefined) <= {*link.MATH, *link.MEMORY}
    assert header.page == 16384
    assert bool(header.needed) == bool(header.undefined)


@pytest.mark.parametrize(("arch", "platform"), (("aarch64", "ios 15.0"), ("simulator", "ios-simulator 15.0")))
def test_an_ios_library_is_for_its_platform(arch: str, platform: str) -> None:
    header = linked(IOS[arch])
    assert (header.format, header.machine, header.platform) == ("mach-o", "aarch64", platform)
    assert header.name == "@rpath/Kernels.framework/Kernels"
    assert header.needed == ("/usr/lib/libSystem.B.dylib",)


def test_the_folders_around_an_ios_library_name_it(tmp_path: Path) -> None:
    for arch, variant in (("aarch64", None), ("simulator", "simulator")):
        system = IOS[arch]
        apple.write_framework(tmp_path, system)
        outer = plistlib.loads((tmp_path / "Kernels.xcframework/Info.plist").read_bytes())
        (library,) = outer["AvailableLibraries"]
        place = f"Kernels.xcframework/{library['LibraryIdentifier']}/{library['BinaryPath']}"
        assert place == system.library
        assert library.get("SupportedPlatformVariant") == variant
        inner = plistlib.loads(((tmp_path / system.library).parent / "Info.plist").read_bytes())
        assert inner["CFBundleExecutable"] == "Kernels"


def test_a_name_that_the_system_lacks_fails_the_link(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(link, "MATH", ("cosf",))
    module, _ = toy.module()
    with pytest.raises(UserError, match=r"cannot link for x86_64-linux-android: .*nearbyintf"):
        kernels.write_library(module, ["product"], tmp_path / "library", ANDROID["x86_64"])


def test_a_missing_linker_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match=r"'ld64\.lld'") as caught:
        link.find_linker("ld64.lld")
    assert "apt-get install lld" in caught.value.hint


def test_a_linker_is_found_under_the_name_of_its_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "ld.lld-17").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert link.find_linker("ld.lld") == "ld.lld-17"


def test_what_is_no_library_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("text")
    with pytest.raises(UserError, match="is no library"):
        headers.read(tmp_path / "text")
    (tmp_path / "cut").write_bytes(b"\x7fELF" + bytes(60))
    with pytest.raises(UserError, match="is damaged"):
        headers.read(tmp_path / "cut")
