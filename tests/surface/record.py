"""A manifest and a ledger with something in every part, for the tests of the report and of ``explain``."""

from __future__ import annotations

import math

import numpy as np

from qcompile import manifest
from qcompile.ledger import Ledger, Proof


def ledger(layers: int = 6) -> Ledger:
    """Three passes over ``layers`` layers: folds with plots, skips, and a lossy one."""
    book = Ledger()
    book.open("canonicalise", "canonicalise", "function").rewrites = 12
    book.current.facts["recognised"] = {"norms": 2 * layers, "attentions": layers}
    book.current.proof = Proof(2, 0.0, 0.0, math.inf, 1e-5)
    entry = book.open("os_plus", "os_plus{objective=linear}", "function")
    entry.rewrites = layers
    entry.proof = Proof(2, 1e-6, 3.1e-7, 128.0, 1e-5)
    entry.facts["channel_ranges"], entry.facts["search"] = {}, {}
    for i in range(layers):
        _fold(book, f"encoder.layer.{i}.output.LayerNorm", i)
    book.skip("encoder.layer.0.v_o", "q and k share the <bias> of this head", "/encoder/layer.0/MatMul")
    entry = book.open("quantise", "quantise", "approximation")
    entry.rewrites = 3 * layers
    entry.proof = Proof(2, 0.4, 0.03, 31.5)
    entry.facts["layers"] = [{"site": f"layer.{i}.dense", "sqnr_db": 40.0 - 3 * i} for i in range(layers)]
    return book


def _fold(book: Ledger, site: str, seed: int) -> None:
    generator = np.random.default_rng(seed)
    high = generator.uniform(0.5, 2.0, 48)
    high[9] = 30.0
    flat = np.ones(48)
    book.record(site, consumers=3, mode="fold", t=4.2, loss_before=1.5, loss_after=0.4)
    t = np.linspace(1, 30, 20)
    book.current.facts["channel_ranges"][site] = {"before": [-high / 8, high], "after": [-flat, flat]}
    book.current.facts["search"][site] = {"t": t, "loss": (t - 9) ** 2 + 1, "best": 9.0}


def record(book: Ledger | None = None) -> manifest.Manifest:
    """What a manifest would say of ``ledger()``."""
    entries = manifest.plain((book or ledger()).as_list())
    layers = entries[-1]["facts"].pop("layers", [])
    kernels = [
        {"site": "layer.0.dense", "kernel": "QLinearMatMul", "low_bit": True, "reason": ""},
        {"site": "layer.1.dense", "kernel": "MatMul", "low_bit": False, "reason": "kept float by --max-drop"},
    ]
    shown: manifest.Manifest = manifest.plain(
        {
            "format": manifest.FORMAT,
            "name": "tiny <model>",
            "versions": {"qcompile": "0.1.0"},
            "recipe": {"name": "w8a8_static", "rules": []},
            "target": {"name": "cpu"},
            "seed": 0,
            "pipeline": [{"spec": entry["spec"]} for entry in entries],
            "passes": entries,
            "layers": layers,
            "gate": {
                "metric": "perplexity",
                "drop": 0.004,
                "max_drop": 0.01,
                "exceptions": {"down.x": "float"},
            },
            "kernels": kernels,
            "end_to_end": Proof(2, 0.4, 0.03, 31.5),
            "sizes": {"before": 90_000_000, "after": 23_000_000},
            "source": {"kind": "onnx", "files": {"model.onnx": {"bytes": 10, "sha256": "ab" * 32}}},
            "calibration": {"kind": "built-in", "samples": 16},
            "tokenizer": None,
            "interface": {"inputs": [], "outputs": []},
            "files": {},
        }
    )
    return shown
