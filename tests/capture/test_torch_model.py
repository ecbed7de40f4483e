"""Capture of modules, factories and Hugging Face folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from qcompile.capture import hf_folder, torch_model
from qcompile.capture.hf_folder import capture_hf_folder
from qcompile.capture.torch_model import capture_factory, capture_module
from qcompile.errors import UserError


class Mlp(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = torch.nn.Linear(8, 16)
        self.drop = torch.nn.Dropout(0.5)
        self.down = torch.nn.Linear(16, 8)

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        hidden = torch.nn.functional.gelu(self.up(x)) * gate
        return self.down(self.drop(hidden))  # type: ignore[no-any-return]


class Branches(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1 if x.sum() > 0 else x - 1


INPUTS = {"gate": torch.ones(3, 1), "x": torch.randn(3, 8)}
SHAPES = {"x": {0: "batch"}, "gate": {0: "batch"}}


def difference(module: torch.nn.Module, path: Path, inputs: dict[str, torch.Tensor]) -> float:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    actual = session.run(None, {name: value.numpy() for name, value in inputs.items()})[0]
    with torch.no_grad():
        result = module.eval()(**inputs)
        expected = (result if isinstance(result, torch.Tensor) else result[0]).numpy()
    return float(np.abs(actual - expected).max())


def test_module_runs_at_other_batches_and_keeps_its_names(tmp_path: Path) -> None:
    module = Mlp().train()
    path = capture_module(module, INPUTS, SHAPES, tmp_path, output_names=["y"])
    assert module.training  # and dropout is not in the file:
    assert difference(module, path, {"x": torch.randn(5, 8), "gate": torch.rand(5, 1)}) < 1e-6
    graph = onnx.load(path).graph
    assert [value.name for value in graph.input] == ["x", "gate"]  # forward's order, not the dict's
    assert [value.name for value in graph.output] == ["y"]
    scopes = [prop.value for node in graph.node for prop in node.metadata_props if "name_scopes" in prop.key]
    assert any("'up'" in scope for scope in scopes)


def test_file_holds_no_path_of_this_machine(tmp_path: Path) -> None:
    path = capture_module(Mlp(), INPUTS, SHAPES, tmp_path)
    assert str(Path(__file__).parent).encode() not in path.read_bytes()


@pytest.mark.parametrize("opset", [18, 24])
def test_opset_is_the_one_asked_for(opset: int, tmp_path: Path) -> None:
    path = capture_module(Mlp(), (INPUTS["x"], INPUTS["gate"]), None, tmp_path, opset=opset)
    model = onnx.load(path)
    assert model.opset_import[0].version == opset
    assert model.ir_version <= 13  # what ONNX Runtime 1.31 reads


def test_large_weights_go_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_model, "EXTERNAL_DATA_BYTES", 100)
    path = capture_module(Mlp(), INPUTS, SHAPES, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"model.onnx", "model.onnx.data"}
    assert difference(Mlp(), path, INPUTS) < 1e-6


def test_untraceable_module_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="could not export Branches") as caught:
        capture_module(Branches(), torch.ones(3), {"x": {0: "batch"}}, tmp_path)
    assert Path(__file__).name in caught.value.where
    assert "branch on tensor values" in caught.value.hint


@pytest.mark.parametrize(
    ("inputs", "shapes", "message"),
    [
        (INPUTS, {"y": {0: "batch"}}, "names y, which is no example input"),
        (INPUTS, {"x": {2: "batch"}}, r"dynamic axis 2 of 'x' is outside its shape \(3, 8\)"),
        ((INPUTS["x"],) * 3, None, "3 example inputs for 2 arguments"),
        ({"x": 3.0, "gate": INPUTS["gate"]}, None, "must be tensors; not so: x"),
    ],
)
def test_wrong_inputs_are_named(inputs: Any, shapes: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        capture_module(Mlp(), inputs, shapes, tmp_path)


FACTORIES = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(16, 4)
    def forward(self, input_ids):
        return self.table(input_ids)

def pair(): return Net().eval(), {"input_ids": torch.zeros(2, 3, dtype=torch.int64)}
def triple(): return *pair(), {"input_ids": {1: "sequence"}}
def attributes():
    net, net.example_inputs = Net(), (torch.zeros(2, 3, dtype=torch.int64),)
    return net
def bare(): return Net()
def number(): return 3
def wrong_pair(): return 1, 2
def fails(): raise OSError("no weights here")
constant = 5
"""


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "user_models.py").write_text(FACTORIES)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("name", "axes"),
    [("pair", ["batch", "sequence"]), ("triple", [2, "sequence"]), ("attributes", ["batch", "sequence"])],
)
def test_factory_forms(name: str, axes: list[str | int], factories: Path) -> None:
    path = capture_factory(f"user_models:{name}", factories)
    dims = onnx.load(path).graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_param or dim.dim_value for dim in dims] == axes


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("user_models", "is no factory"),
        ("user_modelz:pair", "cannot import 'user_modelz': ModuleNotFoundError"),
        ("user_models:pear", "did you mean pair"),
        ("user_models:constant", "is a int, not a function"),
        ("user_models:fails", "failed: OSError: no weights here"),
        ("user_models:number", "returned a int"),
        ("user_models:wrong_pair", r"returned \(int, int\)"),
        ("user_models:bare", "example_inputs"),
    ],
)
def test_factory_mistakes(spec: str, message: str, factories: Path) -> None:
    with pytest.raises(UserError, match=message):
        capture_factory(spec, factories / "out")


def tiny_llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    return LlamaForCausalLM(config)


def test_hf_folder_equals_torch(tmp_path: Path) -> None:
    module = tiny_llama()
    module.half().save_pretrained(tmp_path / "hf")
    path = capture_hf_folder(tmp_path / "hf", tmp_path / "out")
    ids = torch.randint(0, 32, (3, 7))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert difference(module.float(), path, inputs) < 1e-6
    assert [value.name for value in onnx.load(path).graph.output] == ["logits"]


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}')
    (tmp_path / "pytorch_model.bin").write_bytes(b"not read")
    with pytest.raises(UserError, match="loading a pickle can run any code"):
        capture_hf_folder(tmp_path, tmp_path / "out")


def test_allowed_pickle_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tiny_llama()
    torch.save(module.state_dict(), tmp_path / "pytorch_model.bin")
    _write_config(module, tmp_path)
    captured: list[torch.nn.Module] = []
    monkeypatch.setattr(hf_folder, "capture_module", lambda module, *_, **__: captured.append(module))
    capture_hf_folder(tmp_path, tmp_path / "out", allow_pickle=True)
    assert torch.equal(captured[0].state_dict()["lm_head.weight"], module.state_dict()["lm_head.weight"])


def test_absent_weights_are_not_made_up(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    module = tiny_llama()
    weights = {name: value for name, value in module.state_dict().items() if "q_proj" not in name}
    save_file(weights, tmp_path / "model.safetensors")
    _write_config(module, tmp_path)
    with pytest.raises(UserError, match=r"1 weights of LlamaForCausalLM are not in the files: .*q_proj"):
        capture_hf_folder(tmp_path, tmp_path / "out")


def _write_config(module: Any, folder: Path) -> None:
    config = module.config.to_dict() | {"architectures": [type(module).__name__]}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "no config.json"),
        ("{", "is not JSON"),
        ("[]", "does not hold an object"),
        ('{"architectures": ["NovelForCausalLM"]}', "has no class NovelForCausalLM"),
        ('{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}', "could not load the model"),
    ],
)
def test_unusable_folders(config: str | None, message: str, tmp_path: Path) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=message):
        capture_hf_folder(tmp_path, tmp_path / "out")


def test_folder_without_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="no weights"):
        capture_hf_folder(tmp_path, tmp_path / "out")
