"""Small models of each fold pattern, and random transforms; shared by the tests of folds."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx_ir as ir

from qcompile.graph.fold import fold
from qcompile.graph.sites import Site, find_sites, tied
from qcompile.graph.workspace import Workspace
from tests.graph.models import canonicalised, relative_error, session, spelled

TOLERANCE = 1e-5  # relative, fp32, folds computed in fp64; measured: at most 5e-6
WRONG = 1e-2  # what a wrong fold exceeds by far; measured: 0.05 at least
KINDS = ("norm", "v_o", "up_down", "q_k")


def random_transform(site: Site, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """s log-uniform in 0.3..3, equal where it must be; z uniform in -0.5..0.5 where the site can shift."""
    random = np.random.default_rng(seed)
    scale = tied(site, np.exp(random.uniform(np.log(0.3), np.log(3), site.channels)))
    can_shift = site.kind == "v_o" or (site.kind == "norm" and not site.experts)
    return scale, random.uniform(-0.5, 0.5, site.channels) * can_shift


def fold_all(model: ir.Model, workspace: Workspace, kinds: tuple[str, ...], seed: int = 0) -> int:
    """Fold a random transform into every legal site; returns how many."""
    sites = [site for site in find_sites(model) if not site.reason and site.kind in kinds]
    for number, site in enumerate(sites):
        fold(model, site, *random_transform(site, seed + number), workspace)
    return len(sites)


WIDTH = 8


def weight(seed: int, rows: int = WIDTH, columns: int = WIDTH) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)


def vector(seed: int, size: int = WIDTH) -> np.ndarray:
    return np.random.default_rng(seed).normal(1.0, 0.5, size=size).astype(np.float32)


@dataclasses.dataclass
class Small:
    """A small canonical model beside its original."""

    model: ir.Model
    source: Path
    workspace: Workspace

    def site(self, kind: str) -> Site:
        return next(site for site in find_sites(self.model) if site.kind == kind)

    def error(self) -> float:
        x = np.random.default_rng(5).normal(size=(2, 6, WIDTH)).astype(np.float32) * vector(9) * 3
        after = session(self.workspace.save(self.model, "after"))
        return relative_error(session(self.source), after, {"x": x})


def small(body: str, path: Path, workspace: Workspace, **weights: np.ndarray) -> Small:
    """``body`` ends in outputs, such as ``=> (float[b, s, 8] y) { .. }``; used names get weights."""
    source = spelled(path / "m.onnx", f"g (float[b, s, {WIDTH}] x) {body}", weights)
    return Small(canonicalised(source, workspace)[0], source, workspace)


Y = "=> (float[b, s, 8] y)"
PATTERNS: dict[str, tuple[str, str, dict[str, np.ndarray]]] = {
    "a_layer_norm": (
        "norm",
        f"{Y} {{ n = LayerNormalization (x, g, h) m = MatMul (n, w) y1 = Add (m, c) y = Relu (y1) }}",
        {"g": vector(1), "h": vector(2), "w": weight(3), "c": vector(4)},
    ),
    "a_layer_norm_without_biases": (
        "norm",
        f"{Y} {{ n = LayerNormalization (x, g) m = MatMul (n, w) y = Relu (m) }}",
        {"g": vector(1), "w": weight(3)},
    ),
    "b_rms_norm": (
        "norm",
        f"{Y} {{ s = Mul (x, x) a = ReduceMean <keepdims = 1> (s, last) e = Add (a, eps) r = Sqrt (e)"
        " d = Div (x, r) n = Mul (d, g) m = MatMul (n, w) y = Relu (m) }",
        {
            "g": vector(1),
            "w": weight(3),
            "last": np.array([-1]),
            "eps": np.array(1e-6, np.float32),
        },
    ),
    "c_post_ln_residual": (
        "norm",
        f"{Y} {{ n = LayerNormalization (x, g, h) m = MatMul (n, w) y1 = Add (m, n) y = Relu (y1) }}",
        {"g": vector(1), "h": vector(2), "w": weight(3)},
    ),
    "d_values": (
        "v_o",
        f"{Y} {{ q = MatMul (x, w) k = MatMul (x, u) v = MatMul (x, p)"
        " c = com.microsoft.MultiHeadAttention <num_heads = 2> (q, k, v) o = MatMul (c, r) y = Relu (o) }",
        {"w": weight(1), "u": weight(2), "p": weight(3), "r": weight(4)},
    ),
    "d_values_of_capped_scores": (
        "v_o",
        f"{Y} {{ q = MatMul (x, w) k = MatMul (x, u) v = MatMul (x, p) q1 = Reshape (q, split) k1 = Reshape (k, split)"
        " v1 = Reshape (v, split) q2 = Transpose <perm = [0, 2, 1, 3]> (q1) k2 = Transpose <perm = [0, 2, 3, 1]> (k1)"
        " v2 = Transpose <perm = [0, 2, 1, 3]> (v1) a = MatMul (q2, k2) b = Tanh (a) c = Softmax (b) d = MatMul (c, v2)"
        " e = Transpose <perm = [0, 2, 1, 3]> (d) f = Reshape (e, join) o = MatMul (f, r) y = Relu (o) }",
        {
            "w": weight(1),
            "u": weight(2),
            "p": weight(3),
            "r": weight(4),
            "split": np.array([0, 0, 2, 4]),
            "join": np.array([0, 0, 8]),
        },
    ),
    "e_gate_up_down": (
        "up_down",
        f"{Y} {{ a = MatMul (x, w) t = Sigmoid (a) k = Mul (a, t) u = MatMul (x, p) m = Mul (k, u)"
        " d = MatMul (m, r) y = Relu (d) }",
        {"w": weight(1), "p": weight(2), "r": weight(3)},
    ),
    "f_relu": (
        "up_down",
        f"{Y} {{ a = MatMul (x, w) b = Add (a, c) k = Relu (b) d = MatMul (k, r) y = Relu (d) }}",
        {"w": weight(1), "c": vector(2), "r": weight(3)},
    ),
    "f_fused_gate_and_up": (
        "up_down",
        f"{Y} {{ a = MatMul (x, w) t, u = Split <axis = -1, num_outputs = 2> (a) i = Relu (t) m = Mul (u, i)"
        " d = MatMul (m, r) y = Relu (d) }",
        {"w": weight(1, 8, 16), "r": weight(3)},
    ),
}


def held_pattern(name: str, path: Path, workspace: Workspace) -> Small:
    return small(PATTERNS[name][1], path, workspace, **PATTERNS[name][2])
