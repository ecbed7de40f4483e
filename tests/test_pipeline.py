"""Passes by name: options as the command line writes them, a user's own files, installed packages."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

import qcompile
from qcompile import backends, pipeline
from qcompile.calibration.runner import OrtRunner
from qcompile.calibration.samples import Sample
from qcompile.errors import UserError
from qcompile.graph.functions import DOMAIN, use
from qcompile.graph.provenance import LAYER, layer_name, remember
from qcompile.graph.workspace import INLINE_BYTES, Workspace
from qcompile.ledger import Ledger, Preserves
from qcompile.pipeline import PASSES, Context, IrPass, Pass, Target, known_passes, make_pass, split_passes
from qcompile.recipe import by_name
from tests.surface.plain import feeds, write_model

WIDTH = 48  # a weight of 48 x 48 floats is larger than what the protobuf holds inline


@dataclasses.dataclass(frozen=True)
class Optional(Pass):
    """A pass with an option of every kind."""

    name: ClassVar[str] = "optional"
    preserves: ClassVar[Preserves] = "analysis"

    count: int = 3
    share: float | None = None
    always: float | None = 0.5
    on: bool = True
    mode: Literal["fold", "insert"] = "fold"
    chosen: Literal[4, 8] | None = None

    def run(self, model: ir.Model, ctx: Context) -> int:
        return 0


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PASSES, "optional", f"{__name__}:Optional")


def through_text(one: Pass) -> Pass:
    """The pass that the command line's spelling of ``one`` makes."""
    ((name, options),) = split_passes(one.spec)
    return make_pass(name, options)


# --------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"count": 7},
        {"share": 0.1, "always": None},
        {"share": 1e-7, "on": False},
        {"mode": "insert", "chosen": 8, "count": -1},
    ],
)
def test_what_a_pass_prints_parses_to_the_same_pass(registered: None, options: dict[str, Any]) -> None:
    one = Optional(**options)
    assert through_text(one) == one
    assert one.spec.count("=") == len(options)


@pytest.mark.parametrize("name", PASSES)
def test_every_listed_pass_is_made_by_its_name_and_prints_it(name: str) -> None:
    one = make_pass(name, {})
    assert one.name == name and one.spec == name
    assert through_text(one) == one
    assert one.__doc__ and one.preserves in ("function", "approximation", "analysis")


def test_items_are_split_at_commas_outside_braces() -> None:
    text = " a, b{x=1 y=2} ,c{z=1,w=true},./mine.py:f"
    assert split_passes(text) == [
        ("a", {}),
        ("b", {"x": "1", "y": "2"}),
        ("c", {"z": "1", "w": "true"}),
        ("./mine.py:f", {}),
    ]
    assert split_passes("") == []


@pytest.mark.parametrize("text", ("a b", "a{x=1", "a{x=1}}", "a,,b", "{x=1}", "a{x}", "a{=1}", "a{x=}", "a{x=1 x=2}"))
def test_what_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(UserError):
        split_passes(text)


@pytest.mark.parametrize(
    ("name", "options", "message", "hint"),
    [
        ("os_pluss", {}, "unknown pass 'os_pluss'", "did you mean os_plus"),
        ("optional", {"cuont": "1"}, "unknown option of pass 'optional' 'cuont'", "did you mean count"),
        ("optional", {"count": "x"}, "'x' is not a valid int", ""),
        ("optional", {"share": "much"}, "'much' is not a valid float", ""),
        ("optional", {"on": "perhaps"}, "'perhaps' is not a yes or no", "use 1 or 0"),
        ("optional", {"mode": "insrt"}, "unknown value of optional{mode}", "did you mean insert"),
        ("optional", {"chosen": "5"}, "unknown value of optional{chosen}", "known: 4, 8"),
    ],
)
def test_mistakes_in_options_are_named(
    registered: None, name: str, options: dict[str, str], message: str, hint: str
) -> None:
    with pytest.raises(UserError) as caught:
        make_pass(name, options)
    assert message in str(caught.value) and hint in caught.value.hint


@pytest.mark.parametrize(
    ("name", "option", "text"),
    [
        *(("os_plus", o, v) for o, v in (("points", "0"), ("refine", "-1"), ("tokens", "-1"), ("t_min", "nan"))),
        *(("outliers", o, v) for o, v in (("top", "0"), ("loss_samples", "0"), ("threshold", "-1"))),
        *(("quantise", o, v) for o, v in (("alpha", "9"), ("alpha", "-1"), ("alpha", "nan"))),
        *(("quantise", o, "0") for o in ("gate_samples", "alpha_samples")),
        *(("smoothquant", o, v) for o, v in (("alpha", "2"), ("tokens", "0"))),
        ("outlier_suppression", "floor", "-0.1"),
    ],
)
def test_a_number_outside_its_range_is_the_users_error(name: str, option: str, text: str) -> None:
    with pytest.raises(UserError, match=f"{option} is {text}, but must") as caught:
        make_pass(name, {option: text})
    assert caught.value.where == f"{name}{{{option}}}"


@pytest.mark.parametrize("text", ["none", "0", "1"])
def test_the_ends_of_a_range_and_none_are_in_it(text: str) -> None:
    assert make_pass("quantise", {"alpha": text}).name == "quantise"


# --------------------------------------------------------------------------- a user's own file


def run_here(one: Pass, model: ir.Model, workspace: Workspace) -> int:
    ctx = Context(workspace, Ledger(), by_name("float"), Target("plain", "onnxruntime", ""), [], OrtRunner(workspace))
    return one.run(model, ctx)


def model_with_a_function() -> ir.Model:
    """x -> MatMul (large weight) -> Add -> qcompile.Silu -> y, with a module path in the MatMul's metadata."""
    w = np.random.default_rng(0).standard_normal((WIDTH, WIDTH)).astype(np.float32)
    assert w.nbytes > INLINE_BYTES
    value = helper.make_tensor_value_info
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["p"], "n1"),
        helper.make_node("Add", ["p", "b"], ["s"], "n2"),
        helper.make_node("Silu", ["s"], ["y"], "n3", domain=DOMAIN),
    ]
    held = [numpy_helper.from_array(w, "w"), numpy_helper.from_array(np.ones(WIDTH, np.float32), "b")]
    ends = [value("x", TensorProto.FLOAT, ["n", WIDTH])], [value("y", TensorProto.FLOAT, ["n", WIDTH])]
    graph = helper.make_graph(nodes, "g", *ends, held)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, 1)]
    model = ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=10))
    use(model, "Silu")
    next(iter(model.graph)).metadata_props[LAYER] = "model.fc"
    remember(model)
    return model


USER_FILE = """
import numpy as np
import onnx_graphsurgeon as gs
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

def in_place(model: ir.Model):
    for node in model.graph:
        if node.op_type == "Add":
            node.op_type = "Sub"

def returned(model: ir.Model) -> ir.Model:
    changed = model.clone()
    in_place(changed)
    return changed

class AsPass(ir.passes.InPlacePass):
    def call(self, model):
        in_place(model)
        return ir.passes.PassResult(model, modified=True)

def surgeon(graph: gs.Graph):
    for node in graph.nodes:
        if node.op == "Add":
            node.op = "Sub"

def surgeon_returns(graph: "gs.Graph") -> "gs.Graph":
    surgeon(graph)
    return graph.cleanup().toposort()

instance = AsPass()
NUMBER = 7
"""


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(USER_FILE)
    return path


def test_a_dataclass_of_a_file_is_a_pass(tmp_path: Path) -> None:
    path = tmp_path / "later.py"
    path.write_text(
        "from __future__ import annotations\n"
        "import dataclasses\n"
        "from typing import ClassVar\n"
        "from qcompile.pipeline import Pass\n"
        "@dataclasses.dataclass(frozen=True)\n"
        "class Later(Pass):\n"
        "    name: ClassVar[str] = 'later'\n"
        "    count: int = 3\n"
        "    def run(self, model, ctx):\n"
        "        return self.count\n"
    )
    assert make_pass(f"{path}:Later", {}).spec == "later"


@pytest.mark.parametrize("function", ("in_place", "returned", "AsPass", "instance", "surgeon", "surgeon_returns"))
def test_a_function_of_a_file_is_a_pass(mine: Path, function: str, tmp_path: Path) -> None:
    one = make_pass(f"{mine}:{function}", {})
    assert isinstance(one, IrPass) and one.spec == f"mine.py:{function}" and one.preserves == "approximation"
    model = model_with_a_function()
    x = np.random.default_rng(1).standard_normal((3, WIDTH)).astype(np.float32)
    w = model.graph.initializers["w"].const_value
    assert w is not None
    s = x @ w.numpy() - 1
    with Workspace(tmp_path) as workspace:
        workspace.adopt(model)
        assert run_here(one, model, workspace) == 1
        assert [node.op_type for node in model.graph] == ["MatMul", "Sub", "Silu"]
        assert layer_name(next(iter(model.graph))) == "model.fc"  # the user's names survive
        ((_, values),) = OrtRunner(workspace, threads=1).stream(model, [Sample({"x": x})], ["y"])
        np.testing.assert_allclose(values["y"], s / (1 + np.exp(-s)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.py:f", "no file 'missing.py'"),
        ("{mine}:in_plac", "unknown function in"),
        ("{mine}:NUMBER", "is no pass"),
        ("{broken}:f", "cannot be imported: SyntaxError"),
        ("{failing}:f", "cannot be imported: ZeroDivisionError"),
    ],
)
def test_a_file_that_does_not_serve_is_the_users_error(mine: Path, tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "failing.py").write_text("1 / 0\n")
    paths = {stem: str(tmp_path / f"{stem}.py") for stem in ("mine", "broken", "failing")}
    with pytest.raises(UserError, match=message):
        make_pass(name.format(**paths), {})


@pytest.mark.parametrize("function", ("in_place", "AsPass"))
def test_a_pass_named_by_its_file_takes_no_options(mine: Path, function: str) -> None:
    with pytest.raises(UserError, match=f"mine.py:{function}' takes no options") as caught:
        make_pass(f"{mine}:{function}", {"x": "1"})
    assert "entry point" in caught.value.hint


def test_a_users_file_runs_in_the_pipeline_and_its_difference_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(backends.TARGETS, "plain", "tests.surface.plain:Plain")
    path = tmp_path / "louder.py"
    path.write_text(
        "import numpy as np\nimport onnx_graphsurgeon as gs\n"
        "def louder(graph: gs.Graph):\n"
        "    gain = next(t for t in graph.tensors().values() if t.name == 'gain')\n"
        "    gain.values = gain.values * np.float32(2)\n"
    )
    model = write_model(tmp_path / "tiny.onnx")
    options: Any = {"recipe": "float", "target": "plain", "calibration": [feeds()]}
    with qcompile.compile(model, passes=f"{path}:louder", **options) as compiled:
        entry = next(e for e in compiled.manifest["passes"] if e["name"] == "louder.py:louder")
        assert entry["rewrites"] == 1 and entry["proof"]["relative"] > 0.1
        kernels = [k["site"] for k in compiled.manifest["kernels"]]
    assert kernels == ["up", "down"]


@pytest.mark.parametrize("dumped", [False, True])
@pytest.mark.parametrize("node", ["model.graph.outputs[0].producer()", "model.graph.node('up')"])
def test_a_users_pass_that_removes_what_is_needed_is_the_users_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, node: str, dumped: bool
) -> None:
    monkeypatch.setitem(backends.TARGETS, "plain", "tests.surface.plain:Plain")
    path = tmp_path / "cut.py"
    path.write_text(f"def cut(model):\n    model.graph.remove({node})\n")
    options: Any = {"recipe": "float", "target": "plain", "calibration": [feeds()]}
    options |= {"dump": tmp_path / "dump"} if dumped else {}
    with pytest.raises(UserError, match=r"pass 'cut.py:cut' removed what makes '"):
        qcompile.compile(write_model(tmp_path / "tiny.onnx"), passes=f"{path}:cut", **options)


# --------------------------------------------------------------------------- entry points


class Points:
    """Stands in for the installed packages' entry points."""

    def __init__(self, **values: str) -> None:
        self.values = values

    def __call__(self, *, group: str) -> list[importlib.metadata.EntryPoint]:
        assert group == pipeline.ENTRY_POINTS == "qcompile.passes"
        return [importlib.metadata.EntryPoint(name, value, group) for name, value in self.values.items()]


def test_an_installed_package_adds_passes_but_replaces_none(monkeypatch: pytest.MonkeyPatch) -> None:
    points = Points(theirs=f"{__name__}:Optional", quantise="evil:Quantise")
    monkeypatch.setattr(importlib.metadata, "entry_points", points)
    assert known_passes()["quantise"] == PASSES["quantise"]
    assert make_pass("theirs", {"count": "4"}) == Optional(count=4)


def test_a_plain_onnx_ir_pass_of_a_package_is_wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    points = Points(unused="onnx_ir.passes.common:RemoveUnusedNodesPass")
    monkeypatch.setattr(importlib.metadata, "entry_points", points)
    one = make_pass("unused", {})
    assert isinstance(one, IrPass) and one.spec == "unused"
    with pytest.raises(UserError, match="takes no options"):
        make_pass("unused", {"x": "1"})


@pytest.mark.parametrize("place", ("no_such_package.passes:Theirs", "onnx_ir:NoSuchPass"))
def test_a_package_that_does_not_load_is_named(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "entry_points", Points(theirs=place))
    with pytest.raises(UserError, match="pass 'theirs' cannot be loaded"):
        make_pass("theirs", {})


def test_a_pass_without_its_runner_says_how_to_run_it() -> None:
    with pytest.raises(UserError, match="needs a context"):
        Optional()(
            ir.from_proto(
                onnx.parser.parse_model(
                    '<ir_version: 10, opset_import: ["" : 21]> g (float[n] x) => (float[n] y) { y = Neg (x) }'
                )
            )
        )
