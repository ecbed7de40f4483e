"""The integer operators: error against float64, and time of their bodies against the float operator, in turns.

    python -m benchmarks.integer_operators --out benchmarks/results/integer_operators

One thread of ONNX Runtime on CPU. Variants that stand for a paper's arithmetic, or for one that was tried and
left, have an error here and a time only where it decided something.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser

from benchmarks import options
from benchmarks.results import Results
from benchmarks.speed import in_turns
from qcompile.graph.functions import DOMAIN
from qcompile.quant import integer

Array = np.ndarray
Feeds = dict[str, Array]
ROWS, CHANNELS, COLUMNS, SIGMA = 512, 768, 512, 2.0
UNIT = 2**16
PERIOD = 2**15


@dataclasses.dataclass(frozen=True)
class Case:
    """One line: ``found`` and ``exact`` are compared; ``call`` and ``reference`` are ONNX text to be timed."""

    operator: str
    variant: str
    found: Callable[[], Array]
    exact: Callable[[], Array]
    feeds: Feeds = dataclasses.field(default_factory=dict)
    call: str = ""
    floats: Feeds = dataclasses.field(default_factory=dict)
    reference: str = ""


def drawn(*shape: int) -> Array:
    return np.random.default_rng(0).standard_normal(shape)


def wide(x: Array) -> Array:
    steps: Array = np.rint(x * UNIT).astype(np.int32)
    return steps


# --------------------------------------------------------------------------- what the papers compute


def shift_exp(x: Array, guard: int, bits: int, clip: float) -> Array:
    """e^x, x <= 0 (..., C), by I-LLM's DI-Exp (arXiv 2405.17849, algorithm 1) on codes of ``bits`` over ``clip``."""
    scale = clip / (2**bits - 1)
    codes = np.rint(np.maximum(x, -clip) / scale).astype(np.int64)
    period = round(1 / (scale * (1 + 1 / 2 - 1 / 16)))
    halvings, rest = -codes // period, -codes % period
    return np.asarray((((period << guard) - ((rest << guard) >> 1)) >> halvings) / float(period << guard))


def quadratic_exp(x: Array) -> Array:
    """e^x, x <= 0: the fraction of the exponent by a quadratic in 12 bits, 24 guard bits."""
    d = np.rint(-x * PERIOD / math.log(2)).astype(np.int64)
    halvings, rest = np.minimum(d // PERIOD, 31), d % PERIOD
    f = (rest << 12) // PERIOD
    return np.asarray(((2**24 - f * ((43 << 12) - 11 * f) // 64) >> halvings) / 2.0**24)


def quadratic_softmax() -> str:
    """The same in standard operators, as it would stand in a graph."""
    powers = ", ".join(str(2**i) for i in range(25))
    return f"""
        last = Constant <value_ints = [-1]> ()
        powers = Constant <value = int32[25] {{{powers}}}> ()
        nowhere = Constant <value = int32 {{-1073741824}}> ()
        zero = Constant <value = int32 {{0}}> ()
        cap = Constant <value = int32 {{524288}}> ()
        most = Constant <value = int32 {{24}}> ()
        fine = Constant <value = int32 {{4096}}> ()
        one = Constant <value = int32 {{16777216}}> ()
        c1 = Constant <value = int32 {{176128}}> ()
        c2 = Constant <value = int32 {{11}}> ()
        c3 = Constant <value = int32 {{64}}> ()
        c4 = Constant <value = int32 {{65793}}> ()
        held = Where (mask, scores, nowhere)
        top = ReduceMax (held, last)
        distance = Sub (top, held)
        floored = Max (distance, zero)
        below = Min (floored, cap)
        q0 = Div (below, period)
        q = Min (q0, most)
        whole = Mul (q0, period)
        rest = Sub (below, whole)
        lifted = Mul (rest, fine)
        f = Div (lifted, period)
        a = Mul (f, c2)
        b = Sub (c1, a)
        c = Mul (f, b)
        d = Div (c, c3)
        e = Sub (one, d)
        p = Gather (powers, q)
        g = Div (e, p)
        h = Div (g, c4)
        weights = Cast <to = 2> (h)
        again = Cast <to = 6> (weights)
        total = ReduceSum (again, last)
    """


def shift_sigmoid(x: Array) -> Array:
    """Sigmoid of I-LLM's DI-SwiGLU: exponentials under the row's largest, 8 bits in, no guard bits."""
    top = np.maximum(x.max(axis=-1, keepdims=True), 0)
    up, down = (shift_exp(v - top, 0, 8, 15.0) for v in (x, np.zeros_like(x)))
    return np.asarray(up / np.maximum(up + down, 1e-9))


def narrow_rms_norm(x: Array) -> Array:
    """RMSNorm on 8-bit codes whose root has no guard bits."""
    codes = np.rint(x * 127 / np.abs(x).max(axis=-1, keepdims=True))
    root = np.floor(np.sqrt(np.floor((codes**2).mean(axis=-1, keepdims=True))))
    return np.asarray(codes / np.maximum(root, 1))


# --------------------------------------------------------------------------- the table


def softmax_cases() -> list[Case]:
    real = SIGMA * drawn(12, COLUMNS, COLUMNS)
    scores = np.rint(real * PERIOD / math.log(2)).astype(np.int32)
    mask = np.tril(np.ones((COLUMNS, COLUMNS), bool))[None]
    period = np.array(PERIOD, np.int32)
    shifted = np.where(mask, real, -np.inf)
    shifted = shifted - shifted.max(axis=-1, keepdims=True)

    def normal(weights: Array) -> Array:
        return np.asarray(weights * mask / np.maximum((weights * mask).sum(axis=-1, keepdims=True), 1e-9))

    def ours(bits: int) -> Array:
        weights, total = integer.softmax_weights(scores, mask, period, 1, bits)
        return np.asarray(weights / total)

    below = np.maximum(shifted, -60)
    feeds = {"scores": scores, "mask": mask, "period": period}
    floats = {"x": real.astype(np.float32), "bias": np.where(mask, 0, -1e9).astype(np.float32)}
    case = functools.partial(Case, "softmax", exact=lambda: normal(np.exp(below)))
    timed: dict[str, Any] = {
        "feeds": feeds,
        "floats": floats,
        "reference": "biased = Add (x, bias)\n y = Softmax (biased)",
    }
    return [
        case("DI-Exp, 8 bits in, no guard bits", lambda: normal(shift_exp(below, 0, 8, 15.0))),
        case("DI-Exp, 8 bits in, 15 guard bits", lambda: normal(shift_exp(below, 15, 8, 15.0))),
        case("quadratic, 8-bit weights", lambda: normal(np.rint(255 * quadratic_exp(below))),
             call=quadratic_softmax(), **timed),
        case("table, 8-bit weights (ours)", lambda: ours(8),
             call="weights, total = qcompile.IntegerSoftmax <lift = 1> (scores, mask, period)", **timed),
        case("table, 16-bit weights (ours)", lambda: ours(16),
             call="weights, low, total = qcompile.IntegerSoftmax16 <lift = 1> (scores, mask, period)", **timed),
    ]  # fmt: skip


def norm_cases() -> list[Case]:
    real = drawn(ROWS, CHANNELS) + 0.3
    real[:, 7] *= 20
    x = wide(real)
    centred = real - real.mean(axis=-1, keepdims=True)
    exact = {
        "RMSNorm": real / np.sqrt(np.square(real).mean(axis=-1, keepdims=True)),
        "LayerNorm": centred / np.sqrt(np.square(centred).mean(axis=-1, keepdims=True)),
    }
    ones = np.ones(CHANNELS, np.float32)
    floats = {"x": real.astype(np.float32), "scale": ones}
    return [
        Case("RMSNorm", "8 bits in, no guard bits", lambda: narrow_rms_norm(real), lambda: exact["RMSNorm"]),
        Case("RMSNorm", "ours", lambda: integer.rms_norm(x) / 2.0**20, lambda: exact["RMSNorm"], {"x": x},
             "y = qcompile.IntegerRMSNorm <epsilon = 0> (x)", floats,
             "square = Mul (x, x)\n last = Constant <value_ints = [-1]> ()\n mean = ReduceMean (square, last)\n"
             "root = Sqrt (mean)\n normal = Div (x, root)\n y = Mul (normal, scale)"),
        Case("LayerNorm", "ours", lambda: integer.layer_norm(x) / 2.0**20, lambda: exact["LayerNorm"], {"x": x},
             "y = qcompile.IntegerLayerNorm <epsilon = 0> (x)", floats, "y = LayerNormalization (x, scale)"),
    ]  # fmt: skip


def activation_cases() -> list[Case]:
    real = 3 * drawn(ROWS, 4 * CHANNELS)
    x = wide(real)
    floats = {"x": real.astype(np.float32)}
    sigma = 1 / (1 + np.exp(-real))
    erf = real * (1 + np.vectorize(math.erf)(real / math.sqrt(2))) / 2
    return [
        Case("sigmoid", "DI-SwiGLU: row's largest, 8 bits in, no guard bits", lambda: shift_sigmoid(real),
             lambda: sigma),
        Case("sigmoid", "ours", lambda: integer.sigmoid(x, UNIT) / 2.0**15, lambda: sigma, {"x": x},
             f"y = qcompile.IntegerSigmoid <unit = {UNIT}> (x)", floats, "y = Sigmoid (x)"),
        Case("tanh", "ours", lambda: integer.tanh(x, UNIT) / 2.0**15, lambda: np.tanh(real), {"x": x},
             f"y = qcompile.IntegerTanh <unit = {UNIT}> (x)", floats, "y = Tanh (x)"),
        Case("SiLU", "ours", lambda: integer.activation("silu", x, UNIT) / UNIT, lambda: real * sigma, {"x": x},
             f"y = qcompile.IntegerSilu <unit = {UNIT}> (x)", floats, "gate = Sigmoid (x)\n y = Mul (x, gate)"),
        Case("GELU", "x * sigmoid(1.702 x)", lambda: real / (1 + np.exp(-1.702 * real)), lambda: erf),
        Case("GELU", "ours", lambda: integer.activation("gelu", x, UNIT) / UNIT, lambda: erf, {"x": x},
             f"y = qcompile.IntegerGelu <unit = {UNIT}> (x)", floats, "y = Gelu (x)"),
    ]  # fmt: skip


def grid_cases() -> list[Case]:
    x = wide(8 * drawn(ROWS, 4 * CHANNELS))
    scale: Array = np.random.default_rng(1).uniform(1e-4, 1e-3, (x.shape[1],))
    m, d, _ = integer.fit(scale)
    floats = {"x": x.astype(np.float32), "scale": scale.astype(np.float32)}
    ends = "floored = Max (scaled, low)\n y = Min (floored, high)"
    limits = "low = Constant <value_float = -32767.0> ()\n high = Constant <value_float = 32767.0> ()\n"

    def rounded(bits: int, symmetric: bool) -> Array:
        codes, zero, _, _ = integer.quantize_per_token(x, bits, symmetric)
        return np.asarray(codes.astype(np.float64) - zero)

    top = np.abs(x).max(axis=-1, keepdims=True).astype(np.float64)
    return [
        Case("requantize", "8-bit multiplier", lambda: np.asarray(x * _fitted(scale, 8)), lambda: x * scale),
        Case("requantize", "ours, 15-bit multiplier", lambda: integer.requantize(x, m, d, -32767, 32767),
             lambda: x * scale, {"x": x, "m": m, "d": d},
             "y = qcompile.Requantize <low = -32767, high = 32767> (x, m, d)", floats,
             f"{limits} product = Mul (x, scale)\n scaled = Round (product)\n {ends}"),
        Case("quantise per token", "ours, 8 bits symmetric, in steps", lambda: rounded(8, True),
             lambda: x * 127 / top, {"x": x},
             "y, zero, step, divisor = qcompile.QuantizePerTokenIntegerSymmetric <bits = 8> (x)", floats,
             "last = Constant <value_ints = [-1]> ()\n levels = Constant <value_float = 127.0> ()\n size = Abs (x)\n"
             "top = ReduceMax (size, last)\n step = Div (top, levels)\n ratio = Div (x, step)\n"
             "rounded = Round (ratio)\n y = Cast <to = 3> (rounded)"),
    ]  # fmt: skip


def _fitted(scale: Array, bits: int) -> Array:
    m, d, _ = integer.fit(scale, bits)
    return np.asarray(m / (2.0**16 * d))


def attention_cases() -> list[Case]:
    generator = np.random.default_rng(0)
    total = generator.integers(255, 255 * COLUMNS, (12, COLUMNS, 1)).astype(np.int32)
    sums = np.rint(total * generator.uniform(-20, 20, (12, COLUMNS, 64))).astype(np.int32)
    x = generator.integers(-(2**15), 2**15, (1, 12, COLUMNS, 64)).astype(np.int32)
    angles = np.outer(np.arange(COLUMNS), np.geomspace(1, 1e-4, 32))
    cos, sin = (np.tile(f(angles), 2)[None, None] for f in (np.cos, np.sin))
    tables = [np.rint(t * 2**14).astype(np.int32) for t in (cos, sin)]
    pairs = (x[..., :32] + 1j * x[..., 32:]) * np.exp(1j * angles)
    rotated = np.concatenate([pairs.real, pairs.imag], axis=-1)
    as_floats = {"x": x.astype(np.float32), "c": cos.astype(np.float32), "s": sin.astype(np.float32)}
    return [
        Case("normalise attention", "ours, in codes of V", lambda: integer.normalize_attention(sums, total) / 128,
             lambda: sums / total, {"sums": sums, "total": total}, "y = qcompile.NormalizeAttention (sums, total)",
             {"x": sums.astype(np.float32), "t": total.astype(np.float32)}, "y = Div (x, t)"),
        Case("rotary embedding", "ours, in units of x", lambda: integer.rotary_embedding(x, *tables),
             lambda: rotated, {"x": x, "cos": tables[0], "sin": tables[1]},
             "y = qcompile.IntegerRotaryEmbedding (x, cos, sin)", as_floats,
             "first, second = Split <axis = -1, num_outputs = 2> (x)\n negated = Neg (second)\n"
             "rotated = Concat <axis = -1> (negated, first)\n a = Mul (x, c)\n b = Mul (rotated, s)\n y = Add (a, b)"),
    ]  # fmt: skip


def cases() -> list[Case]:
    return [*grid_cases(), *softmax_cases(), *attention_cases(), *norm_cases(), *activation_cases()]


_KINDS = {"int32": "int32", "bool": "bool", "float32": "float"}


def runner(body: str, feeds: Feeds) -> Callable[[], Any]:
    """One run of the nodes of ``body``; every value that the last line defines is an output."""
    import onnx_ir as ir

    from qcompile.calibration.runner import open_session
    from qcompile.graph.functions import use

    ends = ", ".join(
        f"{_KINDS[x.dtype.name]}[{', '.join(f'{name}{i}' for i in range(x.ndim))}] {name}" for name, x in feeds.items()
    )
    nodes = onnx.parser.parse_function(
        f'<domain: "t", opset_import: ["" : 21, "{DOMAIN}" : 1]>\n'
        f"body ({', '.join(feeds)}) => ({_last(body)}) {{ {body} }}"
    ).node
    header = f'<ir_version: 10, opset_import: ["" : 21, "{DOMAIN}" : 1]>\n'
    proto = onnx.parser.parse_model(f"{header} g ({ends}) => () {{ }}")
    proto.graph.node.extend(nodes)
    for name in (text.strip() for text in _last(body).split(",")):
        proto.graph.output.append(onnx.ValueInfoProto(name=name))
    model = ir.serde.deserialize_model(proto)
    for node in list(model.graph):
        if node.domain == DOMAIN:
            use(model, node.op_type)
    session = open_session(ir.to_proto(model).SerializeToString(), threads=1)
    return functools.partial(session.run, None, feeds)


def _last(body: str) -> str:
    """The names that the last line defines."""
    return body.strip().splitlines()[-1].partition("=")[0].strip()


def measured(case: Case, rounds: int) -> dict[str, Any]:
    """A row of the table."""
    error = float(np.abs(case.found() - case.exact()).max())
    row: dict[str, Any] = {
        "key": f"{case.operator}: {case.variant}",
        "operator": case.operator,
        "variant": case.variant,
    }
    row |= {"max_error": error, "rounds": rounds, "load": options.load(), "ms": None, "float_ms": None}
    if case.call:
        body, reference = runner(case.call, case.feeds), runner(case.reference, case.floats)
        (wall, _), (float_wall, _) = in_turns([body, reference], rounds)
        row |= {"ms": min(wall), "float_ms": min(float_wall)}
    return row


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.integer_operators",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=20, metavar="N", help="default 20")
    parser.add_argument(
        "--out", required=True, type=Path, metavar="NAME", help="NAME.json and NAME.md; rows are added to it"
    )
    given = parser.parse_args(arguments)
    command = f"python -m benchmarks.integer_operators --out {given.out}"
    results = Results(given.out, "integer_operators", model="operators", threads=1, command=command)
    for case in cases():
        results.add(measured(case, given.rounds))
    print(results.markdown())


if __name__ == "__main__":
    main()
