"""Training for low-bit activations: learned clips at the inputs of linears, a kurtosis regulariser at their outputs.

    model = quantization_aware(model, bits=4, kurtosis=1e-5)
The names below are resolved at their first use; they need torch.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from qcompile.errors import UserError

if TYPE_CHECKING:
    from qcompile.training.aware import parameter_groups, quantization_aware, regularization_loss, restore
    from qcompile.training.clips import ActClip, Lsq, Pact
    from qcompile.training.distillation import distil, distillation_loss, generate_data
    from qcompile.training.history import History, measure, measure_checkpoints
    from qcompile.training.kurtosis import token_kurtosis

_HOME = {
    "ActClip": "clips", "Lsq": "clips", "Pact": "clips",
    "History": "history", "measure": "history", "measure_checkpoints": "history",
    "distil": "distillation", "distillation_loss": "distillation", "generate_data": "distillation",
    "parameter_groups": "aware", "quantization_aware": "aware", "regularization_loss": "aware", "restore": "aware",
    "token_kurtosis": "kurtosis",
}  # fmt: skip
__all__ = [
    "ActClip", "History", "Lsq", "Pact", "distil", "distillation_loss", "generate_data", "measure",
    "measure_checkpoints", "parameter_groups", "quantization_aware", "regularization_loss", "restore",
    "token_kurtosis",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'qcompile.training' has no attribute '{name}'")
    if importlib.util.find_spec("torch") is None:
        raise UserError(f"qcompile.training.{name} needs torch", hint="pip install 'qcompile-nn[torch]'")
    return getattr(importlib.import_module(f"qcompile.training.{_HOME[name]}"), name)
