"""Fused operators taken apart, each against ONNX Runtime's own kernel, at two shapes."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest

from qcompile.graph.workspace import Workspace
from tests.graph.models import canonicalised, compare, operators, relative_error, session, spelled

TOLERANCE = 2e-6  # relative to the largest output; measured: at most 8e-7
RANDOM = np.random.default_rng(3)
D, H = 16, 4  # hidden width and heads


def weight(*shape: int) -> np.ndarray:
    return RANDOM.normal(size=shape).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Case:
    """A graph of one fused operator over x (batch, sequence, 16), and operators that must come of it."""

    body: str
    weights: dict[str, np.ndarray]
    expected: set[str]
    outputs: str = "float[b, s, 16] y"
    inputs: str = "float[b, s, 16] x"
    opset: int = 21


def tables(places: int = 32, half: int = 2) -> dict[str, np.ndarray]:
    angles = np.arange(places)[:, None] * 10.0 ** -np.arange(half)
    return {"cos": np.cos(angles).astype(np.float32), "sin": np.sin(angles).astype(np.float32)}


NORM = {"g": weight(D), "b": weight(D), "bias": weight(D)}
QKV = {"w": weight(D, 3 * D), "c": weight(3 * D)}
MASK = "float[b, s, 16] x, int32[b, s] mask"
PROJECTED = "q = MatMul (x, wq) k = MatMul (x, wk) v = MatMul (x, wv)"
SQUARE = {name: weight(D, D) for name in ("wq", "wk", "wv")}
GROUPED = {"wq": weight(D, D), "wk": weight(D, D // 2), "wv": weight(D, D // 2)}
TURNED = {"wq": weight(D, 2 * D), "wk": weight(D, D), "wv": weight(D, D)}
LENGTHS = "float[b, s, 16] x, int32[b] last, int32 total"
HEADS = "float[b, 4, s, 4] q, float[b, 4, s, 4] k, float[b, 4, s, 4] v"
ATTENTION = {"Attention"}
CASES: dict[str, Case] = {
    "skip_layer_norm_with_sum": Case(
        "y, m, i, z = com.microsoft.SkipLayerNormalization <epsilon = 1e-6> (x, x, g, b, bias)",
        NORM,
        {"LayerNormalization", "Add"},
        "float[b, s, 16] y, float[b, s, 16] z",
    ),
    "skip_layer_norm_without_beta": Case(
        "y = com.microsoft.SkipLayerNormalization (x, x, g)", {"g": NORM["g"]}, {"LayerNormalization"}
    ),
    "skip_simplified": Case(
        "y, m, i, z = com.microsoft.SkipSimplifiedLayerNormalization <epsilon = 1e-6> (x, x, g, bias)",
        {"g": NORM["g"], "bias": NORM["bias"]},
        {"RMSNormalization"},
        "float[b, s, 16] y, float[b, s, 16] z",
    ),
    "embed_layer_norm_whose_mask_index_attention_reads": Case(  # what ONNX Runtime's optimizer makes of BERT
        """i = Cast <to = 6> (ids)
        e, n = com.microsoft.EmbedLayerNormalization (i, kind, words, places, kinds, g, b, mask)
        y = com.microsoft.Attention <num_heads = 4> (e, w, c, n)""",
        {"words": weight(256, D), "places": weight(64, D), "kinds": weight(2, D), **NORM, **QKV},
        {"LayerNormalization", "Attention"},
        inputs="int64[b, s] ids, int32[b, s] kind, int32[b, s] mask",
    ),
    "embed_layer_norm": Case(
        "y, n = com.microsoft.EmbedLayerNormalization (ids, kind, words, places, kinds, g, b, mask)",
        {
            "words": weight(256, D),
            "places": weight(64, D),
            "kinds": weight(2, D),
            "g": NORM["g"],
            "b": NORM["b"],
        },
        {"LayerNormalization", "Gather", "ReduceSum"},
        "float[b, s, 16] y, int32[b] n",
        "int32[b, s] ids, int32[b, s] kind, int32[b, s] mask",
    ),
    "bias_gelu": Case("y = com.microsoft.BiasGelu (x, b)", {"b": NORM["b"]}, {"Add", "Gelu"}),
    "gelu": Case("y = com.microsoft.Gelu (x)", {}, {"Gelu"}),
    "fast_gelu": Case("y = com.microsoft.FastGelu (x, b)", {"b": NORM["b"]}, {"Add", "Gelu"}),
    "quick_gelu": Case("y = com.microsoft.QuickGelu <alpha = 1.702> (x)", {}, {"Sigmoid"}),
    "silu_as_quick_gelu": Case("y = com.microsoft.QuickGelu <alpha = 1.0> (x)", {}, {"Silu"}),
    "swish": Case("y = Swish (x)", {}, {"Silu"}, opset=24),
    "fused_matmul": Case(
        "y = com.microsoft.FusedMatMul <alpha = 0.5, transB = 1> (x, x)",
        {},
        {"Transpose"},
        "float[b, s, t] y",
    ),
    "fused_matmul_trans_a": Case(
        "y = com.microsoft.FusedMatMul <transA = 1> (x, x)", {}, {"Transpose"}, "float[b, t, u] y"
    ),
    "attention_2d_mask": Case(
        "y = com.microsoft.Attention <num_heads = 4> (x, w, c, mask)", QKV, ATTENTION, inputs=MASK
    ),
    "attention_causal_scaled": Case(
        "y = com.microsoft.Attention <num_heads = 4, unidirectional = 1, scale = 0.3> (x, w, c)",
        QKV,
        ATTENTION,
    ),
    "attention_of_other_widths": Case(
        "y = com.microsoft.Attention <num_heads = 4, qkv_hidden_sizes = [16, 16, 8]> (x, w, c)",
        {"w": weight(D, 40), "c": weight(40)},
        ATTENTION,
        "float[b, s, 8] y",
    ),
    "attention_lengths": Case(
        "y = com.microsoft.Attention <num_heads = 4> (x, w, c, lengths)",
        QKV,
        ATTENTION,
        inputs="float[b, s, 16] x, int32[b] lengths",
    ),
    "attention_3d_mask": Case(
        "y = com.microsoft.Attention <num_heads = 4> (x, w, c, mask)",
        QKV,
        ATTENTION,
        inputs="float[b, s, 16] x, int32[b, s, s] mask",
    ),
    "attention_bias": Case(
        "y = com.microsoft.Attention <num_heads = 4> (x, w, c, , , bias)",
        QKV,
        ATTENTION,
        inputs="float[b, s, 16] x, float[b, 4, s, s] bias",
    ),
    "multi_head_key_mask": Case(
        f"{PROJECTED} y = com.microsoft.MultiHeadAttention <num_heads = 4> (q, k, v, c, mask)",
        SQUARE | {"c": QKV["c"]},
        ATTENTION,
        inputs=MASK,
    ),
    "multi_head_causal": Case(
        f"{PROJECTED} y = com.microsoft.MultiHeadAttention <num_heads = 4, unidirectional = 1> (q, k, v)",
        SQUARE,
        ATTENTION,
    ),
    "group_query_rotary": Case(
        f"{PROJECTED} y = com.microsoft.GroupQueryAttention <num_heads = 2, kv_num_heads = 1, do_rotary = 1>"
        " (q, k, v, , , last, total, cos, sin)",
        TURNED | tables(half=8),
        {"GroupedAttention", "RotaryEmbedding"},
        "float[b, s, 32] y",
        LENGTHS,
    ),
    "group_query_interleaved": Case(
        f"{PROJECTED} y = com.microsoft.GroupQueryAttention <num_heads = 2, kv_num_heads = 1, do_rotary = 1,"
        " rotary_interleaved = 1> (q, k, v, , , last, total, cos, sin)",
        TURNED | tables(half=8),
        {"GroupedAttention", "RotaryEmbedding"},
        "float[b, s, 32] y",
        LENGTHS,
    ),
    "group_query_packed_and_present": Case(
        "p = MatMul (x, w) y, k, v = com.microsoft.GroupQueryAttention <num_heads = 2, kv_num_heads = 1>"
        " (p, , , , , last, total)",
        {"w": weight(D, 2 * D)},
        {"GroupedAttention", "Split"},
        "float[b, s, 16] y, float[b, 1, s, 8] k, float[b, 1, s, 8] v",
        LENGTHS,
    ),
    "group_query_window": Case(
        f"{PROJECTED} y = com.microsoft.GroupQueryAttention <num_heads = 2, kv_num_heads = 1,"
        " local_window_size = 3> (q, k, v, , , last, total)",
        GROUPED,
        {"GroupedAttention"},
        inputs=LENGTHS,
    ),
    "rotary": Case(
        "y = com.microsoft.RotaryEmbedding <num_heads = 4> (x, start, cos, sin)",
        tables() | {"start": np.array([2], np.int64)},
        {"RotaryEmbedding"},
    ),
    "rotary_part_interleaved": Case(
        "y = com.microsoft.RotaryEmbedding <num_heads = 4, interleaved = 1, rotary_embedding_dim = 2>"
        " (x, start, cos, sin)",
        tables(half=1) | {"start": np.array([0], np.int64)},
        {"RotaryEmbedding", "Concat"},
    ),
    "standard_rotary": Case(
        "r = RotaryEmbedding (q, cos, sin, place) s = RotaryEmbedding <interleaved = 1> (k, cos, sin, place)"
        " y = Add (r, s)",
        tables(),
        {"RotaryEmbedding"},
        "float[b, 4, s, 4] y",
        "float[b, 4, s, 4] q, float[b, 4, s, 4] k, int64[b, s] place",
        23,
    ),
    "standard_attention_causal": Case(
        "y = Attention <is_causal = 1, scale = 0.4> (q, k, v)",
        {},
        ATTENTION,
        "float[b, 4, s, 4] y",
        HEADS,
        23,
    ),
    "standard_attention_grouped_masked": Case(
        "y = Attention <q_num_heads = 4, kv_num_heads = 2> (q, k, v, mask)",
        {},
        {"GroupedAttention", "Where"},
        "float[b, s, 16] y",
        "float[b, s, 16] q, float[b, s, 8] k, float[b, s, 8] v, bool[s, s] mask",
        23,
    ),
    "standard_attention_added_bias": Case(
        "y = Attention (q, k, v, bias)",
        {},
        ATTENTION,
        "float[b, 4, s, 4] y",
        f"{HEADS}, float[b, 1, s, s] bias",
        24,
    ),
    "standard_rms_norm": Case(
        "y = RMSNormalization <epsilon = 1e-6> (x, g)", {"g": NORM["g"]}, {"RMSNormalization"}, opset=23
    ),
}
_FUSED_NAMES = ("Skip", "Embed", "Bias", "Fast", "Quick", "Fused", "MultiHead", "GroupQuery", "Swish")


def feeds_of(case: Case, batch: int, sequence: int) -> dict[str, np.ndarray]:
    """Values by the inputs' names; masks leave every row its first key."""
    random = np.random.default_rng(sequence)
    sizes = {"b": batch, "s": sequence}
    found: dict[str, np.ndarray] = {}
    for kind, axes, name in re.findall(r"(\w+)(?:\[([^\]]*)\])? (\w+)", case.inputs):
        shape = [sizes[a] if a in sizes else int(a) for a in axes.split(", ") if a]
        found[name] = _value(name, kind, shape, random, sequence)
    return found


def _value(name: str, kind: str, shape: list[int], random: np.random.Generator, sequence: int) -> np.ndarray:
    if name == "mask":
        seen = np.tril(np.ones(shape)) if kind == "bool" else np.ones(shape)
        if kind != "bool":
            seen[-1, ..., max(1, sequence // 2) :] = 0
        return seen.astype(bool if kind == "bool" else np.int32)
    if name == "last":
        return np.full(shape, sequence - 1, np.int32)
    if name == "total":
        return np.asarray(sequence, np.int32)
    if name == "lengths":
        return np.arange(sequence, sequence - shape[0], -1, dtype=np.int32)
    if name == "place":
        return np.tile(np.arange(shape[1]), (shape[0], 1))
    if kind.startswith("int"):
        return random.integers(0, 2, shape).astype(kind)
    return random.normal(size=shape).astype(np.float32)


def write(case: Case, path: Path) -> Path:
    body = case.body.replace(" y", "\n y").replace(" k = ", "\n k = ").replace(" v = ", "\n v = ")
    return spelled(path, f"g ({case.inputs}) => ({case.outputs}) {{ {body} }}", case.weights, case.opset)


@pytest.mark.parametrize("name", CASES)
def test_taken_apart(name: str, tmp_path: Path, workspace: Workspace) -> None:
    case = CASES[name]
    source = write(case, tmp_path / "model.onnx")
    model, entry, error = compare(source, feeds_of(case, 2, 7), workspace)
    assert error <= TOLERANCE
    assert (
        relative_error(session(source), session(workspace.save(model, "again")), feeds_of(case, 3, 5))
        <= TOLERANCE
    )
    assert case.expected <= set(operators(model))
    assert not [op for op in operators(model) if op.startswith(_FUSED_NAMES)]
    assert all(node.domain in ("", "qcompile") for node in model.graph)
    assert entry.skips == []


def test_the_context_is_as_wide_as_the_values(tmp_path: Path, workspace: Workspace) -> None:
    case = CASES["attention_of_other_widths"]
    model, _ = canonicalised(write(case, tmp_path / "model.onnx"), workspace)
    (shape,) = (node.outputs[0].shape for node in model.graph if node.op_type == "Attention")
    assert shape is not None and shape[1] == H and shape[3] == 2


def test_a_fused_embedding_looks_up_the_ids_of_the_caller(tmp_path: Path, workspace: Workspace) -> None:
    """Through a Cast to int32 no proof would know that they lie inside of the table."""
    case = CASES["embed_layer_norm_whose_mask_index_attention_reads"]
    model, _ = canonicalised(write(case, tmp_path / "model.onnx"), workspace)
    assert [node.op_type for node, _ in model.graph.inputs[0].uses()].count("Gather") == 1
    assert not [node for node in model.graph if node.op_type == "Cast" and node.inputs[0] is model.graph.inputs[0]]


REFUSED = {
    "past": (
        Case(
            "y, p = com.microsoft.Attention <num_heads = 4> (x, w, c, , past)",
            QKV,
            set(),
            inputs="float[b, s, 16] x, float[2, b, 4, t, 4] past",
        ),
        "it keeps past keys and values",
    ),
    "capped": (
        Case("y = Attention <softcap = 5.0> (q, k, v)", {}, set(), "float[b, 4, s, 4] y", HEADS, 23),
        "its scores are capped",
    ),
    "unknown": (
        Case("y = com.microsoft.Inverse (x)", {}, set(), "float[b, 3, 3] y", "float[b, 3, 3] x"),
        "no canonical form",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_taken_apart_stays_with_a_reason(
    name: str, tmp_path: Path, workspace: Workspace
) -> None:
    case, reason = REFUSED[name]
    before = write(case, tmp_path / "model.onnx")
    model, entry = canonicalised(before, workspace)
    assert len(entry.skips) == 1
    assert reason in entry.skips[0].reason
    assert entry.skips[0].site in operators(model)
    session(workspace.save(model, "after"))
