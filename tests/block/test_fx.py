"""A graph as a torch module computes what ONNX Runtime computes, under the user's names, and can be differentiated."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from qcompile.block.fx import TorchGraph, to_torch
from qcompile.errors import UserError
from qcompile.graph.linears import find_linears
from qcompile.models.architectures import ARCHITECTURES
from qcompile.models.fused import FUSED
from tests.graph.models import PADDED_SHAPES, Library, feeds_for, session, spelled

TOLERANCE = 1e-5  # relative to the largest output, at unmasked positions; measured: at most 1.2e-6
SLOPE_TOLERANCE = 1e-7  # of the gradient's norm, in float64; measured: at most 2e-8
STEP = 1e-5


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    return Library(tmp_path_factory.mktemp("torch"))


def tensors(feeds: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in feeds.items()}


def difference(path: Path, graph: TorchGraph) -> float:
    """max|torch - ONNX Runtime| / max|ONNX Runtime| over unmasked positions, the worst of the padded shapes."""
    runtime, worst = session(path), 0.0
    for shape in PADDED_SHAPES:
        feeds = feeds_for(runtime, *shape)
        expected = runtime.run(None, feeds)[0]
        error = np.abs(graph.run(tensors(feeds))[graph.outputs[0]].numpy() - expected)
        mask = feeds.get("attention_mask")
        if mask is not None and mask.shape == error.shape[:2]:
            error = error * mask[..., None]
        worst = max(worst, float(error.max() / np.abs(expected).max()))
    return worst


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_equals_onnxruntime(name: str, library: Library) -> None:
    path = library.architecture(name).path
    assert difference(path, to_torch(ir.load(path))) < TOLERANCE


@pytest.mark.parametrize("name", FUSED)
def test_every_fused_spelling_equals_onnxruntime(name: str, library: Library) -> None:
    path = library.fused(name).path
    assert difference(path, to_torch(ir.load(path))) < TOLERANCE


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_data_may_be_on_another_device(name: str, library: Library) -> None:
    """The meta device refuses operands from two devices, as CUDA does; shapes stay on the CPU."""
    path = library.architecture(name).path
    graph = to_torch(ir.load(path))
    graph.module.to("meta")
    runtime = session(path)
    feeds = feeds_for(runtime, 2, 10)
    output = graph.run({k: v.to("meta") for k, v in tensors(feeds).items()})[graph.outputs[0]]
    assert output.device.type == "meta"
    assert tuple(output.shape) == runtime.run(None, feeds)[0].shape


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradients_are_slopes(name: str, library: Library) -> None:
    """Finite differences in float64, along one random direction for each parameter of the model."""
    path = library.architecture(name).path
    graph = to_torch(ir.load(path), dtype=torch.float64)
    feeds = {
        k: v.double() if v.is_floating_point() else v for k, v in tensors(feeds_for(session(path), 2, 5)).items()
    }
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        clean = graph.run(feeds)[graph.outputs[0]]
        weights = torch.randn(clean.shape, generator=generator, dtype=torch.float64)

    def objective(instead: dict[str, torch.Tensor]) -> torch.Tensor:
        return (graph.run(feeds, instead)[graph.outputs[0]] * weights).sum()

    checked = 0
    for constant in graph.parameters:
        value = graph.constant(constant)
        if not value.is_floating_point():
            continue
        leaf = value.clone().requires_grad_()
        (slope,) = torch.autograd.grad(objective({constant: leaf}), leaf)
        direction = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        direction /= direction.norm()
        with torch.no_grad():
            ends = [float(objective({constant: value + sign * STEP * direction})) for sign in (1, -1)]
        expected = (ends[0] - ends[1]) / (2 * STEP)
        allowed = SLOPE_TOLERANCE * max(1.0, float(slope.norm()))
        assert float((slope * direction).sum()) == pytest.approx(expected, rel=0, abs=allowed)
        checked += 1
    assert checked >= 15


def test_weights_have_the_users_names(library: Library) -> None:
    graph = to_torch(ir.load(library.architecture("llama").path))
    names = dict(graph.module.named_parameters())
    assert {
        "model.embed_tokens.weight",
        "model.layers.1.input_layernorm.weight",
        "model.layers.1.self_attn.q_proj.weight",  # the exporter calls it val_255
        "model.layers.1.mlp.down_proj.weight",
        "lm_head.weight",
    } <= names.keys()
    assert not any(parameter.requires_grad for parameter in names.values())
    biased = to_torch(ir.load(library.architecture("bert").path))
    assert "encoder.layer.0.attention.self.query.bias" in dict(biased.module.named_parameters())


def test_a_weight_can_be_replaced_and_learned(library: Library) -> None:
    path = library.architecture("opt").path
    model = ir.load(path)
    graph = to_torch(model)
    feeds = tensors(feeds_for(session(path), 2, 5))
    linear = find_linears(model.graph)[0]
    name = str(linear.weight.name)
    factor = torch.ones((), requires_grad=True)
    output = graph.run(feeds, {name: graph.constant(name) * factor})[graph.outputs[0]]
    assert torch.equal(output, graph.run(feeds)[graph.outputs[0]])
    (slope,) = torch.autograd.grad(output.square().sum(), factor)
    assert float(slope.abs()) > 0.1


def test_an_input_can_be_read_through_a_module(library: Library) -> None:
    path = library.architecture("llama").path
    model = ir.load(path)
    feeds = tensors(feeds_for(session(path), 2, 5))
    before = to_torch(model).run(feeds)["logits"]

    class Count(torch.nn.Module):
        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return x * 0

    graph, change = to_torch(model), Count()
    q, k, v, o = find_linears(model.graph)[:4]
    graph.read_through([(linear.node, 0) for linear in (q, k, v)], change, "layers.0.input")
    silent = graph.run(feeds)["logits"]
    assert change.calls == 1
    assert float((silent - before).abs().max()) > 0.1

    once = to_torch(model)
    once.read_through([(linear.node, 0) for linear in (v, k, q)], torch.nn.Identity(), "a")
    once.read_through([(o.node, 0)], torch.nn.Identity(), "b")
    assert torch.equal(once.run(feeds)["logits"], before)


BODY = "m (float[a, 8] x) => (float[a, 8] y) {{ z = Add (x, x) y = {} }}"


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ("Hardmax (z)", "operator Hardmax cannot be learned through: it has no differentiable translation"),
        ("Selu <alpha = 2.0> (z)", "operator Selu"),
        ("Softplus <sharp = 1> (z)", "its attribute 'sharp'"),
        ("Pad <mode = \"reflect\"> (z, w)", "operator Pad cannot be learned through: mode = reflect"),
        ("Cast <to = 10> (z)", ""),
        ("Cast <to = 16> (z)", "values of type BFLOAT16"),
    ],
)
def test_what_cannot_be_learned_through_is_named(call: str, reason: str, tmp_path: Path) -> None:
    model = ir.load(spelled(tmp_path / "m.onnx", BODY.format(call), {"w": np.zeros(4, np.int64)}))
    node = next(node for node in model.graph if node.op_type == call.split(" ", 1)[0])
    node.name = "encoder/strange"
    if not reason:
        to_torch(model)
        return
    with pytest.raises(UserError) as caught:
        to_torch(model, "encoder.layer.1")
    assert reason in caught.value.message
    assert caught.value.where == "encoder.layer.1: encoder/strange"
    assert "leave this block out" in caught.value.hint


def test_awkward_names_become_attributes(tmp_path: Path) -> None:
    """A name that a module already has, one that leads through another constant, and signs."""
    text = """m (float[a, 3] x) => (float[a, 3] y) {
        p = Mul (x, forward) q = Add (p, half) r = Sub (q, s) y = Mul (r, t) }"""
    renamed = {"forward": "forward", "half": "forward.half.", "s": "onnx::a/b", "t": "forward.half"}
    weights = {name: np.full(3, i + 2, np.float32) for i, name in enumerate(renamed)}
    model = ir.load(spelled(tmp_path / "m.onnx", text, weights))
    for old, new in renamed.items():
        model.graph.initializers[old].metadata_props["qcompile.origin"] = new
    graph = to_torch(model)
    assert torch.equal(graph.run({"x": torch.ones(1, 3)})["y"], torch.full((1, 3), (1 * 2 + 3 - 4) * 5.0))
    assert len(set(graph.parameters.values())) == 4


def test_a_constant_that_torch_does_not_know_is_named(tmp_path: Path) -> None:
    text = "m (float[a, 3] x) => (float[a, 3] y) { f = CastLike (w, x) y = Add (x, f) }"
    model = ir.load(spelled(tmp_path / "m.onnx", text, {"w": np.ones(3, np.uint64)}))
    with pytest.raises(UserError, match="a constant of type UINT64") as caught:
        to_torch(model, "block.3")
    assert caught.value.where == "block.3: w"
