"""What reference implementations of the methods reach on the same windows and pairs, to stand beside ours.

Measured once, not by a command here. SmolLM2: LightCompress (commit 9701d035, fake quantisation in torch); MiniLM: a
plain torch implementation of each method. "asym": asymmetric weights; online: with Hadamard matrices at run time.

w3a16_g128 and w2a16_g64: RTN plain min-max; GPTQ the public code (IST-DASLab/gptq 2d65066e), asymmetric, 32 windows,
with act-order its groups are runs of permuted inputs; OmniQuant the public quantisers (OpenGVLab/OmniQuant 95fae1bd) in
a loop of ours, clips alone, 5 epochs of 32 windows where the paper has 20 of 128: less than it can reach; at 2 bits
with the second loss that its authors take there (aug_loss).
"""

from __future__ import annotations

from collections.abc import Mapping

REFERENCES: Mapping[str, Mapping[str, Mapping[str, float]]] = {
    "smollm2": {
        "w8a8": {"RTN": 29.40, "SmoothQuant": 29.40},
        "w8a8_static": {"RTN": 44.25},
        "w6a6": {"RTN": 35.98, "SmoothQuant": 33.44, "OS+": 32.57, "QuaRot online": 30.90},
        "w6a6_static": {"RTN": 402.35, "SmoothQuant": 221.56},
        "w4a8": {"RTN": 54.23, "SmoothQuant": 74.64, "QuaRot online, asym": 73.78},
        "w4a4": {
            "RTN": 1355.0, "SmoothQuant": 458.22, "OS+": 370.27, "QuaRot folded, asym": 644.85,
            "QuaRot online, asym": 162.31, "OmniQuant, asym": 188.70,
        },
        "w4a16": {"RTN asym": 48.47, "AWQ asym": 45.19, "GPTQ asym": 37.31},
        "w3a16_g128": {
            "RTN asym": 121.73, "GPTQ asym": 79.03, "GPTQ asym, act-order": 60.53, "OmniQuant asym, 5 epochs": 72.82,
        },
        "w2a16_g64": {
            "RTN asym": 398309.07, "GPTQ asym": 5259.25, "GPTQ asym, act-order": 11233.52,
            "OmniQuant asym, 5 epochs": 1930.14,
        },
    },
    "minilm": {
        "w8a8_static": {"RTN": 81.80, "SmoothQuant": 82.07, "OS": 81.98, "OS+": 82.12},
        "w6a6_static": {"RTN": 80.37, "SmoothQuant": 79.62, "OS": 79.43, "OS+": 81.92},
        "w4a4_static": {"RTN": 77.62, "SmoothQuant": 65.95, "OS": 78.40, "OS+": 78.63},
        "w4a4": {"RTN": 80.14, "SmoothQuant": 79.68, "OS": 78.74, "OS+": 79.33},
    },
}  # fmt: skip
