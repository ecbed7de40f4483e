"""What 4 bits cost each model of ``benchmarks.training``: perplexity of compiled programs, as JSON and Markdown."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

import qcompile
from benchmarks.protocol import next_token_nats
from benchmarks.results import machine
from benchmarks.tables import table
from qcompile.models.small_lm import Corpus, SmallLm, optimizer_of
from qcompile.quant.numerics import quantize_weight
from qcompile.quant.schemes import ActivationScheme, WeightScheme
from qcompile.recipe import Recipe, Rule

if TYPE_CHECKING:
    from benchmarks.training import Run

WINDOWS, CALIBRATION, BATCH = 32, 16, 8
Feeds = list[dict[str, np.ndarray]]
SHAPES = {"input_ids": {0: "batch", 1: "sequence"}, "attention_mask": {0: "batch", 1: "sequence"}}
# column -> (bits of weights, bits of activations); only linears of the blocks are quantised. Rounded to nearest, it is
# computed in torch by the grids of the compiler (tests/training/test_capture.py holds the program to be equal);
# gptq is a pass of the compiler, so the program itself is run.
NEAREST: dict[str, tuple[int, int | None]] = {
    "W8A8": (8, 8), "W16A4": (16, 4), "W4A16 RTN": (4, None), "W4A4 RTN": (4, 4),
}  # fmt: skip
SOLVED: dict[str, tuple[int, int | None]] = {"W4A16 GPTQ": (4, None), "W4A4 GPTQ": (4, 4)}
CLAMPED = "W16A16 clamped"  # to the learned ranges, nothing rounded: what a model with clips computes in full precision
LAST = ("kurtosis", "outlier_channels", "max_ratio", "weight_ratio")
RESIDUAL = ("q_proj", "fc1")  # linears that read the residual stream; q_proj stands for k and v, too


def recipe_of(weights: int, activations: int | None) -> Recipe:
    """Weights per channel, symmetric; activations per tensor, static, asymmetric, their range the smallest and largest
    value seen."""
    scheme = None if activations is None else ActivationScheme(bits=activations, observer="minmax")
    return Recipe(name="blocks", rules=(Rule(weights=WeightScheme(bits=weights), activations=scheme),))


def nearest(run: Run, found: dict[str, Any], calibration: Feeds, held_out: np.ndarray) -> None:
    """Fill ``found`` with the perplexities that torch computes; what is there already is kept."""
    found |= {"steps": run.step, "tokens": run.step * run.given.rows * run.recipe.positions}
    found |= {"seconds": round(run.seconds), "outliers": totals(run.history.rows[-1]["layers"])}
    found.setdefault("W16A16", in_torch(without_clips(run), held_out))
    if CLAMPED not in found:
        found[CLAMPED] = in_torch(clamped(run), held_out) if has_clips(run) else found["W16A16"]
    for name, (weights, activations) in NEAREST.items():
        if name not in found:
            found[name] = in_torch(rounded(run, weights, activations, calibration), held_out)
            print(f"{run.name} {name}: {found[name]:.2f}", flush=True)


def solved(run: Run, found: dict[str, Any], calibration: Feeds, held_out: np.ndarray) -> None:
    """Fill ``found`` with those of compiled programs."""
    for name in run.given.solved:
        if name not in found:
            begun = time.monotonic()
            found[name] = compiled(run, *SOLVED[name], calibration, held_out)
            print(f"{run.name} {name}: {found[name]:.2f} ({time.monotonic() - begun:.0f} s)", flush=True)


def clamped(run: Run) -> Any:
    """The weights in a module that cuts inputs where learned ranges end."""
    from qcompile.training.aware import aware_linears

    module = without_clips(run)
    for name, linear in aware_linears(run.model).items():
        low, high = linear.clip.ends()  # type: ignore[union-attr, operator]
        module.get_submodule(name).register_forward_pre_hook(_cut(low, high))
    return module


def _cut(low: float, high: float) -> Callable[[Any, tuple[Any, ...]], tuple[Any, ...]]:
    return lambda _module, args: (args[0].clamp(low, high),)


def rounded(run: Run, weights: int, activations: int | None, calibration: Feeds) -> Any:
    """A module of the same weights, to the nearest code; activations within learned ranges where there are some, else
    from the smallest to the largest value that calibration sees."""
    import torch

    from qcompile.training import quantization_aware
    from qcompile.training.aware import aware_linears

    learned = aware_linears(run.model) if has_clips(run) else {}
    module = clamped(run) if learned and activations is None else without_clips(run)
    quantization_aware(module, activations, 0.0)
    if activations is not None:
        for name in learned:
            linear: Any = module.get_submodule(name)
            low, high = learned[name].clip.ends()  # type: ignore[union-attr, operator]
            linear.clip.start(torch.tensor([low]), torch.tensor([high]))
            linear.clip.mark_started()
        if not learned:
            _start_on_extremes(module, calibration)
    for linear in aware_linears(module).values():
        if weights < 16:
            w = linear.weight.detach().numpy().T
            codes = quantize_weight(np.ascontiguousarray(w), WeightScheme(bits=weights))
            linear.weight.data = torch.from_numpy(np.ascontiguousarray(codes.dequantized().T))
    return module.eval()


def _start_on_extremes(module: Any, calibration: Feeds) -> None:
    import torch

    from qcompile.training.aware import aware_linears

    seen: dict[str, list[torch.Tensor]] = {}

    def look(name: str) -> Any:
        return lambda _module, args: seen.setdefault(name, []).append(torch.stack(torch.aminmax(args[0])))

    linears: dict[str, Any] = aware_linears(module)
    bare = [part.clip for part in linears.values()]
    for part in linears.values():
        part.clip = torch.nn.Identity()
    handles = [part.register_forward_pre_hook(look(name), prepend=True) for name, part in linears.items()]
    with torch.no_grad():
        for feeds in calibration:
            module.eval()(**{name: torch.from_numpy(x) for name, x in feeds.items()})
    for handle in handles:
        handle.remove()
    for (name, part), clip in zip(linears.items(), bare, strict=True):
        part.clip = clip
        ends = torch.stack(seen[name])
        clip.start(ends[:, 0].min().clamp(max=0).reshape(1), ends[:, 1].max().clamp(min=0).reshape(1))
        clip.mark_started()


def compiled(run: Run, weights: int, activations: int | None, calibration: Feeds, windows: np.ndarray) -> float:
    """The perplexity of the compiled program, with weights that ``gptq`` chose; float activations are cut where learned
    ranges end."""
    kind = "float" if not has_clips(run) else "clamps" if activations is None else "clips"
    module = run.model if kind == "clips" else clamped(run) if kind == "clamps" else without_clips(run)
    path = captured(module, run.folder / f"{kind}-{run.step}")
    recipe = recipe_of(weights, activations)
    with qcompile.compile(ir.load(path), calibration=calibration, recipe=recipe, passes="gptq") as program:
        return perplexity(lambda feeds: next(iter(program.run(feeds).values())), windows)


def has_clips(run: Run) -> bool:
    from qcompile.training.aware import aware_linears

    return any(hasattr(linear, "clip") for linear in aware_linears(run.model).values())


def without_clips(run: Run) -> Any:
    """The same weights in a module without clips."""
    module = run.recipe.build()
    kept = {name: value for name, value in run.model.state_dict().items() if ".clip." not in name}
    module.load_state_dict(kept)
    return module.eval()


def captured(module: Any, folder: Path) -> Path:
    import torch

    from qcompile.capture.torch_model import capture_module

    path = folder / "model.onnx"
    if not path.is_file():
        module.config.use_cache = False
        ids = torch.arange(20).reshape(2, 10)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        capture_module(module, inputs, SHAPES, folder, output_names=["logits"])
    return path


def as_feeds(ids: np.ndarray) -> dict[str, np.ndarray]:
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def in_torch(module: Any, windows: np.ndarray) -> float:
    import torch

    module.eval()

    def run(feeds: dict[str, np.ndarray]) -> np.ndarray:
        with torch.no_grad():
            found: np.ndarray = module(**{name: torch.from_numpy(x) for name, x in feeds.items()}).logits.numpy()
        return found

    return perplexity(run, windows)


def perplexity(run: Any, windows: np.ndarray) -> float:
    """Over the held-out windows, 127 predictions each."""
    nats: list[float] = []
    for start in range(0, len(windows), BATCH):
        batch = windows[start : start + BATCH]
        logits = run(as_feeds(batch))
        nats += [float(np.mean(next_token_nats(logits[i], batch[i]))) for i in range(len(batch))]
    return round(math.exp(float(np.mean(nats))), 3)


def totals(layers: dict[str, dict[str, float]]) -> dict[str, float]:
    """Sums over layers of outlier channels, all and those of the residual stream, and the largest of other figures."""
    found = {key: [figures[key] for figures in layers.values()] for key in LAST}
    read = {name: figures for name, figures in layers.items() if name.endswith(RESIDUAL)}
    return {key: float(sum(v) if key == "outlier_channels" else max(v)) for key, v in found.items()} | {
        "residual_channels": float(sum(figures["outlier_channels"] for figures in read.values())),
        "residual_ratio": max(figures["mean_ratio"] for figures in read.values()),
    }


def step_times(recipe: SmallLm, given: argparse.Namespace, bfloat16: bool, repeats: int = 11) -> dict[str, float]:
    """Processor seconds of a step of each kind over those of a plain step: medians of steps that take turns."""
    import torch

    from benchmarks.training import VARIANTS, one_step
    from qcompile.training import parameter_groups, quantization_aware

    made: dict[str, tuple[Any, Any]] = {}
    for name, variant in VARIANTS.items():
        model: Any = recipe.build().train()
        if name != "plain":
            quantization_aware(model, variant.bits, given.kurtosis if variant.kurtosis else 0.0)
        made[name] = (model, optimizer_of(parameter_groups(model, 1e-3, 0.1)))
    ids = torch.randint(0, recipe.vocabulary, (given.rows, recipe.positions))
    times: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(repeats + 1):
        for name, (model, optimizer) in made.items():
            begun = time.process_time()
            one_step(model, optimizer, ids, bfloat16)
            times[name].append(time.process_time() - begun)
    plain = times["plain"]
    ratios = {n: [a / b for a, b in zip(t[1:], plain[1:], strict=True)] for n, t in times.items()}
    return {name: round(statistics.median(found), 3) for name, found in ratios.items()}


def digest(model: Any) -> str:
    """Of all weights by name, in float32."""
    sum_ = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        sum_.update(name.encode() + value.float().numpy().tobytes())
    return sum_.hexdigest()


def write(out: Path, everything: dict[str, Any]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
    out.with_suffix(".md").write_text("\n\n".join(pages(everything, f"{out.stem}.svg")) + "\n", encoding="utf-8")


def pages(everything: dict[str, Any], plot: str) -> list[str]:
    """Perplexities, what is asked of them, outliers, the time of a step, and how it was made."""
    rows = everything["variants"]
    columns = ["W16A16", CLAMPED, *NEAREST, *SOLVED]
    shown = [[name, *(_cell(row.get(column)) for column in columns)] for name, row in rows.items()]
    ratios = [[name, *(_ratio(row, column) for column in columns)] for name, row in rows.items()]
    seen = {name: row["outliers"] for name, row in rows.items() if "outliers" in row}
    shown_keys = (*LAST[:2], "residual_channels", "residual_ratio", *LAST[2:])
    outliers = [[name, *(f"{figures[key]:.4g}" for key in shown_keys)] for name, figures in seen.items()]
    found = [
        table(["perplexity", *columns], shown),
        table([f"over the same model at {CLAMPED}", *columns], ratios),
        table(["after the last step", "largest kurtosis of outputs", "outlier channels of all inputs",
                "of the residual stream", "largest mean/median there", "largest max/median of inputs",
                "largest weight over RMS"], outliers),
    ]  # fmt: skip
    if "step_times" in everything:
        times = everything["step_times"]
        lines = [[name, *(f"{ratios[name]:.2f}" for ratios in times.values())] for name in rows]
        found.append(table(["processor time of a step over plain", *times], lines))
    about = "\n".join(f"- {name}: {value}" for name, value in everything["about"].items())
    return [*found, about, f"![over training]({plot})"]


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _ratio(row: dict[str, Any], column: str) -> str:
    return f"{row[column] / row[CLAMPED]:.3f}" if column in row and CLAMPED in row else ""


def report(given: argparse.Namespace, runs: dict[str, Run], corpus: Corpus) -> None:
    """Score every run and write NAME.json, NAME.md and NAME.svg; scores of the same weights are kept."""
    from qcompile.reporting.training import over_training

    path = given.out.with_suffix(".json")
    old = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"variants": {}}
    everything: dict[str, Any] = {"kind": "training", "model": "small_lm", "about": {}, "variants": {}}
    first = next(iter(runs.values()))
    model = without_clips(first)
    everything["about"] = {
        "model": f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, {first.recipe}",
        "text": f"{len(corpus.train)} tokens to train on, {len(corpus.valid)} held out; digest {corpus.digest[:16]}",
        "training": f"{first.step} steps of {given.rows} x {first.recipe.positions} tokens, "
        f"{first.step * given.rows * first.recipe.positions} tokens in all, rate {given.rate:g}, "
        f"that of clips {given.clip_rate:g} times as much at first, kurtosis {given.kurtosis:g}",
        "weights of the plain model": digest(without_clips(runs["plain"])) if "plain" in runs else "",
        "perplexity": f"{WINDOWS} held-out windows of {first.recipe.positions} tokens, spread evenly; "
        f"calibration {CALIBRATION} windows",
        "command": f"python -m benchmarks.training --run DIR --out NAME --steps {first.step} --rows {given.rows} "
        f"--every {given.every}" + " --bfloat16" * given.bfloat16,
        "measured": f"{time.strftime('%Y-%m-%d')}, {machine()}, {given.threads} thread(s)",
    }
    if given.times:
        both = {"float32": False, "bfloat16": True}
        everything["step_times"] = {name: step_times(first.recipe, given, flag) for name, flag in both.items()}
    elif "step_times" in old:
        everything["step_times"] = old["step_times"]
    for name, run in runs.items():
        run.model.cpu()
        kept, weights = old["variants"].get(name, {}), digest(run.model)
        everything["variants"][name] = kept if kept.get("weights") == weights else {"weights": weights}
    given.out.with_suffix(".svg").write_text(over_training({n: run.history.rows for n, run in runs.items()}))
    held_out = corpus.windows(first.recipe.positions, WINDOWS)
    drawn = corpus.batch(first.recipe.seed + 1, 0, CALIBRATION, first.recipe.positions)
    calibration = [as_feeds(row[None]) for row in drawn]
    for fill in (nearest, solved):
        for name, run in runs.items():
            fill(run, everything["variants"][name], calibration, held_out)
            write(given.out, everything)
