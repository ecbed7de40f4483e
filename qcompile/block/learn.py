"""The loop that learns what a block's transforms should be: AdamW on the distance to the float block's output.

One sample a step, as in OmniQuant (arXiv 2308.13137, section 3.1), or several where they are short: weights are
rounded once a step. The objective is the squared error over the tokens that count, relative to the targets' mean
square, so that one learning rate fits every block. The best state of all epochs is kept: the result is never worse
than the start on that objective, of many samples on every second one; who folds it compares the block on all. A loss,
a gradient or an epoch that runs away takes the loop back to the best state, at half the rate.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from qcompile import progress

RUNAWAY = 2.0  # an epoch that ends so many times worse than the start does not come back by itself
JUDGED = 5  # times at least that the state is measured, after as many epochs each
JUDGES = 16  # samples at least that it is measured on: every other one where there are twice as many
PATIENCE = 3  # times back to the best state; then the rate was not the reason

Tensors = Mapping[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Example:
    """One sample of a block.

    inputs: arrays by name, the stream and what the block reads besides
    targets: outputs (B, S, C) to come near to, all with the same weight: the float model's, and with OmniQuant's
        augmented loss the float block's on the quantised stream
    mask: bool (B, S), the tokens that count; None for all
    """

    inputs: Mapping[str, np.ndarray]
    targets: Sequence[np.ndarray]
    mask: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Group:
    """Parameters that are learned at one rate."""

    parameters: Sequence[torch.nn.Parameter]
    rate: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """clip_norm: the largest norm of a step's gradient; seed: of the order of the samples in each epoch; step_tokens:
    a step takes samples until they have so many tokens; coarse: products of matrices in bfloat16, added in float32,
    where the processor has instructions for it; who folds the result compares the block in float32."""

    epochs: int = 5
    schedule: Literal["constant", "cosine"] = "constant"
    clip_norm: float = 1.0
    seed: int = 0
    step_tokens: int = 1
    coarse: bool = False


@dataclasses.dataclass
class Outcome:
    """Relative squared errors before and after, and each time between that it was measured; notes: what went wrong."""

    start: float
    best: float
    epochs: list[float] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)


def best_device() -> torch.device:
    """CUDA when there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def learn(
    change: Callable[[], Tensors],
    run: Callable[[Tensors, Tensors], Tensor],
    groups: Sequence[Group],
    examples: Sequence[Example],
    plan: Plan,
    label: str,
    device: torch.device | None = None,
    start: float | None = None,
) -> Outcome:
    """Learn ``groups`` in place, and leave them at their best state.

    change: the tensors that follow from the parameters (folded or quantised weights), once a step
    run: (those tensors, a sample's inputs) -> the block's output (B, S, C)
    examples: read one at a time, so they may come from disk
    start: the error of the parameters as they come, where it is known from an ``Outcome`` before
    """
    device = device or best_device()
    with _deterministic(device), _products(coarse=plan.coarse):
        return _Loop(change, run, groups, examples, plan, label, device, start).learn()


class _Loop:
    """The best state so far, and the way back to it."""

    def __init__(
        self,
        change: Callable[[], Tensors],
        run: Callable[[Tensors, Tensors], Tensor],
        groups: Sequence[Group],
        examples: Sequence[Example],
        plan: Plan,
        label: str,
        device: torch.device,
        start: float | None,
    ) -> None:
        self._change, self._run, self._examples = change, run, examples
        self._groups, self._plan, self._label, self.device = groups, plan, label, device
        self._parameters = [parameter for group in groups for parameter in group.parameters]
        self._rate = 1.0  # halved each time the loop goes back
        self._unit = self._mean_square()
        self._keep()
        error = self._error() if start is None else start
        self._outcome = Outcome(error, error)

    def learn(self) -> Outcome:
        order = np.random.default_rng(self._plan.seed)
        steps = self._plan.epochs * len(self._examples)
        optimiser, returns = self._optimiser(), 0
        with progress.step(self._label, steps) as advance:
            for epoch in range(self._plan.epochs):
                numbers = order.permutation(len(self._examples)).tolist()
                trouble = self._epoch(optimiser, epoch, numbers, advance)
                if (epoch + 1) % max(1, self._plan.epochs // JUDGED) == 0 or epoch + 1 == self._plan.epochs:
                    trouble = trouble or self._judge()
                if trouble:
                    returns += 1
                    self._go_back(epoch, trouble, last=returns == PATIENCE)
                    if returns == PATIENCE:
                        break
                    optimiser = self._optimiser()
        self._restore()
        return self._outcome

    def _epoch(
        self, optimiser: torch.optim.Optimizer, epoch: int, order: list[int], advance: progress.Advance
    ) -> str:
        """One pass over the samples; returns what stopped it, or ""."""
        for place, numbers in self._steps(order):
            self._set_rates(optimiser, (epoch + place / len(order)) / self._plan.epochs)
            optimiser.zero_grad(set_to_none=True)
            loss = self._loss(self._change(), numbers)
            if not math.isfinite(loss.item()):
                return "the loss is not finite"
            torch.autograd.backward(loss)
            norm = torch.nn.utils.clip_grad_norm_(self._parameters, self._plan.clip_norm)
            if not math.isfinite(norm.item()):
                return "a gradient is not finite"
            optimiser.step()
            for _ in numbers:
                advance()
        return ""

    def _steps(self, order: list[int]) -> Iterator[tuple[int, list[int]]]:
        """The samples of each step, and how many came before."""
        taken: list[int] = []
        tokens = 0
        for place, number in enumerate(order, 1):
            taken.append(number)
            tokens += math.prod(self._examples[number].targets[0].shape[:2])
            if tokens >= self._plan.step_tokens or place == len(order):
                yield place - len(taken), taken
                taken, tokens = [], 0

    def _judge(self) -> str:
        """Measure the state after an epoch and keep it if it is the best; returns why it is hopeless, or ""."""
        error = self._error()
        self._outcome.epochs.append(error)
        if error < self._outcome.best:
            self._outcome.best = error
            self._keep()
        if error > RUNAWAY * self._outcome.start:
            return f"the error grew from {self._outcome.best:.3g} to {error:.3g}"
        return ""

    def _go_back(self, epoch: int, trouble: str, last: bool) -> None:
        self._restore()
        self._rate /= 2
        then = "learning ends at" if last else "back to"
        rate = "" if last else f", at {self._rate:g} of the rate"
        note = f"epoch {epoch + 1}: {trouble}; {then} the best state{rate}"
        self._outcome.notes.append(note)
        progress.warn(f"{self._label}: {note}")

    # ----------------------------------------------------------------- the objective

    def _loss(self, changed: Tensors, numbers: Sequence[int]) -> Tensor:
        found = [self._squares(changed, self._examples[number]) for number in numbers]
        count = max(sum(count for _, count in found), 1)
        return torch.stack([total for total, _ in found]).sum() / (count * self._unit)

    def _squares(self, changed: Tensors, example: Example) -> tuple[Tensor, int]:
        """Squared error over the tokens that count, summed over targets, and how many numbers that are."""
        output = self._run(changed, {name: self._tensor(array) for name, array in example.inputs.items()})
        mask = None if example.mask is None else self._tensor(example.mask)
        picked = output if mask is None else output[mask]
        total, count = picked.new_zeros(()), 0
        for array in example.targets:
            target = self._tensor(array)
            total = total + (picked - (target if mask is None else target[mask])).square().sum()
            count += picked.numel()
        return total, count

    def _error(self) -> float:
        """The objective over every example, or every second one of many; infinite where it is not finite."""
        judges = range(0, len(self._examples), 2 if len(self._examples) >= 2 * JUDGES else 1)
        with torch.no_grad():
            changed = self._change()
            found = [self._squares(changed, self._examples[number]) for number in judges]
        error = sum(total.item() for total, _ in found) / (max(sum(count for _, count in found), 1) * self._unit)
        return error if math.isfinite(error) else math.inf

    def _mean_square(self) -> float:
        total, count = 0.0, 0
        for example in self._examples:
            for target in example.targets:
                counted = target if example.mask is None else target[example.mask]
                total, count = total + float(np.square(counted, dtype=np.float64).sum()), count + counted.size
        return total / max(count, 1) or 1.0

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.array(array)).to(self.device)  # a copy: arrays from disk are read-only

    # ----------------------------------------------------------------- the parameters

    def _optimiser(self) -> torch.optim.Optimizer:
        groups = [{"params": list(group.parameters), "lr": group.rate} for group in self._groups]
        return torch.optim.AdamW(groups, weight_decay=0.0)

    def _set_rates(self, optimiser: torch.optim.Optimizer, progressed: float) -> None:
        factor = 1.0 if self._plan.schedule == "constant" else (1 + math.cos(math.pi * progressed)) / 2
        for held, group in zip(optimiser.param_groups, self._groups, strict=True):
            held["lr"] = group.rate * self._rate * factor

    def _keep(self) -> None:
        self._best = [parameter.detach().clone() for parameter in self._parameters]

    def _restore(self) -> None:
        with torch.no_grad():
            for parameter, best in zip(self._parameters, self._best, strict=True):
                parameter.copy_(best)


@contextlib.contextmanager
def _deterministic(device: torch.device) -> Iterator[None]:
    """On CUDA: kernels that add in a fixed order, where there are any. On the CPU they all do."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    if device.type == "cuda":
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@contextlib.contextmanager
def _products(*, coarse: bool) -> Iterator[None]:
    """Let the CPU multiply float32 matrices in bfloat16; one without instructions for it goes on in float32."""
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    if coarse:
        settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before
