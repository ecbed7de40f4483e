"""Models that hold ONNX Runtime's fused operators, as users' files do; each has a plain reference."""

from __future__ import annotations

import dataclasses
import logging
import os
import warnings
from collections.abc import Callable
from pathlib import Path

from qcompile.errors import unknown_name
from qcompile.models.architectures import HEADS, HIDDEN, cached_export


@dataclasses.dataclass(frozen=True)
class Variant:
    """A fused model: the architecture whose function it computes, how it is made, what it must contain."""

    architecture: str
    make: Callable[[str, Path], None]
    operators: tuple[str, ...]


def fused(name: str, folder: str | os.PathLike[str]) -> Path:
    """Write ``folder/<name>_fused.onnx`` and return its path; inputs and output are the architecture's."""
    if name not in FUSED:
        raise unknown_name("fused model", name, FUSED)
    path = Path(folder) / f"{name}_fused.onnx"
    path.parent.mkdir(parents=True, exist_ok=True)
    FUSED[name].make(FUSED[name].architecture, path)
    return path


def _by_optimizer(architecture: str, path: Path) -> None:
    """What ``onnxruntime.transformers.optimizer`` makes of the plain export."""
    from onnxruntime.transformers.optimizer import optimize_model

    plain = cached_export(architecture)
    kind = "bert" if architecture.endswith("bert") else "gpt2"
    logging.getLogger("onnxruntime.transformers").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = optimize_model(str(plain), model_type=kind, num_heads=HEADS, hidden_size=HIDDEN, opt_level=0)
    model.save_model_to_file(str(path))


def _by_session(architecture: str, path: Path) -> None:
    """What an ONNX Runtime session saves after its own extended optimisation."""
    import onnxruntime

    plain = cached_export(architecture)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(path)
    options.log_severity_level = 3
    onnxruntime.InferenceSession(plain, options, providers=["CPUExecutionProvider"])


def _by_hand(builder: str) -> Callable[[str, Path], None]:
    def make(architecture: str, path: Path) -> None:
        import onnx_ir as ir

        from qcompile.models import fused_graphs

        ir.save(getattr(fused_graphs, builder)(), path)

    return make


FUSED: dict[str, Variant] = {
    "bert": Variant("bert", _by_optimizer, ("SkipLayerNormalization", "BiasGelu")),
    "distilbert": Variant("distilbert", _by_optimizer, ("EmbedLayerNormalization", "SkipLayerNormalization")),
    "gpt2": Variant("gpt2", _by_optimizer, ("SkipLayerNormalization", "FastGelu")),
    "llama": Variant(
        "llama", _by_optimizer, ("SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization")
    ),
    "llama_session": Variant("llama", _by_session, ("QuickGelu",)),
    "bert_attention": Variant("bert", _by_hand("bert_attention"), ("Attention", "SkipLayerNormalization")),
    "bert_mha": Variant("bert", _by_hand("bert_mha"), ("MultiHeadAttention", "BiasGelu")),
    "gpt2_attention": Variant("gpt2", _by_hand("gpt2_attention"), ("Attention", "FastGelu")),
    "llama_gqa": Variant(
        "llama", _by_hand("llama_gqa"), ("GroupQueryAttention", "SkipSimplifiedLayerNormalization")
    ),
    "llama_rotary": Variant(
        "llama", _by_hand("llama_rotary"), ("GroupQueryAttention", "RotaryEmbedding", "QuickGelu")
    ),
}
