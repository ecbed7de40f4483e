"""From a trained module to a program: learned ranges are kept, and the program computes what training saw."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

import qcompile
from qcompile.capture.hf_folder import example_inputs, load_pretrained, read_config
from qcompile.capture.torch_model import capture_module
from qcompile.errors import UserError
from qcompile.graph.learned import bits_of, learned_grid
from qcompile.graph.linears import find_linears
from qcompile.models.architectures import VOCAB, Builder, random_inputs
from qcompile.quant.schemes import ActivationScheme, WeightScheme
from qcompile.recipe import Recipe, Rule
from qcompile.training import quantization_aware
from qcompile.training.aware import aware_linears
from qcompile.training.clips import Quantiser

LLAMA = {
    "vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 128, "max_position_embeddings": 64,
}  # fmt: skip
BERT = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
OPT = {
    "vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "ffn_dim": 128,
    "max_position_embeddings": 64, "word_embed_proj_dim": 64, "activation_function": "gelu", "dropout": 0.0,
}  # fmt: skip
MODELS = {
    "opt": Builder("OPTConfig", "OPTForCausalLM", OPT, ""),
    "llama": Builder("LlamaConfig", "LlamaForCausalLM", LLAMA, ""),
    "bert": Builder("BertConfig", "BertModel", BERT, ""),
}
BITS = {"opt": 4, "llama": 4, "bert": 8}
LINEARS = Recipe(
    name="linears",
    rules=(Rule(weights=WeightScheme(bits=4), activations=ActivationScheme(bits=8, observer="minmax")),),
)


@dataclasses.dataclass
class Trained:
    """A module with learned ranges, what it takes, and its capture."""

    name: str
    module: Any
    inputs: dict[str, torch.Tensor]
    shapes: dict[str, dict[int, str]]
    path: Path

    def feeds(self) -> dict[str, np.ndarray]:
        return {name: value.numpy() for name, value in self.inputs.items()}

    def calibration(self) -> list[dict[str, np.ndarray]]:
        made = (random_inputs(self.inputs, seed) for seed in range(1, 4))
        return [{name: value.numpy() for name, value in one.items()} for one in made]

    @torch.no_grad()
    def output(self) -> np.ndarray:
        found: np.ndarray = self.module(**self.inputs)[0].numpy()
        real: np.ndarray = found[self.inputs["attention_mask"].numpy() == 1]
        return real

    def compiled(self, passes: str, dump: Path | None = None) -> np.ndarray:
        """The compiled program's output."""
        options: dict[str, Any] = {"calibration": self.calibration(), "passes": passes, "dump": dump}
        with qcompile.compile(ir.load(self.path), recipe=LINEARS, **options) as program:
            found = next(iter(program.run(self.feeds()).values()))
            kernels = program.manifest["kernels"]
        inside = [kernel for kernel in kernels if kernel["site"] in aware_linears(self.module)]
        assert inside and all(kernel["kernel"] == "MatMulIntegerToFloat" for kernel in inside)
        real: np.ndarray = found[self.feeds()["attention_mask"] == 1]
        return real


@pytest.fixture(scope="module", params=MODELS)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    module: Any = MODELS[request.param]().requires_grad_(True)
    inputs, shapes = example_inputs(module)
    inputs = random_inputs(inputs)
    quantization_aware(module, bits=BITS[request.param]).train()
    with torch.no_grad():
        module(**inputs)
        for place, linear in enumerate(aware_linears(module).values()):
            clip: Any = linear.clip
            clip.unit *= 1 + 0.01 * place  # a range for each, as after training
    path = capture_module(module, inputs, shapes, tmp_path_factory.mktemp(request.param))
    module.eval()
    return Trained(request.param, module, inputs, shapes, path)


def test_every_learned_range_is_in_the_graph(trained: Trained) -> None:
    model = ir.load(trained.path)
    dequantized = [node for node in model.graph if node.op_type == "DequantizeLinear"]
    grids = [learned_grid(node.outputs[0]) for node in dequantized]
    clips = [part for part in trained.module.modules() if isinstance(part, Quantiser)]
    assert len(grids) == len(clips) < len(aware_linears(trained.module))
    assert all(grid is not None and bits_of(grid) == BITS[trained.name] for grid in grids)
    learned = sorted(clip.grid()[0].item() for clip in clips)
    found = sorted(float(grid.scale) for grid in grids if grid is not None)
    assert found == pytest.approx(learned, rel=1e-6)


@pytest.mark.parametrize("passes", ["rtn", "gptq"])
def test_the_program_is_the_trained_model_with_rounded_weights(trained: Trained, passes: str, tmp_path: Path) -> None:
    found = trained.compiled(passes, tmp_path)
    kept = {name: value.clone() for name, value in trained.module.state_dict().items()}
    try:
        _take_weights(trained.module, next(tmp_path.glob("*-quantise.onnx")))
        expected = trained.output()
    finally:
        trained.module.load_state_dict(kept)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    assert float(np.abs(trained.output() - expected).max()) > 1e-2, "the weights were rounded"


def _take_weights(module: Any, path: Path) -> None:
    """Give the linears of ``module`` the values, and biases, that the quantised graph has."""
    model = ir.load(path)
    for node in list(model.graph):
        if node.op_type != "MatMul" or not str(node.inputs[1].name).endswith(".dequantized_weight"):  # type: ignore[union-attr]
            continue
        name = str(node.inputs[1].name).removesuffix(".dequantized_weight")  # type: ignore[union-attr]
        codes, scale, zero = (value.const_value.numpy() for value in node.inputs[1].producer().inputs)  # type: ignore[union-attr]
        linear = aware_linears(module).get(name)
        if linear is None:
            continue
        weight = (codes.astype(np.float32) - zero) * scale
        linear.weight.data = torch.from_numpy(np.ascontiguousarray(weight.T))
        add = next(use.node for use in node.outputs[0].uses())
        if linear.bias is not None:
            bias = add.inputs[1]
            linear.bias.data = torch.from_numpy(bias.const_value.numpy().copy())  # type: ignore[union-attr]


def test_the_record_says_that_a_range_was_learned(trained: Trained) -> None:
    options: dict[str, Any] = {"calibration": trained.calibration(), "passes": ""}
    with qcompile.compile(ir.load(trained.path), recipe=LINEARS, **options) as program:
        entry = next(entry for entry in program.manifest["passes"] if entry["name"] == "quantise")
    sites = {site["site"]: site["activations"] for site in entry["sites"]}
    assert sites[next(iter(aware_linears(trained.module)))] == f"uint{BITS[trained.name]} per_tensor static learned"


@pytest.mark.parametrize("transform", ["os_plus", "smoothquant"])
def test_a_transform_leaves_a_learned_range_alone(trained: Trained, transform: str) -> None:
    before = trained.compiled("")
    np.testing.assert_allclose(trained.compiled(transform), before, rtol=0, atol=1e-4)


def test_a_saved_folder_has_its_ranges(tmp_path: Path) -> None:
    module: Any = MODELS["opt"]().requires_grad_(True)
    inputs = random_inputs(example_inputs(module)[0])
    quantization_aware(module, bits=4, sites=["*.fc1", "*.fc2"], quantiser="lsq").train()(**inputs)
    module.save_pretrained(tmp_path)
    again = load_pretrained(tmp_path, read_config(tmp_path))
    assert set(aware_linears(again)) == {"model.decoder.layers.0.fc1", "model.decoder.layers.0.fc2"}
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs)[0], module.eval()(**inputs)[0], rtol=0, atol=0)


def test_a_folder_that_lost_its_ranges_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    module: Any = MODELS["opt"]().requires_grad_(True)
    quantization_aware(module).save_pretrained(tmp_path)  # type: ignore[operator]
    path = tmp_path / "model.safetensors"
    save_file({name: value for name, value in load_file(path).items() if ".clip." not in name}, path, {"format": "pt"})
    with pytest.raises(UserError, match="learned ranges are not in the files"):
        load_pretrained(tmp_path, read_config(tmp_path))


# --------------------------------------------------------------------------- recognising them


def static_pair(edit: Callable[[onnx.ModelProto], None] | None = None) -> ir.Value:
    text = """<ir_version: 10, opset_import: ["": 21]> g (float[n, 4] x) => (float[n, 2] y)
        <float low = {-1.0}, float high = {2.75}, float s = {0.25}, uint8 z = {4},
         float[4, 2] w = {1, 2, 3, 4, 5, 6, 7, 8}>
        { c = Clip (x, low, high) q = QuantizeLinear (c, s, z) d = DequantizeLinear (q, s, z) y = MatMul (d, w) }"""
    proto = onnx.parser.parse_model(text)
    if edit is not None:
        edit(proto)
    return find_linears(ir.from_proto(proto).graph)[0].x


def test_a_static_pair_is_recognised() -> None:
    grid = learned_grid(static_pair())
    assert grid is not None and (grid.low, grid.high, bits_of(grid)) == (0, 15, 4)
    assert float(grid.scale) == 0.25 and int(grid.zero_point) == 4


def test_without_a_clip_it_has_eight_bits() -> None:
    def edit(proto: onnx.ModelProto) -> None:
        proto.graph.node[1].input[0] = "x"

    grid = learned_grid(static_pair(edit))
    assert grid is not None and (grid.low, grid.high) == (0, 255)


def test_what_is_no_pair_of_one_grid_is_a_float_value() -> None:
    def other_scale(proto: onnx.ModelProto) -> None:
        proto.graph.node[2].input[1] = "low"

    def no_zero(proto: onnx.ModelProto) -> None:
        del proto.graph.node[1].input[2]

    def plain(proto: onnx.ModelProto) -> None:
        proto.graph.node[3].input[0] = "c"

    assert [learned_grid(static_pair(edit)) for edit in (other_scale, no_zero, plain)] == [None, None, None]
