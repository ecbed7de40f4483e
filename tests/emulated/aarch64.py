"""An ARM machine under qemu's user emulation, with Python, NumPy and this machine's version of ONNX Runtime.

Everything lies in one cached folder: Debian's arm64 packages are unpacked there by an apt with a state of its own, so
that the packages of this machine stay as they are, and nothing needs root. qemu too where it is not installed.
ONNX Runtime reads what the processor can do from /proc/cpuinfo, which qemu does not emulate: the root has one.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

from qcompile.models.cache import cache_root, cached_folder

CPU = "cortex-a76"
PYTHON = f"python{sys.version_info[0]}.{sys.version_info[1]}"
PACKAGES = (PYTHON, f"lib{PYTHON}", "libstdc++6", "libgomp1", "zlib1g")
WHEELS = ("numpy", "onnxruntime")
PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64")
EMULATORS = ("qemu-aarch64", "qemu-aarch64-static")
_FEATURES = "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"
_CPUINFO = f"""processor	: {{number}}
BogoMIPS	: 62.50
Features	: {_FEATURES}
CPU implementer	: 0x41
CPU architecture: 8
CPU variant	: 0x4
CPU part	: 0xd0b
CPU revision	: 1

"""


class Missing(Exception):
    """The machine cannot be made here; the argument says what is missing."""


def run(script: Path, *arguments: str, timeout: float = 500) -> str:
    """What ``script`` prints on the emulated machine. Raises Missing where there is none."""
    root = machine()
    python = root / "root/usr/bin" / PYTHON
    command = [emulator(), "-cpu", CPU, "-L", str(root / "root"), str(python), "-S", str(script), *arguments]
    variables = {"PYTHONPATH": str(root / "site"), "PYTHONHOME": str(root / "root/usr"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=timeout)
    if done.returncode:
        raise RuntimeError(f"{script.name} failed on the emulated machine: {done.stderr[-2000:]}")
    return done.stdout


def machine() -> Path:
    """The folder with ``root``, Debian's files, and ``site``, the wheels."""
    versions = [f"{name}=={importlib.metadata.version(name)}" for name in WHEELS]
    key = "-".join((PYTHON, *versions)).replace("==", "")
    return cached_folder(cache_root() / f"aarch64-{key}", lambda folder: _make(folder, versions))


def _make(folder: Path, versions: Sequence[str]) -> None:
    unpack("arm64", PACKAGES, folder / "root")
    processors = folder / "root/proc/cpuinfo"
    processors.parent.mkdir()
    processors.write_text("".join(_CPUINFO.format(number=number) for number in range(2)))
    wheels = folder / "wheels"
    number = f"{sys.version_info[0]}{sys.version_info[1]}"
    abis = [option for abi in (f"cp{number}", "abi3", "none") for option in ("--abi", abi)]
    platforms = [option for name in PLATFORMS for option in ("--platform", name)]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    _call([*pip, *platforms, "--python-version", number, *abis, "-d", str(wheels), *versions], "pip download")
    for wheel in wheels.iterdir():
        zipfile.ZipFile(wheel).extractall(folder / "site")
    shutil.rmtree(wheels)


def emulator() -> str:
    """The path of qemu for aarch64. Raises Missing where there is none."""
    found = [path for name in EMULATORS if (path := shutil.which(name))]
    return found[0] if found else str(_unpacked_emulator())


def _unpacked_emulator() -> Path:
    def make(folder: Path) -> None:
        architecture = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
        unpack(architecture, ["qemu-user-static"], folder, download=True)
        keep = (folder / "usr/bin" / EMULATORS[1]).rename(folder / EMULATORS[1])
        shutil.rmtree(folder / "usr")
        keep.chmod(0o755)

    return cached_folder(cache_root() / "qemu-aarch64", make) / EMULATORS[1]


def unpack(architecture: str, packages: Sequence[str], folder: Path, *, download: bool = False) -> None:
    """Debian's ``packages`` and what they need, or with ``download`` they alone, unpacked into ``folder``."""
    for tool in ("apt-get", "dpkg"):
        if shutil.which(tool) is None:
            raise Missing(f"{tool} is not installed")
    state = folder / ".apt"
    for part in ("state/lists/partial", "cache/archives/partial"):
        (state / part).mkdir(parents=True, exist_ok=True)
    (state / "status").touch()
    (state / "apt.conf").write_text(
        f'APT::Architecture "{architecture}";\nAPT::Architectures {{ "{architecture}"; }};\n'
        f'Dir::State "{state}/state";\nDir::State::status "{state}/status";\nDir::Cache "{state}/cache";\n'
        'APT::Install-Recommends "false";\nAPT::Sandbox::User "";\nDebug::NoLocking "true";\n'
    )
    variables = {**os.environ, "APT_CONFIG": str(state / "apt.conf")}
    _call(["apt-get", "update", "--quiet"], "apt-get update", variables)
    archives = state / "cache/archives"
    if download:
        _call(["apt-get", "download", "--quiet", *packages], "apt-get download", variables, archives)
    else:
        install = ["apt-get", "install", "--yes", "--quiet", "--download-only", *packages]
        _call(install, "apt-get install --download-only", variables)
    for package in archives.glob("*.deb"):
        _call(["dpkg", "-x", str(package), str(folder)], "dpkg -x")
    shutil.rmtree(state)


def _call(
    command: Sequence[str], what: str, variables: dict[str, str] | None = None, folder: Path | None = None
) -> None:
    try:
        done = subprocess.run(command, env=variables, cwd=folder, capture_output=True, text=True, timeout=400)
    except subprocess.TimeoutExpired as error:
        raise Missing(f"{what} took more than {error.timeout:g} s") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise Missing(f"{what}: {lines[-1] if lines else f'exit code {done.returncode}'}")
