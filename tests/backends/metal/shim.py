"""Metal source through g++: ``shim.h`` stands for the language, loops for the threads."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

SHIM = Path(__file__).with_name("shim.h")
_KERNEL = re.compile(r"^kernel void (\w+)\(", re.MULTILINE)


def shared(source: Path, scratch: Path) -> Path:
    """A library of functions ``launch_KERNEL`` of places, blocks and threads."""
    text = source.read_text()
    doors = [
        f'extern "C" void launch_{name}(void **a, uint g, uint b) {{ launch({name}, a, g, b); }}'
        for name in _KERNEL.findall(text)
    ]
    (scratch / "metal_stdlib").write_text(f'#include "{SHIM}"\n')
    (scratch / "all.cpp").write_text("\n".join([text, *doors]))
    command = ["g++", "-O1", "-std=c++20", "-shared", "-fPIC", "-w", "-ffp-contract=off", "-fno-strict-aliasing"]
    command += [f"-I{scratch}", "-o", str(scratch / "all.so"), str(scratch / "all.cpp")]
    subprocess.run(command, check=True)
    return scratch / "all.so"
