"""Edits of constants: nobody else's weight changes, names never clash."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qcompile.errors import ContractError
from qcompile.graph.edits import (
    constant_array,
    is_tied,
    naming,
    new_initializer,
    own_initializer,
    replace_constant,
    unique_name,
)
from qcompile.graph.provenance import original_name
from qcompile.graph.workspace import Workspace

LARGE = np.arange(2048, dtype=np.float32).reshape(64, 32)


@pytest.fixture
def workspace(tmp_path: Path) -> Iterator[Workspace]:
    with Workspace(tmp_path) as held:
        yield held


def model_of(nodes: list[ir.Node], *inputs: ir.Value, **weights: np.ndarray) -> ir.Model:
    used = {v.name: v for node in nodes for v in node.inputs if v is not None and v.name in weights}
    for name, value in used.items():
        value.const_value = ir.tensor(weights[str(name)], name=name)
        value.shape, value.dtype = ir.Shape(weights[str(name)].shape), value.const_value.dtype
    graph = ir.Graph(
        inputs,
        nodes[-1].outputs,
        nodes=nodes,
        initializers=list(used.values()),
        opset_imports={"": 21},
        name="g",
    )
    return ir.Model(graph, ir_version=10)


def shared() -> ir.Model:
    """Two MatMul nodes that read one weight."""
    x, weight = ir.val("x", ir.DataType.FLOAT, [2, 64]), ir.val("w")
    first = ir.node("MatMul", [x, weight], name="first")
    second = ir.node("MatMul", [x, weight], name="second")
    return model_of([first, second, ir.node("Add", [first.outputs[0], second.outputs[0]])], x, w=LARGE)


def test_own_initializer_leaves_the_other_user_alone(workspace: Workspace) -> None:
    model = shared()
    first, second = model.graph[0], model.graph[1]
    owned = own_initializer(model, first, 1)
    replace_constant(owned, LARGE * 2, workspace)
    np.testing.assert_array_equal(constant_array(first.inputs[1]), LARGE * 2)
    np.testing.assert_array_equal(constant_array(second.inputs[1]), LARGE)
    assert original_name(owned) == "w"
    assert own_initializer(model, first, 1) is owned
    assert own_initializer(model, second, 1) is second.inputs[1]


def test_a_clone_of_a_mapped_weight_is_mapped_and_saved_under_its_own_name(workspace: Workspace) -> None:
    model = shared()
    workspace.adopt(model)
    owned = own_initializer(model, model.graph[0], 1)
    assert isinstance(owned.const_value, ir.ExternalTensor)
    again = ir.load(workspace.save(model, "saved"))
    assert set(again.graph.initializers) == {"w", owned.name}
    for value in again.graph.initializers.values():
        np.testing.assert_array_equal(constant_array(value), LARGE)


def test_a_weight_used_twice_by_one_node_is_owned_by_each_input(workspace: Workspace) -> None:
    weight = ir.val("w")
    model = model_of([ir.node("Add", [weight, weight], name="add")], w=LARGE)
    owned = own_initializer(model, model.graph[0], 1)
    assert owned is not model.graph[0].inputs[0]


def test_an_activation_cannot_be_owned() -> None:
    model = shared()
    with pytest.raises(ContractError, match="input 0 is no constant"):
        own_initializer(model, model.graph[0], 0)


def test_replace_constant_changes_type_and_shape(workspace: Workspace) -> None:
    model = shared()
    weight = model.graph.initializers["w"]
    replace_constant(weight, np.zeros((3, 2), np.int8), workspace)
    assert (weight.dtype, list(weight.shape or [])) == (ir.DataType.INT8, [3, 2])
    with pytest.raises(ContractError, match="'x' is no initializer"):
        replace_constant(model.graph.inputs[0], LARGE, workspace)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(hints=st.lists(st.sampled_from(["w", "x", "w_1", "scale"]), max_size=8))
def test_new_names_are_unique_and_the_same_every_time(hints: list[str], workspace: Workspace) -> None:
    def names() -> list[str | None]:
        model = shared()
        return [new_initializer(model, hint, np.ones(3, np.float32), workspace).name for hint in hints]

    made = names()
    assert made == names()
    assert len({*made, "w", "x"}) == len(made) + 2


def test_unique_name_avoids_outputs_of_nodes() -> None:
    model = shared()
    taken = model.graph[0].outputs[0]
    taken.name = "scale"
    assert unique_name(model, "scale") == "scale_1"


def test_unique_name_avoids_names_inside_branches() -> None:
    inner = ir.node("Constant", [], {"value": ir.tensor(LARGE)})
    inner.outputs[0].name = "inner"
    branch = ir.Graph([], inner.outputs, nodes=[inner], name="branch")
    model = model_of([ir.node("If", [ir.val("c")], {"then_branch": branch, "else_branch": branch})])
    assert unique_name(model, "inner") == "inner_1"


def test_names_are_unique_within_many_edits(workspace: Workspace) -> None:
    model = shared()
    model.graph[0].outputs[0].name = "taken"
    with naming(model):
        names = [new_initializer(model, "taken", LARGE, workspace).name for _ in range(3)]
    assert names == ["taken_1", "taken_2", "taken_3"] and not model.meta
    assert unique_name(model, "taken") == "taken_4"


def test_constant_array_looks_through_identity_and_constant() -> None:
    constant = ir.node("Constant", [], {"value": ir.tensor(LARGE)})
    identity = ir.node("Identity", constant.outputs)
    np.testing.assert_array_equal(constant_array(identity.outputs[0]), LARGE)
    assert constant_array(ir.node("Neg", constant.outputs).outputs[0]) is None
    assert constant_array(ir.val("x")) is None
    assert constant_array(None) is None


def test_a_default_value_of_an_input_is_no_constant() -> None:
    weight = ir.val("w")
    model = model_of([ir.node("Neg", [weight])], w=LARGE)
    model.graph.inputs.append(weight)
    assert constant_array(weight) is None


@pytest.mark.parametrize(
    ("through", "with_gather", "tied"), [(True, True, True), (False, True, True), (True, False, False)]
)
def test_tied_embeddings(through: bool, with_gather: bool, tied: bool) -> None:
    x, ids, table = ir.val("x"), ir.val("ids"), ir.val("table")
    turned = ir.node("Transpose", [table], {"perm": [1, 0]})
    head = ir.node("MatMul", [x, turned.outputs[0] if through else table])
    embedding = ir.node("Gather" if with_gather else "Neg", [table, ids] if with_gather else [table])
    model_of([turned, embedding, head], x, ids, table=LARGE)
    assert is_tied(table) is tied
