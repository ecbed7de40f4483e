"""Small random models of every architecture, for equivalence and robustness; never for accuracy.

Two layers, hidden 64, 4 heads, vocabulary 256, one seed. Norm weights, norm biases and linear biases are
random rather than 1 and 0, so that a fold that forgets one of them is seen. Each norm over the hidden axis
has one channel that is 12 times the others: an outlier as pretrained models have.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcompile.capture import hf_folder, torch_cache, torch_model
from qcompile.capture.hf_folder import example_inputs, output_name, prepare, quiet_transformers
from qcompile.capture.torch_model import capture_module, capture_with_past
from qcompile.errors import unknown_name
from qcompile.models.cache import cache_root, cached_folder, exporter_key

if TYPE_CHECKING:
    import torch

VOCAB, HIDDEN, LAYERS, HEADS, FFN, POSITIONS = 256, 64, 2, 4, 128, 64
SEED = 20
OUTLIER_CHANNEL, OUTLIER = 7, 12.0
FIRST_ORDINARY_ID = 3  # the ids below are padding and other special tokens in some architectures

Inputs = dict[str, "torch.Tensor"]
DynamicShapes = dict[str, dict[int, str]]

_LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": FFN,
    "max_position_embeddings": POSITIONS,
}
_GQA = _LLAMA | {"num_key_value_heads": 2}
_TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
_OPT = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "ffn_dim": FFN,
    "max_position_embeddings": POSITIONS,
    "word_embed_proj_dim": HIDDEN,
}
_FALCON = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "ffn_hidden_size": FFN,
    "max_position_embeddings": POSITIONS,
    "bias": False,
    "alibi": False,
}


@dataclasses.dataclass(frozen=True)
class Builder:
    """How to make one architecture: transformers' config and model class, and the config's settings."""

    config: str
    model: str
    settings: dict[str, Any]
    summary: str
    has_sdpa: bool = True

    def __call__(self, attention: str = "sdpa") -> torch.nn.Module:
        """The module in eval mode with its random weights; it returns one tensor."""
        import torch
        import transformers

        config = getattr(transformers, self.config)(**self.settings)
        chosen = attention if self.has_sdpa else "eager"
        with quiet_transformers(), torch.random.fork_rng():
            torch.manual_seed(SEED)
            module = getattr(transformers, self.model)._from_config(config, attn_implementation=chosen)
            prepare(module)
            _randomise(module)
        assert isinstance(module, torch.nn.Module)
        return module


ARCHITECTURES: dict[str, Builder] = {
    "bert": Builder("BertConfig", "BertModel", _LLAMA, "encoder, post-LN, erf-GELU"),
    "roberta": Builder(
        "RobertaConfig", "RobertaModel", _LLAMA | _TOKENS, "encoder, post-LN, positions from padding"
    ),
    "distilbert": Builder(
        "DistilBertConfig",
        "DistilBertModel",
        {
            "vocab_size": VOCAB,
            "dim": HIDDEN,
            "n_layers": LAYERS,
            "n_heads": HEADS,
            "hidden_dim": FFN,
            "max_position_embeddings": POSITIONS,
        },
        "encoder, post-LN, no token types",
    ),
    "gpt2": Builder(
        "GPT2Config",
        "GPT2LMHeadModel",
        {"vocab_size": VOCAB, "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_positions": POSITIONS}
        | _TOKENS,
        "decoder, pre-LN, fused QKV (Conv1D), tanh-GELU",
    ),
    "opt": Builder("OPTConfig", "OPTForCausalLM", _OPT, "decoder, pre-LN, ReLU"),
    "opt_post_ln": Builder(
        "OPTConfig", "OPTForCausalLM", _OPT | {"do_layer_norm_before": False}, "decoder, post-LN, ReLU"
    ),
    "bloom": Builder(
        "BloomConfig",
        "BloomForCausalLM",
        {"vocab_size": VOCAB, "hidden_size": HIDDEN, "n_layer": LAYERS, "n_head": HEADS},
        "decoder, pre-LN, ALiBi, fused QKV interleaved by head",
        has_sdpa=False,
    ),
    "llama": Builder("LlamaConfig", "LlamaForCausalLM", _GQA, "decoder, RMSNorm, SwiGLU, RoPE, GQA"),
    "qwen2": Builder("Qwen2Config", "Qwen2ForCausalLM", _GQA, "as llama, with biases on Q, K, V"),
    "qwen3": Builder(
        "Qwen3Config",
        "Qwen3ForCausalLM",
        _GQA | {"head_dim": 16},
        "as llama, RMSNorm on each head of Q and K",
    ),
    "gemma": Builder(
        "GemmaConfig",
        "GemmaForCausalLM",
        _GQA | {"head_dim": 32},
        "RMSNorm by 1 + weight, tanh-GEGLU, scaled embedding, head_dim * heads != hidden",
    ),
    "phi": Builder("PhiConfig", "PhiForCausalLM", _LLAMA, "parallel attention and FFN, one LN, partial RoPE"),
    "falcon": Builder(
        "FalconConfig",
        "FalconForCausalLM",
        _FALCON | {"parallel_attn": True, "multi_query": True, "new_decoder_architecture": False},
        "parallel attention and FFN, one LN, multi-query, fused QKV",
    ),
    "falcon_new": Builder(
        "FalconConfig",
        "FalconForCausalLM",
        _FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2},
        "parallel attention and FFN, a LN for each, GQA, fused QKV",
    ),
    "mixtral": Builder(
        "MixtralConfig",
        "MixtralForCausalLM",
        _GQA | {"num_local_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "batched_mm"},
        "as llama, 2 of 4 experts for each token",
    ),
    "t5": Builder(
        "T5Config",
        "T5ForConditionalGeneration",
        {
            "vocab_size": VOCAB,
            "d_model": HIDDEN,
            "d_kv": HIDDEN // HEADS,
            "d_ff": FFN,
            "num_layers": LAYERS,
            "num_heads": HEADS,
            "feed_forward_proj": "gated-gelu",
            "decoder_start_token_id": 0,
        },
        "encoder and decoder, RMSNorm, relative position bias, cross attention, tanh-GEGLU",
    ),
    "vit": Builder(
        "ViTConfig",
        "ViTForImageClassification",
        {
            "hidden_size": HIDDEN,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "intermediate_size": FFN,
            "image_size": 32,
            "patch_size": 8,
            "num_labels": 10,
        },
        "image encoder, pre-LN, patch convolution, class token",
    ),
}


def build(name: str, attention: str = "sdpa") -> tuple[torch.nn.Module, Inputs, DynamicShapes]:
    """The module, example inputs (batch 2, sequence 10, the second row padded), and their dynamic axes."""
    if name not in ARCHITECTURES:
        raise unknown_name("architecture", name, ARCHITECTURES)
    module = ARCHITECTURES[name](attention)
    inputs, shapes = example_inputs(module)
    return module, random_inputs(inputs), shapes


def random_inputs(like: Inputs, seed: int = SEED) -> Inputs:
    """Inputs of the same names, shapes and masks as ``like``: ordinary token ids, normal pixels."""
    import torch

    generator = torch.Generator().manual_seed(seed)

    def fill(name: str, value: torch.Tensor) -> torch.Tensor:
        if name.endswith("mask"):
            return value.clone()
        if value.is_floating_point():
            return torch.randn(value.shape, generator=generator)
        return torch.randint(FIRST_ORDINARY_ID, VOCAB, value.shape, generator=generator)

    return {name: fill(name, value) for name, value in like.items()}


def export(
    name: str,
    folder: str | os.PathLike[str],
    *,
    opset: int = 20,
    attention: str = "sdpa",
    with_past: bool = False,
) -> Path:
    """Write ``folder/<name>.onnx`` and return its path; ``with_past``: with the key/value cache."""
    if with_past:
        written = capture_with_past(build(name, attention)[0], folder, opset=opset)
        return written.replace(Path(folder) / f"{name}.onnx")
    module, inputs, shapes = build(name, attention)
    written = capture_module(module, inputs, shapes, folder, opset=opset, output_names=[output_name(module)])
    return written.replace(Path(folder) / f"{name}.onnx")


def cached_export(
    name: str,
    *,
    opset: int = 20,
    attention: str = "sdpa",
    with_past: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Path:
    """As ``export``, cached until a library or the code that makes it changes."""
    if name not in ARCHITECTURES:
        raise unknown_name("architecture", name, ARCHITECTURES)
    key = f"{exporter_key()}-{_source_key()}-opset{opset}-{attention}{'-past' if with_past else ''}"

    def make(folder: Path) -> None:
        export(name, folder, opset=opset, attention=attention, with_past=with_past)

    return cached_folder(cache_root(cache_dir) / "small" / f"{name}-{key}", make) / f"{name}.onnx"


def _source_key() -> str:
    """A digest of the code that decides what an export holds."""
    sources = (__file__, torch_model.__file__, torch_cache.__file__, hf_folder.__file__)
    return hashlib.sha256(b"".join(Path(source).read_bytes() for source in sources)).hexdigest()[:12]


def _randomise(module: torch.nn.Module) -> None:
    """Give every parameter a value that a wrong fold cannot hide behind."""
    import torch

    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim >= 2:
                torch.nn.init.normal_(parameter, std=_weight_std(name))
            elif name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.3)
            else:
                _randomise_norm(parameter)


def _weight_std(name: str) -> float:
    """1/sqrt(fan-in) keeps activations near 1 through the layers; embeddings are a table, not a product.

    T5 does not divide its scores by sqrt(d): its own initialisation puts that factor into the queries, and
    without it the softmax is so steep that a weight's last bit shows in the output.
    """
    is_table = "embed" in name or name.endswith(("wte.weight", "wpe.weight", "shared.weight"))
    if name.endswith("Attention.q.weight"):
        return 1 / math.sqrt(HIDDEN * HIDDEN / HEADS)
    return 0.5 if is_table else HIDDEN**-0.5


def _randomise_norm(weight: torch.Tensor) -> None:
    import torch

    torch.nn.init.normal_(weight, mean=1.0, std=0.25)
    if weight.shape == (HIDDEN,):
        weight[OUTLIER_CHANNEL] = OUTLIER
