"""A Hugging Face folder (config.json + safetensors) in, ONNX out; nothing is fetched from a network."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcompile.capture.torch_model import DEFAULT_OPSET, capture_module, capture_with_past
from qcompile.errors import UserError

if TYPE_CHECKING:
    import torch

TEXT_SHAPES = {"input_ids": {0: "batch", 1: "sequence"}, "attention_mask": {0: "batch", 1: "sequence"}}
CLIPS = "qcompile_training"  # where training.quantization_aware leaves its settings in a config
DECODER_SHAPES = {"decoder_input_ids": {0: "batch", 1: "decoder_sequence"}}
IMAGE_SHAPES = {"pixel_values": {0: "batch"}}


def capture_hf_folder(
    folder: str | os.PathLike[str],
    workdir: str | os.PathLike[str],
    *,
    opset: int = DEFAULT_OPSET,
    attention: str = "sdpa",
    allow_pickle: bool = False,
    with_past: bool = False,
) -> Path:
    """Write ``workdir/model.onnx`` for the model in ``folder`` and return its path.

    The class is the one that config.json names under ``architectures``; weights are loaded as float32. Batch
    and sequence are dynamic; the key/value cache is left out unless ``with_past``. attention is "sdpa" or
    "eager"; a model that has no sdpa form (BLOOM) falls back to eager. ``.bin`` weights are pickles, which can
    run code when loaded: they are refused unless ``allow_pickle``. Raises UserError.
    """
    folder = Path(folder)
    config = read_config(folder)
    _check_weights(folder, allow_pickle)
    module = load_pretrained(folder, config, attention)
    if with_past:
        return capture_with_past(module, workdir, opset=opset)
    inputs, shapes = example_inputs(module)
    return capture_module(module, inputs, shapes, workdir, opset=opset, output_names=[output_name(module)])


def load_pretrained(folder: Path, config: dict[str, Any], attention: str = "sdpa") -> torch.nn.Module:
    """The module of ``folder`` in float32 and eval mode, set up so that it returns one tensor."""
    transformers = _transformers()
    cls = _model_class(transformers, config, folder)
    with quiet_transformers():
        try:
            module, loading = _from_pretrained(cls, folder, attention)
        except Exception as error:  # whatever the model's code and the weights' reader raise
            raise UserError(
                f"transformers could not load the model: {type(error).__name__}: {error}",
                where=str(folder),
                hint="does AutoModel.from_pretrained(FOLDER) work? If not, save it again with save_pretrained",
            ) from error
    module = prepare(module)
    if CLIPS in config:
        _restore_clips(module, folder, config)
    absent = sorted(set(loading["missing_keys"]) & set(module.state_dict()))
    if absent:  # transformers only warns, and gives them random values
        raise UserError(
            f"{len(absent)} weights of {cls.__name__} are not in the files: {', '.join(absent[:3])}...",
            where=str(folder),
            hint="the class is chosen by 'architectures' in config.json",
        )
    return module


def _restore_clips(module: Any, folder: Path, config: dict[str, Any]) -> None:
    """Put the learned ranges, which are among the weights, back in front of their linears; UserError without them."""
    import torch
    from safetensors.torch import load_file

    from qcompile.training.aware import restore

    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors.update({name: value for name, value in load_file(path).items() if ".clip." in name})
    for path in [] if tensors else sorted(folder.glob("pytorch_model*.bin")):
        tensors.update(torch.load(path, map_location="cpu", weights_only=True))
    restore(module, config[CLIPS], tensors).eval().requires_grad_(False)


def prepare(module: Any) -> torch.nn.Module:
    """Set a transformers model up for export: eval mode, no cache, no pooler, one tensor as its output."""
    import torch

    module.eval().requires_grad_(False)
    for part in module.modules():  # an encoder-decoder's halves have configs of their own
        if hasattr(part, "config"):
            part.config.use_cache = False
    if getattr(module, "pooler", None) is not None:
        module.pooler = None
    assert isinstance(module, torch.nn.Module)
    return module


def output_name(module: Any) -> str:
    """``logits`` for a model with a head, ``last_hidden_state`` for a bare one."""
    is_bare = type(module).__name__.endswith("Model") and not type(module).__name__.endswith("LMHeadModel")
    return "last_hidden_state" if is_bare else "logits"


def example_inputs(module: Any) -> tuple[dict[str, torch.Tensor], dict[str, dict[int, str]]]:
    """Example inputs (batch 2, sequence 10, the second row padded) and the dynamic axes of each."""
    import torch

    config = module.config
    if getattr(module, "main_input_name", "input_ids") == "pixel_values":
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return {"pixel_values": torch.zeros(2, config.num_channels, height, width)}, IMAGE_SHAPES
    ids = torch.arange(20).reshape(2, 10) % config.get_text_config().vocab_size
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if not config.is_encoder_decoder:
        return inputs, TEXT_SHAPES
    return inputs | {"decoder_input_ids": ids[:, :6].clone()}, TEXT_SHAPES | DECODER_SHAPES


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars, load reports or network: the folder is all there is."""
    from transformers.utils import logging as hf_logging

    verbosity = hf_logging.get_verbosity()
    bar = hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bar:
            hf_logging.enable_progress_bar()


def _transformers() -> Any:
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"a Hugging Face folder needs {' and '.join(missing)}",
            hint="pip install 'qcompile-nn[torch]', or export the model to ONNX and pass the file",
        )
    import transformers

    return transformers


def read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"no config.json in {folder}", hint="MODEL must be a saved transformers folder")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        hint = "the folder is damaged: save the model again with save_pretrained"
        raise UserError(f"config.json is not JSON: {error}", where=str(path), hint=hint) from error
    if not isinstance(config, dict):
        hint = "the folder is damaged: save the model again with save_pretrained"
        raise UserError("config.json does not hold an object", where=str(path), hint=hint)
    return config


def _check_weights(folder: Path, allow_pickle: bool) -> None:
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(folder.glob("pytorch_model*.bin"))
    if not pickles:
        raise UserError(f"no weights in {folder}", hint="expected *.safetensors beside config.json")
    if not allow_pickle:
        raise UserError(
            f"{pickles[0].name} is a pickle, and loading a pickle can run any code",
            where=str(folder),
            hint="convert it to safetensors, or allow it (--allow-pickle, allow_pickle=True) if you trust its author",
        )


def _model_class(transformers: Any, config: dict[str, Any], folder: Path) -> Any:
    names = config.get("architectures") or []
    for name in names:
        found = getattr(transformers, name, None)
        if found is not None:
            return found
    if names:
        raise UserError(
            f"transformers {transformers.__version__} has no class {' or '.join(names)}",
            where=str(folder / "config.json"),
            hint="code inside a model folder is never run; wrap the model in package.module:factory",
        )
    return transformers.AutoModel


def _from_pretrained(cls: Any, folder: Path, attention: str) -> tuple[Any, dict[str, Any]]:
    """The module, and what transformers says about its loading."""
    import torch

    options: dict[str, Any] = {
        "dtype": torch.float32,
        "local_files_only": True,
        "output_loading_info": True,
        "attn_implementation": attention,
    }
    try:
        loaded: tuple[Any, dict[str, Any]] = cls.from_pretrained(folder, **options)
    except ValueError as error:
        if attention == "eager" or "attention" not in str(error).lower():
            raise
        loaded = cls.from_pretrained(folder, **options | {"attn_implementation": "eager"})
    return loaded
