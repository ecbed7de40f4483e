"""The front door: decides what MODEL is, captures it, and notes where everything came from."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import onnx_ir as ir

from qcompile import manifest
from qcompile.calibration.given import GivenSamples
from qcompile.errors import UserError
from qcompile.graph.provenance import remember
from qcompile.graph.workspace import Workspace
from qcompile.progress import step, warn

_TOKENIZER = "tokenizer.json"
_TOKENIZER_FILES = ("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.*", "*.model")
_WEIGHT_FILES = ("config.json", "*.safetensors", "*.bin", "*.index.json")


@dataclasses.dataclass(frozen=True)
class Taken:
    """A captured model. ``source`` goes into the manifest; ``tokenizer`` is one found beside the model."""

    model: ir.Model
    name: str
    source: dict[str, Any]
    tokenizer: Path | None
    bytes: int


def take(
    model: Any,
    workspace: Workspace,
    *,
    example_inputs: Any = None,
    dynamic_shapes: Any = None,
    allow_pickle: bool = False,
    with_past: bool = False,
) -> Taken:
    """Capture ``model``: an .onnx file, a folder, ``module:factory``, an ``ir.Model`` or a torch module.

    ``with_past``: a Hugging Face folder is exported with its key/value cache.
    """
    if with_past and not _is_hf_folder(model):
        hint = "leave --with-past out: an .onnx file has a cache already, or its exporter must give it one"
        raise UserError("only a Hugging Face folder can be exported with its cache", hint=hint)
    if isinstance(model, ir.Model):
        return _from_ir(model, workspace)
    if isinstance(model, str | Path):
        return _from_text(str(model), workspace, allow_pickle, with_past)
    if _is_torch_module(model):
        return _from_torch(model, workspace, example_inputs, dynamic_shapes)
    raise UserError(
        f"cannot compile a {type(model).__name__}",
        hint="give an .onnx file, a Hugging Face folder, 'module:factory', an ir.Model or a torch module",
    )


def _is_hf_folder(model: Any) -> bool:
    return isinstance(model, str | Path) and (Path(model) / "config.json").is_file()


def _from_text(text: str, workspace: Workspace, allow_pickle: bool, with_past: bool) -> Taken:
    path = Path(text)
    if path.is_dir():
        if ((path / manifest.FILE).is_file() or (path / "model.onnx").is_file()) and not with_past:
            return _from_file(path / "model.onnx", workspace)
        return _from_folder(path, workspace, allow_pickle, with_past)
    if path.is_file():
        return _from_file(path, workspace)
    module, colon, attribute = text.partition(":")
    if colon and module and attribute and "/" not in text:
        return _from_factory(text, workspace)
    raise UserError(
        f"no model at '{text}'",
        hint="give an .onnx file, a Hugging Face folder or package.module:factory",
    )


def _from_file(path: Path, workspace: Workspace) -> Taken:
    if not path.is_file():
        raise UserError(f"'{path.parent}' holds no model.onnx", hint="name the .onnx file itself")
    with step(f"reading {path.name}"):
        model = _load(path, workspace)
        source, size = _file_source(path)
    beside = path.parent if (path.parent / _TOKENIZER).is_file() else None
    name = path.stem if path.stem != "model" else path.resolve().parent.name
    return Taken(model, name, source, beside, size)


def _from_folder(folder: Path, workspace: Workspace, allow_pickle: bool, with_past: bool) -> Taken:
    if not (folder / "config.json").is_file():
        raise UserError(
            f"'{folder}' holds neither model.onnx nor config.json",
            hint="name the .onnx file itself, or give a Hugging Face folder",
        )
    from qcompile.capture.hf_folder import capture_hf_folder

    with step(f"exporting {folder.name}"):
        path = capture_hf_folder(
            folder, _capture_dir(workspace), allow_pickle=allow_pickle, with_past=with_past
        )
        model = _load(path, workspace)
    files = [p for pattern in _WEIGHT_FILES for p in folder.glob(pattern)]
    source = {"kind": "hugging_face", "files": manifest.describe_files(folder, files)}
    beside = folder if (folder / _TOKENIZER).is_file() else None
    return Taken(model, folder.resolve().name, source, beside, _weights_bytes(model))


def _from_factory(text: str, workspace: Workspace) -> Taken:
    from qcompile.capture.torch_model import capture_factory

    with step(f"exporting {text}"):
        path = capture_factory(text, _capture_dir(workspace))
        model = _load(path, workspace)
    source = {"kind": "factory", "factory": text, "files": _file_source(path)[0]["files"]}
    return Taken(model, text.partition(":")[2], source, None, _weights_bytes(model))


def _from_torch(module: Any, workspace: Workspace, example_inputs: Any, dynamic_shapes: Any) -> Taken:
    from qcompile.capture.torch_model import capture_module, default_dynamic_shapes, named_inputs

    if example_inputs is None:
        raise UserError("a torch module needs example_inputs", hint="compile(module, example_inputs={...})")
    inputs = named_inputs(module, example_inputs)
    shapes = default_dynamic_shapes(inputs) if dynamic_shapes is None else dynamic_shapes
    name = type(module).__name__
    with step(f"exporting {name}"):
        path = capture_module(module, inputs, shapes, _capture_dir(workspace))
        model = _load(path, workspace)
    source = {"kind": "torch", "class": name, "files": _file_source(path)[0]["files"]}
    return Taken(model, name, source, None, _weights_bytes(model))


def _from_ir(model: ir.Model, workspace: Workspace) -> Taken:
    own = model.clone()  # passes edit in place, and the caller's model is the caller's
    remember(own)
    path = workspace.save(own, "captured")
    source = {"kind": "onnx_ir", "sha256": manifest.sha256(path)}
    return Taken(own, own.graph.name or "model", source, None, _weights_bytes(own))


def _load(path: Path, workspace: Workspace) -> ir.Model:
    from qcompile.capture.onnx_file import load_onnx

    model = load_onnx(path, workspace)
    remember(model)
    return model


def _capture_dir(workspace: Workspace) -> Path:
    folder = workspace.root / "capture"
    folder.mkdir(exist_ok=True)
    return folder


def _is_torch_module(model: Any) -> bool:
    torch = sys.modules.get("torch")  # a torch module can only exist where torch is imported
    return torch is not None and isinstance(model, torch.nn.Module)


def _weights_bytes(model: ir.Model) -> int:
    held = (v.const_value for v in model.graph.initializers.values())
    return sum(tensor.nbytes for tensor in held if tensor is not None)


def _file_source(path: Path) -> tuple[dict[str, Any], int]:
    files = manifest.describe_files(path.parent, [path, *external_files(path)])
    return {"kind": "onnx", "name": path.name, "files": files}, sum(f["bytes"] for f in files.values())


def external_files(path: Path) -> list[Path]:
    """The external data files that the ONNX file at ``path`` refers to."""
    import onnx

    proto = onnx.load(str(path), load_external_data=False)
    names = {e.value for t in proto.graph.initializer for e in t.external_data if e.key == "location"}
    return [path.parent / name for name in sorted(names) if (path.parent / name).is_file()]


# --------------------------------------------------------------------------- calibration and tokenizer


def take_samples(
    model: ir.Model,
    calibration: Any,
    tokenizer: Path | None,
    max_samples: int,
    max_length: int,
    seed: int = 0,
    workspace: Workspace | None = None,
) -> tuple[Any, dict[str, Any]]:
    """The calibration samples, and what the manifest says of them; ``seed`` is that of random data.

    Random samples are as long as ``model`` runs, which is tried where a ``workspace`` is given.
    """
    if calibration is not None and not isinstance(calibration, str | Path):
        given = GivenSamples(calibration, model)
        return given, {"kind": "arrays", "samples": len(given), "sha256": given.digest()}
    from qcompile.calibration.samples import SampleSet, load_samples

    path = None if calibration is None else Path(calibration)

    def load(length: int) -> SampleSet:
        return load_samples(model, path, tokenizer, max_samples=max_samples, max_length=length, seed=seed)

    samples = load(max_length)
    if samples.is_random and workspace is not None and model.graph.outputs:
        from qcompile.calibration.lengths import runnable
        from qcompile.calibration.runner import OrtRunner

        samples, max_length = runnable(model, load, max_length, OrtRunner(workspace))
    for text in samples.warnings_:
        warn(text)
    described: dict[str, Any] = {"samples": len(samples), "held_out": len(samples.held_out), "max_length": max_length}
    if path is None:
        return samples, described | {"kind": "random" if samples.is_random else "built-in"}
    root = path if path.is_dir() else path.parent
    files = manifest.files_below(path) if path.is_dir() else [path]
    return samples, described | {"kind": "files", "files": manifest.describe_files(root, files)}


def describe_tokenizer(folder: Path | None) -> dict[str, Any] | None:
    """The digests of a tokenizer's files."""
    if folder is None:
        return None
    if not folder.exists():
        raise UserError(f"no tokenizer at '{folder}'", hint="give tokenizer.json or the folder that holds it")
    root = folder if folder.is_dir() else folder.parent
    found = {p for pattern in _TOKENIZER_FILES for p in root.glob(pattern)}
    return {"files": manifest.describe_files(root, found if folder.is_dir() else [folder])}
