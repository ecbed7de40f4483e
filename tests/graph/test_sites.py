"""Sites of every architecture: what is transformed together, where channels go, and why a site is left."""

from __future__ import annotations

import collections
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from qcompile.graph.blocks import find_blocks
from qcompile.graph.provenance import LAYER, ORIGIN
from qcompile.graph.sites import Site, find_linears, find_sites, tied
from qcompile.graph.trace import follow, same_shape
from qcompile.graph.workspace import Workspace
from qcompile.models.architectures import ARCHITECTURES, build, cached_export
from tests.graph.models import Library, canonicalised, spelled

CURVE = "(Gelu does not commute with a scale)"


def _short(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def summary(site: Site) -> str:
    """``kind source>linears [+ what else reads] channels (reason)``."""
    source = f"{_short(site.source.name)}>" if site.source is not None else ""
    text = f"{site.kind} {source}{','.join(_short(linear.name) for linear in site.linears)}"
    text += "".join(" +experts" for _ in site.experts)
    text += "".join(f" +{o.node.op_type if o.node is not None else 'output'}" for o in site.others)
    return f"{text} {site.channels}" + (f" ({site.reason})" if site.reason else "")


def _post_ln(query: str, value: str, key: str, out: str, up: str, down: str) -> dict[str, int]:
    """The embedding norm and that of the first layer feed attention; the last norm is the output."""
    return {
        f"norm {query},{key},{value} +Add 64": 2,
        f"norm {up} +Add 64": 2,
        f"v_o {value}>{out} 64": 2,
        f"q_k {key}>{query} 64": 2,
        f"up_down {up}>{down} 128 {CURVE}": 2,
    }


def _pre_ln(qkv: str, value: str, key: str, out: str, up: str, down: str, **more: str) -> dict[str, int]:
    heads, width = more.get("heads", "64"), more.get("width", "128")
    query = qkv.split(",")[0]
    return {
        f"norm {qkv} 64": 2,
        f"norm {up} 64": 2,
        f"v_o {value}>{out} {heads}": 2,
        f"q_k {key}>{query} {heads}": 2,
        f"up_down {up}>{down} {width}{more.get('reason', '')}": 2,
    }


_SWIGLU = {"norm gate_proj,up_proj 64": 2, "up_down up_proj>down_proj 128": 2}
_NORMED = "(queries and keys are normalised for each head, which undoes a scale of the projection)"
_PROJ = "q_proj,k_proj,v_proj"
_BERT = _post_ln("query", "value", "key", "dense", "dense", "dense")


def _gated(heads: int) -> dict[str, int]:
    return {
        f"norm {_PROJ} 64": 2,
        f"v_o v_proj>o_proj {heads}": 2,
        f"q_k k_proj>q_proj {heads}": 2,
        **_SWIGLU,
    }


def _fused(out: str, up: str, down: str, qkv: str, width: int) -> dict[str, int]:
    return _pre_ln(qkv, qkv, qkv, out, up, down, width=str(width), reason=f" {CURVE}")


def _falcon(heads: int, norms: dict[str, int]) -> dict[str, int]:
    return norms | {
        f"v_o query_key_value>dense {heads}": 2,
        f"q_k query_key_value>query_key_value {heads}": 2,
        f"up_down dense_h_to_4h>dense_4h_to_h 128 {CURVE}": 2,
    }


EXPECTED: dict[str, dict[str, int]] = {
    "bert": _BERT,
    "roberta": _BERT,
    "distilbert": _post_ln("q_lin", "v_lin", "k_lin", "out_lin", "lin1", "lin2"),
    "gpt2": _fused("c_proj", "c_fc", "c_proj", "c_attn", 256),
    "bloom": _fused("dense", "dense_h_to_4h", "dense_4h_to_h", "query_key_value", 256),
    "opt": _pre_ln(_PROJ, "v_proj", "k_proj", "out_proj", "fc1", "fc2"),
    "opt_post_ln": {
        f"norm {_PROJ} +Add 64": 1,
        "norm fc1 +Add 64": 2,
        "v_o v_proj>out_proj 64": 2,
        "q_k k_proj>q_proj 64": 2,
        "up_down fc1>fc2 128": 2,
    },
    "llama": _gated(32),
    "qwen2": _gated(32),
    "qwen3": {k: n for k, n in _gated(32).items() if not k.startswith("q_k")}
    | {f"q_k k_proj>q_proj 32 {_NORMED}": 2},
    "gemma": _gated(64),
    "phi": {
        f"norm {_PROJ},fc1 64": 2,
        "v_o v_proj>dense 64": 2,
        "q_k k_proj>q_proj 64": 2,
        f"up_down fc1>fc2 128 {CURVE}": 2,
    },
    "falcon": _falcon(16, {"norm query_key_value,dense_h_to_4h 64": 2}),
    "falcon_new": _falcon(32, {"norm query_key_value 64": 2, "norm dense_h_to_4h 64": 2}),
    "mixtral": {k: n for k, n in _gated(32).items() if k not in _SWIGLU}
    | {
        "norm gate +experts 64": 2,
        "up_down experts>experts 128 (the down projections are experts chosen for each token)": 2,
    },
    "t5": {
        "norm q,k,v 64": 4,
        "norm k,v,k,v 64": 1,
        "norm q 64": 2,
        "norm wi_0,wi_1 64": 4,
        "v_o v>o 64": 6,
        "q_k k>q 64": 6,
        "up_down wi_1>wo 128": 4,
    },
    "vit": _pre_ln(_PROJ, "v_proj", "k_proj", "o_proj", "fc1", "fc2", reason=f" {CURVE}"),
}
for _name in EXPECTED.keys() - {"bert", "roberta", "distilbert", "t5"}:
    EXPECTED[_name][f"norm {'classifier' if _name == 'vit' else 'lm_head'} 64"] = 1


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_sites_of(name: str, library: Library) -> None:
    sites = find_sites(ir.load(library.architecture(name).path))
    assert collections.Counter(map(summary, sites)) == EXPECTED[name]


@pytest.mark.parametrize("name", ["bert_mha", "llama", "llama_gqa", "llama_rotary"])
def test_fused_files_have_the_sites_of_the_plain_export(name: str, library: Library) -> None:
    found = collections.Counter(map(summary, find_sites(ir.load(library.fused(name).path))))
    assert found == EXPECTED[name.split("_")[0]]


# --------------------------------------------------------------------------- where channels go


def first(model: ir.Model, kind: str) -> Site:
    return next(site for site in find_sites(model) if site.kind == kind)


class OneTensor(torch.nn.Module):
    """A language model for torch's older exporter, which takes no dictionaries."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.module(input_ids, attention_mask=attention_mask, return_dict=False)[0]
        return logits


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["llama", "phi"])
def test_a_torchscript_export_has_the_sites_of_a_newer_one(
    name: str, library: Library, workspace: Workspace, tmp_path: Path
) -> None:
    module, inputs, axes = build(name)
    torch.onnx.export(
        OneTensor(module), tuple(inputs.values()), tmp_path / "model.onnx", dynamo=False, opset_version=17,
        input_names=list(inputs), output_names=["logits"], dynamic_axes=axes,
    )  # fmt: skip
    older, _ = canonicalised(tmp_path / "model.onnx", workspace)
    newer = ir.load(library.architecture(name).path)
    found, expected = (collections.Counter(summary(site) for site in find_sites(one)) for one in (older, newer))
    assert found == expected


def layouts() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The columns of values and of queries in the fused projection, heads 4 of width 16."""
    head, within = np.arange(4)[:, None], np.arange(16)[None]
    return {
        "gpt2": (128 + 16 * head + within, 16 * head + within),  # (3, heads, d)
        "bloom": (48 * head + 32 + within, 48 * head + within),  # (heads, 3, d)
        "falcon": (np.arange(80, 96)[None], 16 * head + within),  # (heads + 2, d), one value head
        "falcon_new": (64 * np.arange(2)[:, None] + 48 + within, np.arange(128).reshape(2, 4, 16)[:, :2]),
    }  # fmt: skip


@pytest.mark.parametrize("name", layouts())
def test_layout_of_fused_projections_is_read_from_the_graph(name: str, library: Library) -> None:
    model = ir.load(library.architecture(name).path)
    values, queries = layouts()[name]
    v_o, q_k = first(model, "v_o"), first(model, "q_k")
    assert v_o.columns is not None
    assert q_k.partner is not None
    np.testing.assert_array_equal(v_o.columns, values.reshape(-1))
    np.testing.assert_array_equal(q_k.partner, queries.reshape(-1))


def test_grouped_heads_expand_in_order(library: Library) -> None:
    """4 query heads over 2 value heads of width 16: 0 0 1 1, never 0 1 0 1."""
    site = first(ir.load(library.architecture("llama").path), "v_o")
    expected = (np.repeat(np.arange(2), 2)[:, None] * 16 + np.arange(16)).reshape(-1)
    np.testing.assert_array_equal(site.expand, expected)


def rotary_pairs(width: int) -> np.ndarray:
    """The ties of one head of ``width`` that is rotated in halves: channels i and i + width / 2 are mixed."""
    return np.tile(np.arange(width // 2), 2)


def test_rotated_channels_are_tied(library: Library) -> None:
    site = first(ir.load(library.architecture("llama").path), "q_k")
    assert site.ties is not None
    np.testing.assert_array_equal(site.ties[:16], rotary_pairs(16))
    np.testing.assert_array_equal(site.ties[16:], rotary_pairs(16) + 16)
    scale = tied(site, np.linspace(1, 2, 32))
    np.testing.assert_allclose(scale, scale[site.ties])
    np.testing.assert_allclose(scale[0], np.sqrt(1.0 * (1 + 8 / 31)), rtol=1e-12)


def test_partial_rotation_ties_only_what_it_rotates(library: Library) -> None:
    """Phi rotates 8 of the 16 channels of a head."""
    site = first(ir.load(library.architecture("phi").path), "q_k")
    assert site.ties is not None
    np.testing.assert_array_equal(site.ties[:16], [*rotary_pairs(8), *range(8, 16)])


def test_without_rotation_nothing_is_tied(library: Library) -> None:
    site = first(ir.load(library.architecture("bert").path), "q_k")
    assert site.ties is None
    assert (tied(site, np.arange(1.0, 65.0)) == np.arange(1.0, 65.0)).all()


def test_shapes_are_compared_as_expressions() -> None:
    batch, length = ir.SymbolicDim("batch"), ir.SymbolicDim("sequence")
    product = ir.SymbolicDim("batch*sequence")
    assert same_shape([batch, length, 4], [batch, ir.SymbolicDim("((batch*sequence)//batch)"), 4])
    assert not same_shape([batch, length], [length, batch])
    assert not same_shape([product], [6])
    assert not same_shape([ir.SymbolicDim(None)], [ir.SymbolicDim(None)])


# --------------------------------------------------------------------------- reasons

WIDTH = 8


def model_of(text: str, path: Path, workspace: Workspace, **weights: np.ndarray) -> ir.Model:
    graph = f"g (float[b, s, {WIDTH}] x) => {text}"
    return canonicalised(spelled(path / "m.onnx", graph, weights), workspace)[0]


def square(seed: int = 0, rows: int = WIDTH, columns: int = WIDTH) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)


QKV = "q = MatMul (x, wq) k = MatMul (x, wk) v = MatMul (x, wv)"
HEADS = "c = com.microsoft.MultiHeadAttention <num_heads = 2> ({q}, {k}, {v}) o = MatMul (c, wo) y = Relu (o)"
PROJECTIONS = {n: square(i) for i, n in enumerate(("wq", "wk", "wv", "wo"))} | {
    "low": np.array(-1, np.float32),
    "high": np.array(1, np.float32),
}
ONES = np.ones(WIDTH, np.float32)
NORM = "n = LayerNormalization (x, g, h)"
READERS = {
    "gamma or beta is computed at run time": (
        "(float[b, s, 8] y) { k = ReduceMax <keepdims = 0> (x, axes) n = LayerNormalization (x, k, h)"
        " y1 = MatMul (n, w) y = Relu (y1) }",
        {"w": square(), "axes": np.array([0, 1])},
    ),
    "a reader is the tied head, and more than lookups and this head read its table": (
        f"(float[b, s, 8] y, float[b, s, 6] z) {{ {NORM} m = MatMul (n, w) e = Gather <axis = 1> (table, ids)"
        " f = ReduceMax <keepdims = 0> (e) y = Add (m, f)"
        " t = Transpose <perm = [1, 0]> (table) z = MatMul (n, t) }",
        {"w": square(), "table": square(2, 6), "ids": np.array([1])},
    ),
    "the up projection has another reader": (
        "(float[b, s, 8] y, float[b, s, 8] z) { u = MatMul (x, w) r = Relu (u) z = Sigmoid (u)"
        " y1 = MatMul (r, v) y = Relu (y1) }",
        {"w": square(), "v": square(1)},
    ),
    "Silu does not commute with a scale": (
        "(float[b, s, 8] y) { u = MatMul (x, w) k = Sigmoid (u) r = Mul (u, k)"
        " y1 = MatMul (r, v) y = Relu (y1) }",
        {"w": square(), "v": square(1)},
    ),
    "Pow after Relu does not commute with a scale": (
        "(float[b, s, 8] y) { u = MatMul (x, w) k = Relu (u) r = Pow (k, two)"
        " y1 = MatMul (r, v) y = Relu (y1) }",
        {"w": square(), "v": square(1), "two": np.array(2, np.float32)},
    ),
    "Clip stands between the value projection and the attention": (
        f"(float[b, s, 8] y) {{ {QKV} v0 = Clip (v, low, high) {HEADS.format(q='q', k='k', v='v0')} }}", PROJECTIONS
    ),
    "Add stands between the query and key projections and the attention": (
        f"(float[b, s, 8] y) {{ {QKV} q0 = Add (q, q) {HEADS.format(q='q0', k='k', v='v')} }}", PROJECTIONS
    ),
    "a factor stands between the projections": (
        "(float[b, s, 8] y) { u = MatMul (x, w) k = Mul (u, two) r = Relu (k)"
        " y1 = MatMul (r, v) y = Relu (y1) }",
        {"w": square(), "v": square(1), "two": np.array(2, np.float32)},
    ),
}


@pytest.mark.parametrize("reason", READERS)
def test_a_site_that_cannot_be_used_says_why(reason: str, tmp_path: Path, workspace: Workspace) -> None:
    text, weights = READERS[reason]
    held = {name: a for name, a in {"g": ONES, "h": ONES}.items() if f" {name}" in text or f"({name}" in text}
    model = model_of(text, tmp_path, workspace, **weights, **held)
    assert reason in [site.reason for site in find_sites(model)]


def test_values_with_another_reader_are_left(tmp_path: Path, workspace: Workspace) -> None:
    text = (
        "(float[b, s, 8] y, float[b, s, 8] z) { q = MatMul (x, wq) k = MatMul (x, wk) v = MatMul (x, wv)"
        " z = Relu (v) c = com.microsoft.MultiHeadAttention <num_heads = 2> (q, k, v)"
        " o = MatMul (c, wo) y = Relu (o) }"
    )
    model = model_of(
        text, tmp_path, workspace, **{n: square(i) for i, n in enumerate(("wq", "wk", "wv", "wo"))}
    )
    sites = {site.kind: site.reason for site in find_sites(model)}
    assert sites == {"v_o": "the value projection has another reader", "q_k": ""}


def test_values_that_a_cache_keeps_are_left() -> None:
    """Their scale would change what the model gives out."""
    with Workspace() as workspace:
        model = canonicalised(cached_export("llama", with_past=True), workspace)[0]
        reasons = {site.reason for site in find_sites(model) if site.kind == "v_o"}
    assert reasons == {"the key/value cache stands between the value projection and the attention"}


# --------------------------------------------------------------------------- blocks


def test_blocks_without_names_start_at_each_attention(library: Library) -> None:
    model = ir.load(library.architecture("llama").path)
    named = [[linear.node for linear in block.linears] for block in find_blocks(model)]
    for number, node in enumerate(model.graph):
        node.metadata_props[LAYER] = node.metadata_props[ORIGIN] = f"MatMul_{number}"
    blocks = find_blocks(model)
    assert [block.name for block in blocks] == ["block.0", "block.1"]
    assert [[linear.node for linear in block.linears] for block in blocks] == named


def test_every_linear_but_the_head_lies_in_a_block(library: Library) -> None:
    for name in ("bert", "gpt2", "t5", "falcon"):
        model = ir.load(library.architecture(name).path)
        inside = sum(len(block.linears) for block in find_blocks(model))
        assert inside == len([linear for linear in find_linears(model.graph) if not linear.is_head])


def test_a_trace_reports_outputs_of_the_graph(tmp_path: Path, workspace: Workspace) -> None:
    text = "(float[b, s, 8] y) { y = MatMul (x, w) }"
    model = model_of(text, tmp_path, workspace, w=square())
    trace = follow(model.graph.outputs[0])
    assert trace is not None
    assert [leaf.node for leaf in trace.leaves] == [None]
