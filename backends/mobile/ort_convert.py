"""A script, ``python ort_convert.py MODEL``: ONNX Runtime's converter, at addresses that are not drawn by chance.

ONNX Runtime holds attributes in hash tables, whose order depends on where in memory they lie, and writes an ``.ort``
file in that order. Linux gives a process the same addresses each time if it is asked to; other systems do not.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

FIXED, ASK = 0x0040000, 0xFFFFFFFF  # ADDR_NO_RANDOMIZE, and what asks for the present value


def start_at_fixed_addresses() -> None:
    """Begin this process again with fixed addresses; nothing where they are fixed, or cannot be."""
    personality = getattr(ctypes.CDLL(None), "personality", None) if sys.platform == "linux" else None
    if personality is None:
        return
    now = personality(ASK)
    if now >= 0 and not now & FIXED and personality(now | FIXED) >= 0:
        os.execve(sys.executable, [sys.executable, "-P", *sys.argv], {**os.environ, "PYTHONHASHSEED": "0"})


def main(model: str) -> None:
    start_at_fixed_addresses()
    from onnxruntime.tools.convert_onnx_models_to_ort import OptimizationStyle, convert_onnx_models_to_ort

    convert_onnx_models_to_ort(
        Path(model), optimization_styles=[OptimizationStyle.Fixed], target_platform="arm", enable_type_reduction=True
    )


if __name__ == "__main__":
    main(sys.argv[1])
