"""The loop: it learns, keeps the best state, comes back from what runs away, and does the same twice."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import onnx_ir as ir
import pytest
import torch

from qcompile.block.fx import to_torch
from qcompile.block.learn import PATIENCE, Example, Group, Outcome, Plan, Tensors, best_device, learn
from qcompile.block.quantisers import WeightClip
from qcompile.graph.linears import find_linears
from qcompile.quant.schemes import WeightScheme
from tests.graph.models import Library, feeds_for, session

TOKENS, WIDTH = 6, 5


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    return Library(tmp_path_factory.mktemp("learn"))


@dataclasses.dataclass
class Problem:
    """y = x * factor, to be learned as x * wanted; ``strange``: what becomes of the output, by the step's number."""

    examples: list[Example]
    factor: torch.nn.Parameter = dataclasses.field(default_factory=lambda: torch.nn.Parameter(torch.ones(WIDTH)))
    spoil: dict[int, float] = dataclasses.field(default_factory=dict)
    seen: list[torch.Tensor] = dataclasses.field(default_factory=list)

    def change(self) -> Tensors:
        return {"factor": self.factor * 1.0}

    def run(self, changed: Tensors, inputs: Tensors) -> torch.Tensor:
        if torch.is_grad_enabled():
            self.seen.append(self.factor.detach().clone())
        return inputs["x"] * changed["factor"] * self.spoil.get(len(self.seen), 1.0)

    def learn(self, rate: float = 0.05, **plan: object) -> Outcome:
        settings = Plan(**plan)  # type: ignore[arg-type]
        return learn(self.change, self.run, [Group([self.factor], rate)], self.examples, settings, "a block")

    def error(self) -> float:
        """Relative, as the loop measures it, computed in NumPy."""
        factor = self.factor.detach().numpy()
        squares = energy = 0.0
        for example in self.examples:
            keep = example.mask if example.mask is not None else np.ones(example.targets[0].shape[:2], bool)
            for target in example.targets:
                squares += float(np.square((example.inputs["x"] * factor - target)[keep]).sum())
                energy += float(np.square(target[keep]).sum())
        return squares / energy


def problem(count: int = 8, masked: bool = False) -> Problem:
    random = np.random.default_rng(0)
    wanted = random.uniform(0.5, 2, WIDTH).astype(np.float32)
    examples = []
    for _ in range(count):
        x = random.normal(size=(1, TOKENS, WIDTH)).astype(np.float32)
        mask = np.arange(TOKENS)[None] < 4 if masked else None
        target = x * wanted
        if masked:
            target[:, 4:] = 1e6
        examples.append(Example({"x": x}, [target], mask))
    return Problem(examples)


@pytest.mark.parametrize("masked", [False, True])
def test_it_learns_and_says_how_well(masked: bool) -> None:
    found = problem(masked=masked)
    start = found.error()
    outcome = found.learn(epochs=8)
    assert outcome.start == pytest.approx(start, rel=1e-5)
    assert outcome.best == pytest.approx(found.error(), rel=1e-4)
    assert outcome.best < 0.01 * start
    assert outcome.best == min(outcome.epochs)
    assert len(outcome.epochs) == 8
    assert outcome.notes == []


def test_two_targets_count_alike() -> None:
    found = problem()
    x = found.examples[0].inputs["x"]
    found.examples = [Example({"x": x}, [x * 0.5, x * 1.5])]
    found.factor.data.fill_(1.3)
    outcome = found.learn(epochs=300, rate=0.01)
    assert found.factor.detach().numpy() == pytest.approx(np.ones(WIDTH), abs=0.02)
    assert outcome.best == pytest.approx(found.error(), rel=1e-4)


def test_the_same_seed_gives_the_same_bits() -> None:
    def learned(seed: int) -> torch.Tensor:
        found = problem()
        found.learn(epochs=2, seed=seed)
        return found.factor.detach()

    assert torch.equal(learned(3), learned(3))
    assert not torch.equal(learned(3), learned(4))


@pytest.mark.parametrize("rate", [0.5, 3.0, 1e4])
def test_it_is_never_worse_than_the_start(rate: float) -> None:
    found = problem()
    start = found.error()
    outcome = found.learn(rate=rate, epochs=4)
    assert found.error() <= start * (1 + 1e-6)
    assert found.error() == pytest.approx(outcome.best, rel=1e-4)
    assert outcome.best <= outcome.start


def test_what_runs_away_goes_back_to_the_best_state(capsys: pytest.CaptureFixture[str]) -> None:
    found = problem()
    outcome = found.learn(rate=1e4, epochs=9)  # each is measured
    assert len(outcome.notes) == PATIENCE
    assert "the error grew from" in outcome.notes[0]
    assert "0.5 of the rate" in outcome.notes[0]
    assert outcome.notes[-1].endswith("learning ends at the best state")
    assert torch.equal(found.factor.detach(), torch.ones(WIDTH))
    assert "warning: a block: epoch 1: the error grew" in capsys.readouterr().err


@pytest.mark.parametrize(("value", "reason"), [(float("nan"), "the loss"), (float("inf"), "the loss")])
def test_a_loss_that_is_not_finite_goes_back(value: float, reason: str) -> None:
    found = problem()
    found.spoil = {13: value}
    outcome = found.learn(epochs=4)
    assert [note.split(";")[0] for note in outcome.notes] == [f"epoch 2: {reason} is not finite"]
    assert torch.equal(found.seen[13], found.seen[8])  # the state after the first epoch, the best so far
    first_step = float((found.seen[14] - found.seen[13]).abs().max())
    assert first_step == pytest.approx(0.025, rel=0.01)  # AdamW's first step has the size of the rate: half of 0.05
    assert len(outcome.epochs) == 3
    assert outcome.best < 0.2 * outcome.start


def test_a_gradient_that_is_not_finite_goes_back() -> None:
    found = problem()
    run = found.run

    def with_infinite_slope(changed: Tensors, inputs: Tensors) -> torch.Tensor:
        output = run(changed, inputs)
        return output + (changed["factor"] * 0).sqrt() if len(found.seen) == 5 else output

    found.run = with_infinite_slope  # type: ignore[method-assign]
    outcome = found.learn(epochs=3)
    assert outcome.notes[0].startswith("epoch 1: a gradient is not finite")
    assert torch.equal(found.seen[5], torch.ones(WIDTH))
    assert outcome.best < outcome.start


def test_the_schedule_sets_the_steps() -> None:
    def steps(schedule: str) -> list[float]:
        found = problem(count=20)
        found.factor.data.fill_(-50)  # so far away that every step has the size of the rate
        found.learn(rate=0.01, epochs=2, schedule=schedule)
        return [float((b - a).abs().max()) for a, b in zip(found.seen, found.seen[1:], strict=False)]

    constant, cosine = steps("constant"), steps("cosine")
    assert max(constant) == pytest.approx(0.01, rel=0.15)
    assert min(constant) == pytest.approx(0.01, rel=0.15)
    assert cosine[0] == pytest.approx(0.01, rel=0.15)
    assert cosine[-1] < 0.0002


def test_gradients_are_clipped() -> None:
    found = problem()
    found.learn(epochs=1, clip_norm=1e-12)  # far below what AdamW divides by at least
    assert float((found.seen[-1] - 1).abs().max()) < 1e-3


def test_clips_of_a_whole_model_are_learned(library: Library) -> None:
    """3-bit weights of a small OPT: learned clips come nearer to the float logits than where they start."""
    path = library.architecture("opt").path
    model = ir.load(path)
    graph, runtime = to_torch(model), session(path)
    graph.module.to(best_device())
    linears = [linear for linear in find_linears(model.graph) if not linear.transposed]
    scheme = WeightScheme(bits=3, symmetric=False)
    clips = {str(linear.weight.name): WeightClip(linear.rows, linear.columns, scheme) for linear in linears}
    for clip in clips.values():
        clip.to(best_device())
    examples = []
    for length in (7, 8, 9):
        feeds = feeds_for(runtime, 2, length)
        examples.append(Example(feeds, runtime.run(None, feeds), feeds["attention_mask"].astype(bool)))

    def change() -> Tensors:
        return {name: clip(graph.constant(name)) for name, clip in clips.items()}

    def run(changed: Tensors, inputs: Tensors) -> torch.Tensor:
        return graph.run(inputs, changed)[graph.outputs[0]]

    group = Group([p for clip in clips.values() for p in clip.parameters()], 0.05)
    outcome = learn(change, run, [group], examples, Plan(epochs=25), "opt")
    assert outcome.best < 0.5 * outcome.start
    assert re.fullmatch("", "".join(outcome.notes))


def precision() -> str:
    return str(torch.backends.mkldnn.matmul.fp32_precision)  # type: ignore[attr-defined]


@pytest.mark.parametrize("coarse", [False, True])
def test_coarse_products_end_with_the_learning(coarse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    found, before, seen = problem(), precision(), []
    inner = found.run

    def run(changed: Tensors, inputs: Tensors) -> torch.Tensor:
        seen.append((torch.is_grad_enabled(), precision()))
        if len(seen) > 20:
            raise RuntimeError("a fault")
        return inner(changed, inputs)

    monkeypatch.setattr(found, "run", run)
    with pytest.raises(RuntimeError, match="a fault"):
        found.learn(epochs=9, coarse=coarse)
    assert set(seen) == {(grad, "bf16" if coarse else before) for grad in (False, True)}
    assert precision() == before


def test_a_known_start_is_not_measured_again() -> None:
    found = problem()
    given = Group([found.factor], 0.05)
    outcome = learn(found.change, found.run, [given], found.examples, Plan(epochs=0), "a block", start=0.25)
    assert outcome.start == outcome.best == 0.25
