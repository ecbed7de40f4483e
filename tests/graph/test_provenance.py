"""Names of the user's model: found, remembered, inherited."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qcompile.graph.provenance import (
    LAYER,
    ORIGIN,
    TORCH_SCOPES,
    inherit,
    layer_name,
    original_name,
    remember,
)


def weight(name: str) -> ir.Value:
    value = ir.val(name)
    value.const_value = ir.tensor(np.ones((4, 4), np.float32), name=name)
    return value


def linear(node_name: str, weight_name: str, scopes: str = "", through: str = "") -> ir.Model:
    """x @ w as one model; ``through`` names an operator between the weight and the MatMul."""
    x, w = ir.val("x", ir.DataType.FLOAT, [2, 4]), weight(weight_name)
    nodes = [ir.node(through, [w], name="layout")] if through else []
    right = nodes[0].outputs[0] if nodes else w
    nodes.append(ir.node("MatMul", [x, right], name=node_name))
    if scopes:
        nodes[-1].metadata_props[TORCH_SCOPES] = scopes
    graph = ir.Graph([x], nodes[-1].outputs, nodes=nodes, initializers=[w], opset_imports={"": 21}, name="g")
    graph.outputs[0].name = "y"
    return ir.Model(graph, ir_version=10)


SCOPES = "['', 'model', 'model.layers.3', 'model.layers.3.mlp', 'model.layers.3.mlp.down_proj', 'linear_6']"


@pytest.mark.parametrize(
    ("node_name", "weight_name", "scopes", "expected"),
    [
        ("node_linear_6", "val_250", SCOPES, "model.layers.3.mlp.down_proj"),
        ("node_linear_6", "other.weight", SCOPES, "model.layers.3.mlp.down_proj"),
        ("node_linear", "w", "not a list", "w"),
        (
            "/encoder/layer.0/attention/self/query/MatMul",
            "onnx::MatMul_93",
            "",
            "encoder.layer.0.attention.self.query",
        ),
        ("MatMul_7", "encoder.layer.0.output.dense.weight", "", "encoder.layer.0.output.dense"),
        ("MatMul_7", "onnx::MatMul_93", "", "MatMul_7"),
        ("MatMul_7", "val_93", "", "MatMul_7"),
        ("MatMul_7", "93", "", "MatMul_7"),
        ("MatMul_7", "/encoder/Constant_3_output_0", "", "MatMul_7"),
        ("/MatMul", "lm_head.weight", "", "lm_head"),
    ],
)
def test_layer_name(node_name: str, weight_name: str, scopes: str, expected: str) -> None:
    assert layer_name(linear(node_name, weight_name, scopes).graph[0]) == expected


@pytest.mark.parametrize("through", ["Transpose", "Identity", "Cast"])
def test_the_weight_is_seen_through_layout(through: str) -> None:
    assert layer_name(linear("n", "lm_head.weight", through=through).graph[1]) == "lm_head"


def test_activation_times_activation_has_no_weight_name() -> None:
    a, b = ir.val("a"), ir.val("b")
    assert layer_name(ir.node("MatMul", [a, b], name="scores")) == "scores"


def test_a_nameless_node_is_known_by_its_output() -> None:
    node = ir.node("MatMul", [ir.val("a"), ir.val("b")])
    node.outputs[0].name = "y"
    assert layer_name(node) == original_name(node) == "MatMul:y"


def test_names_survive_renaming_and_a_second_call() -> None:
    model = linear("fc", "model.fc.weight")
    remember(model)
    node, held = model.graph[0], model.graph.initializers["model.fc.weight"]
    node.name, node.outputs[0].name = "renamed", "z"
    held.name = "w2"
    remember(model)
    assert (original_name(node), layer_name(node)) == ("fc", "model.fc")
    assert original_name(held) == "model.fc.weight"
    assert original_name(node.outputs[0]) == "y"


def test_names_survive_saving(tmp_path: Path) -> None:
    model = linear("fc", "model.fc.weight")
    remember(model)
    model.graph[0].name = "renamed"
    ir.save(model, tmp_path / "m.onnx")
    node = ir.load(tmp_path / "m.onnx").graph[0]
    assert (original_name(node), layer_name(node)) == ("fc", "model.fc")


def test_inherit_prefers_the_node_with_a_weight() -> None:
    model = linear("fc", "model.fc.weight")
    remember(model)
    bias = ir.node("Add", [model.graph[0].outputs[0], weight("model.fc.bias")], name="add")
    new = inherit(ir.node("Gemm", [], name="gemm"), [bias, model.graph[0]])
    assert (original_name(new), layer_name(new)) == ("fc", "model.fc")
    assert inherit(ir.node("Neg", []), []).metadata_props == {}


def test_inherit_keeps_torch_scopes_for_later_rewrites() -> None:
    old = linear("n", "val_1", SCOPES).graph[0]
    new = inherit(ir.node("MatMul", [], name="new"), old)
    assert new.metadata_props == {
        ORIGIN: "n",
        LAYER: "model.layers.3.mlp.down_proj",
        TORCH_SCOPES: SCOPES,
    }


def test_subgraphs_are_remembered() -> None:
    inner, other = ir.node("Neg", [ir.val("a")], name="inner"), ir.node("Abs", [ir.val("b")], name="other")
    then, otherwise = (ir.Graph([], n.outputs, nodes=[n], name=n.name) for n in (inner, other))
    choose = ir.node("If", [ir.val("c")], {"then_branch": then, "else_branch": otherwise}, name="if")
    graph = ir.Graph([], choose.outputs, nodes=[choose], opset_imports={"": 21}, name="g")
    remember(ir.Model(graph, ir_version=10))
    assert inner.metadata_props[ORIGIN] == "inner"
