"""Train a small language model four ways, and see what 4 bits cost each: ``python -m benchmarks.training --help``.

plain:    nothing added
input:    learned 4-bit clips at the inputs of the blocks' linears
kurtosis: the regulariser at their outputs
both:     both
All start from the same weights and see the same batches. They take turns, ``--every`` steps each, so that they can
be compared whenever the run is stopped; it goes on where it was.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qcompile.models.small_lm import PACKAGE, Corpus, SmallLm, optimizer_of, packaged_text, read_corpus

if TYPE_CHECKING:
    import torch

BITS, WARMUP, COOLED, DECAY, CLIP_NORM = 4, 40, 0.2, 0.0, 1.0
WATCHED_ROWS = 8  # windows that the history looks at


@dataclasses.dataclass(frozen=True)
class Variant:
    """What quantization_aware is asked for."""

    bits: int | None
    kurtosis: bool


VARIANTS = {
    "plain": Variant(None, False),
    "input": Variant(BITS, False),
    "kurtosis": Variant(None, True),
    "both": Variant(BITS, True),
}


class Run:
    """One variant: its model, its optimizer and where they are kept."""

    def __init__(self, name: str, given: argparse.Namespace, corpus: Corpus) -> None:
        from qcompile.training import History, parameter_groups, quantization_aware

        self.name, self.corpus, self.given = name, corpus, given
        self.recipe = SmallLm(layers=given.layers, width=given.width)
        self.model: Any = self.recipe.build()
        variant = VARIANTS[name]
        if variant != VARIANTS["plain"]:
            quantization_aware(self.model, variant.bits, given.kurtosis if variant.kurtosis else 0.0)
        self.model.to(given.device)
        self.optimizer = optimizer_of(parameter_groups(self.model, given.rate, DECAY))
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.folder: Path = given.run / name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.history = History(self.folder / "history.jsonl")
        self.step, self.seconds, self.loss = 0, 0.0, math.nan

    def resume(self) -> None:
        """Go on from the checkpoint, where there is one."""
        import torch

        from qcompile.training.aware import find_meter

        path = self.folder / "state.pt"
        if path.is_file():
            held = torch.load(path, map_location=self.given.device, weights_only=True)
            self.model.load_state_dict(held["model"])
            self.optimizer.load_state_dict(held["optimizer"])
            self.step, self.seconds = held["step"], held["seconds"]
            if (meter := find_meter(self.model)) is not None:
                meter.passes = self.step

    def save(self) -> None:
        import torch

        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        held = state | {"step": self.step, "seconds": self.seconds}
        torch.save(held, self.folder / "state.tmp")
        (self.folder / "state.tmp").replace(self.folder / "state.pt")

    def train(self, until: int) -> None:
        """Steps up to ``until``, then figures and a checkpoint."""
        import torch

        self.model.train()
        losses = []
        begun = time.monotonic()
        while self.step < until:
            losses.append(self._one_step())
        self.seconds += time.monotonic() - begun
        self.loss = float(np.mean(losses)) if losses else math.nan
        ids = torch.from_numpy(self.corpus.windows(self.recipe.positions, WATCHED_ROWS)).to(self.given.device)
        self.history.record(self.step, self.model, [{"input_ids": ids}], loss=self.loss)
        self.save()

    def _one_step(self) -> float:
        import torch

        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * self._schedule() * (self._clip_rate() if group["name"] == "clip" else 1.0)
        ids = self.corpus.batch(self.recipe.seed, self.step, self.given.rows, self.recipe.positions)
        self.step += 1
        return one_step(self.model, self.optimizer, torch.from_numpy(ids).to(self.given.device), self.given.bfloat16)

    def _schedule(self) -> float:
        """Linear warm-up, then one rate, and in the last fifth of --steps a line down to a tenth: a run can be made
        longer or shorter until the fifth begins, and is what it had been with those --steps from the start."""
        left: float = (self.given.steps - self.step) / max(1, COOLED * self.given.steps)
        return min(1.0, (self.step + 1) / WARMUP, 0.1 + 0.9 * left)

    def _clip_rate(self) -> float:
        """Over that of weights: ranges follow activations that grow fast at first; at that rate they collapse later."""
        extra: float = (self.given.clip_rate - 1) * (1 - self.step / self.given.steps)
        return 1 + extra


def one_step(model: Any, optimizer: Any, ids: torch.Tensor, bfloat16: bool) -> float:
    """Train on (rows, tokens); the loss."""
    import torch

    with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=bfloat16):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())


def load(given: argparse.Namespace, corpus: Corpus) -> dict[str, Run]:
    """The runs where their checkpoints left them."""
    runs = {name: Run(name, given, corpus) for name in given.variants}
    for run in runs.values():
        run.resume()
    return runs


def train_all(given: argparse.Namespace, corpus: Corpus) -> dict[str, Run]:
    runs = load(given, corpus)
    while (least := min(run.step for run in runs.values())) < given.steps:
        until = min(given.steps, (least // given.every + 1) * given.every)
        for run in runs.values():
            if run.step < until:
                run.train(until)
                print(f"{run.name} step {run.step} loss {run.loss:.4f} {run.seconds:.0f} s {worst(run)}", flush=True)
    return runs


def worst(run: Run) -> str:
    """The largest figures over layers, at the last step."""
    layers = run.history.rows[-1]["layers"]
    keys = ("kurtosis", "outlier_channels", "max_ratio", "weight_ratio")
    found: dict[str, float] = {key: max(figures[key] for figures in layers.values()) for key in keys}
    return " ".join(f"{key} {value:.3g}" for key, value in found.items())


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__)
    parser.add_argument("--text", type=Path, metavar="FILE", help=f"English text, or its gzip; without it {PACKAGE}")
    parser.add_argument("--run", required=True, type=Path, metavar="DIR", help="checkpoints and tokens; a run goes on")
    parser.add_argument("--out", type=Path, metavar="NAME", help="NAME.json and NAME.md")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--every", type=int, default=50, help="steps between turns, figures and checkpoints")
    parser.add_argument("--rows", type=int, default=4, help="windows of 128 tokens in a batch")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--clip-rate", type=float, default=10.0, metavar="X", help="of clips at first; 1 at the end")
    parser.add_argument("--kurtosis", type=float, default=3e-4)
    parser.add_argument("--layers", type=int, default=SmallLm.layers)
    parser.add_argument("--width", type=int, default=SmallLm.width)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="that trains; scores are taken on the CPU")
    parser.add_argument("--bfloat16", action="store_true", help="products in bfloat16, by autocast")
    parser.add_argument("--times", action="store_true", help="measure the time of a step, too")
    parser.add_argument("--solved", nargs="*", default=["W4A16 GPTQ", "W4A4 GPTQ"], help="columns that gptq makes")
    parser.add_argument("--score-only", action="store_true", help="score what was trained so far")
    return parser


def main() -> None:
    import torch

    given = options().parse_args()
    torch.set_num_threads(given.threads)
    corpus = read_corpus(given.text or packaged_text(), given.run, SmallLm(layers=given.layers, width=given.width))
    (given.run / "settings.json").write_text(json.dumps({k: str(v) for k, v in vars(given).items()}))
    runs = load(given, corpus) if given.score_only else train_all(given, corpus)
    if given.out is not None:
        from benchmarks.training_scores import report

        report(given, runs, corpus)


if __name__ == "__main__":
    main()
