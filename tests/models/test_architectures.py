"""Every architecture exports, loads in ONNX Runtime and computes what torch computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch

from qcompile.errors import UserError
from qcompile.models.architectures import (
    ARCHITECTURES,
    HIDDEN,
    LAYERS,
    OUTLIER,
    OUTLIER_CHANNEL,
    build,
    cached_export,
    export,
    random_inputs,
)

# Relative to the largest output; measured on these models: at most 2e-6.
TOLERANCE = 1e-5
Array = npt.NDArray[np.float32]


def resized(inputs: dict[str, torch.Tensor], batch: int, sequence: int, seed: int) -> dict[str, torch.Tensor]:
    """Inputs of another shape; the last row is padded on the right where there is a mask."""

    def blank(name: str, value: torch.Tensor) -> torch.Tensor:
        if value.ndim == 4:
            return torch.zeros(batch, *value.shape[1:])
        length = sequence // 2 if name.startswith("decoder") else sequence
        ones = torch.ones(batch, max(length, 1), dtype=torch.int64)
        if name == "attention_mask":
            ones[-1, max(1, sequence // 2) :] = 0
        return ones

    return random_inputs({name: blank(name, value) for name, value in inputs.items()}, seed)


def run(path: Path, inputs: dict[str, torch.Tensor]) -> Array:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    output: Array = session.run(None, {name: value.numpy() for name, value in inputs.items()})[0]
    return output


def difference(module: torch.nn.Module, path: Path, inputs: dict[str, torch.Tensor]) -> float:
    """max|onnx - torch| / max|torch| over unmasked positions."""
    with torch.no_grad():
        expected = module(**inputs)[0].numpy()
    actual = run(path, inputs)
    assert actual.shape == expected.shape
    mask = inputs.get("attention_mask")
    if mask is not None and mask.shape == expected.shape[:2]:
        keep = mask.numpy().astype(bool)
        actual, expected = actual[keep], expected[keep]
    assert np.isfinite(actual).all()
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def check(name: str, path: Path, attention: str = "sdpa") -> None:
    module, inputs, _ = build(name, attention)
    for batch, sequence in ((2, 10), (3, 17), (1, 1)):
        assert difference(module, path, resized(inputs, batch, sequence, seed=batch)) < TOLERANCE


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_export_equals_torch(name: str) -> None:
    path = cached_export(name)
    model = onnx.load(path)
    onnx.checker.check_model(model)
    assert {entry.domain: entry.version for entry in model.opset_import}[""] == 20
    assert len(model.graph.output) == 1
    check(name, path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "opset", "attention"),
    [
        ("bert", 18, "eager"),
        ("gpt2", 18, "eager"),
        ("llama", 18, "eager"),
        ("bert", 23, "eager"),
        ("llama", 23, "eager"),
        ("opt", 23, "sdpa"),
        ("llama", 23, "sdpa"),
        ("llama", 24, "sdpa"),
    ],
)
def test_other_opsets_equal_torch(name: str, opset: int, attention: str) -> None:
    check(name, cached_export(name, opset=opset, attention=attention), attention)


def test_same_bytes_twice(tmp_path: Path) -> None:
    first, second = (export("distilbert", tmp_path / part) for part in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_weights_hide_nothing(name: str) -> None:
    """No norm is the identity, no bias is zero, and the residual norms carry the outlier."""
    module, _, _ = build(name)
    outliers = 0
    for parameter in module.parameters():
        assert float(parameter.std()) > 0.01
        if parameter.shape == (HIDDEN,):
            outliers += float(parameter[OUTLIER_CHANNEL]) == OUTLIER
    assert outliers >= LAYERS + 1  # one norm a layer at least, and the last


def test_unknown_architecture_suggests() -> None:
    with pytest.raises(UserError, match="did you mean llama") as caught:
        build("lama")
    assert caught.value.exit_code == 2
