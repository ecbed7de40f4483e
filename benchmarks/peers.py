"""What a user would run instead: other quantisers on the same ONNX file and the same calibration samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.protocol import Arrays

Peer = Callable[[Path, Sequence[Arrays], Path], None]


def _reader(batches: Sequence[Arrays]) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._rest: Iterator[Arrays] = iter(batches)

        def get_next(self) -> Arrays | None:
            return next(self._rest, None)

    return Reader()


def ort_dynamic(model: Path, _: Sequence[Arrays], out: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(model, out, per_channel=True, weight_type=QuantType.QInt8)


def ort_static(model: Path, calibration: Sequence[Arrays], out: Path) -> None:
    from onnxruntime.quantization import quantize_static

    quantize_static(model, out, _reader(calibration))


def ort_static_matmul(model: Path, calibration: Sequence[Arrays], out: Path) -> None:
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    quantize_static(
        model,
        out,
        _reader(calibration),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=["MatMul"],
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )


def onnxsim_static(model: Path, calibration: Sequence[Arrays], out: Path) -> None:
    import onnx
    import onnxsim

    loaded = onnx.load(str(model))  # from a path it does not find external data
    onnx.save(onnxsim.quantize_static(loaded, calibration_data=list(calibration)), str(out))


# name -> (the call as its own documentation spells it, the distribution it comes from, the function)
PEERS: dict[str, tuple[str, str, Peer]] = {
    "ort_dynamic": ("quantize_dynamic(per_channel)", "onnxruntime", ort_dynamic),
    "ort_static": ("quantize_static, defaults", "onnxruntime", ort_static),
    "ort_static_matmul": ("quantize_static(MatMul, per_channel, uint8)", "onnxruntime", ort_static_matmul),
    "onnxsim_static": ("quantize_static", "onnxsim", onnxsim_static),
}
UNCALIBRATED = "ort_dynamic"
