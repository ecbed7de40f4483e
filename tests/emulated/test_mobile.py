"""What phones are given, run on an emulated ARM processor: the same bits as here."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qcompile
from qcompile.backends.mobile import ort_format
from qcompile.models.architectures import cached_export
from tests.backends.mobile import native
from tests.emulated import aarch64, tools
from tests.emulated.digests import digest, outputs
from tests.integer.programs import compiled, exposed, texts

pytestmark = pytest.mark.slow
DIGESTS = Path(aarch64.__file__).with_name("digests.py")
OPTIONS: dict[str, Any] = {"max_samples": 8, "max_length": 24}  # those of ``compiled``: the same ranges


@pytest.mark.parametrize("name", ("bert", "llama"))
def test_an_ort_file_gives_the_same_bits(name: str, tmp_path: Path) -> None:
    program, feeds = exposed(name, "w8a8"), texts(2, 13)
    (tmp_path / "model.onnx").write_bytes(program.read_bytes())
    ort_format.convert(tmp_path)
    np.savez(tmp_path / "feeds.npz", allow_pickle=False, **feeds)
    try:
        printed = aarch64.run(DIGESTS, str(tmp_path / "model.ort"), str(tmp_path / "feeds.npz"))
    except aarch64.Missing as error:
        pytest.skip(str(error))
    expected = {output: digest([array]) for output, array in outputs(program, feeds).items()}
    assert dict(line.split() for line in printed.splitlines()) == expected


def emulated(folder: Path, feeds: list[np.ndarray], scratch: Path) -> str:
    """What the package's own program prints on the emulated machine, whose C library is not Android's but glibc."""
    try:
        compiler, root = tools.cross_compiler()
        run = native.runner(compiler)
        emulator = aarch64.emulator()
    except aarch64.Missing as error:
        pytest.skip(str(error))
    libraries = scratch / "libraries"
    libraries.mkdir()
    for name in ("libm.so", "libc.so"):  # Android's names
        (libraries / name).symlink_to(root / "lib" / f"{name}.6")
    command = [emulator, "-cpu", aarch64.CPU, "-L", str(root), "-E", f"LD_LIBRARY_PATH={libraries}", str(run)]
    inputs = native.write_inputs(scratch, feeds)
    done = subprocess.run(
        [*command, str(folder), str(folder / "libprogram.so"), *inputs], capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    return done.stdout


@pytest.mark.parametrize(("name", "recipe"), (("bert", "w8a8"),))
def test_an_android_library_gives_the_bits_of_onnx_runtime(name: str, recipe: str, tmp_path: Path) -> None:
    pytest.importorskip("tvm")
    try:
        tools.put_linker_on_path()
    except aarch64.Missing as error:
        pytest.skip(str(error))
    feeds = texts(2, 13)
    feeds["attention_mask"][1, 9:] = 0
    expected = compiled(name, recipe).run(feeds)
    with qcompile.compile(
        cached_export(name), recipe=recipe, passes="os_plus,int_only", target="android", **OPTIONS
    ) as made:
        printed = emulated(made.folder, list(feeds.values()), tmp_path)
    assert printed == native.digests(expected)
