"""Files with ONNX Runtime's fused operators hold them, load, and compute what the plain model computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from qcompile.errors import UserError
from qcompile.models.architectures import build, random_inputs
from qcompile.models.fused import FUSED, fused

TOLERANCE = 1e-5  # relative to the largest output; measured: at most 2e-6


def padded(batch: int, sequence: int) -> dict[str, torch.Tensor]:
    mask = torch.ones(batch, sequence, dtype=torch.int64)
    mask[-1, max(1, sequence // 2) :] = 0
    return random_inputs({"input_ids": torch.ones_like(mask), "attention_mask": mask}, seed=sequence)


@pytest.mark.parametrize("name", FUSED)
def test_fused_equals_torch(name: str, tmp_path: Path) -> None:
    import onnxruntime

    path = fused(name, tmp_path)
    present = {node.op_type for node in onnx.load(path).graph.node}
    assert set(FUSED[name].operators) <= present
    module, _, _ = build(FUSED[name].architecture)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for inputs in (padded(2, 10), padded(3, 17), padded(1, 1)):
        with torch.no_grad():
            expected = module(**inputs)[0].numpy()
        actual = session.run(None, {key: value.numpy() for key, value in inputs.items()})[0]
        keep = inputs["attention_mask"].numpy().astype(bool)
        assert np.abs(actual - expected)[keep].max() < TOLERANCE * np.abs(expected).max()


def test_unknown_fused_model_suggests() -> None:
    with pytest.raises(UserError, match="did you mean llama"):
        fused("llama_gka", Path("unused"))
