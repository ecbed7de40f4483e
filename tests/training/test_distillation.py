"""Data-free distillation: the teacher writes the text, the student comes closer."""

from __future__ import annotations

import copy

import pytest
import torch

from qcompile.errors import UserError
from qcompile.training import distil, distillation_loss, generate_data, quantization_aware
from tests.training.small import VOCAB, opt


def test_the_first_tokens_are_the_likeliest_and_the_seed_decides() -> None:
    teacher = opt(1)
    found = generate_data(teacher, 5, 12, batch=2, seed=1)
    assert found.shape == (5, 12) and int(found.max()) < VOCAB and teacher.training
    torch.testing.assert_close(found, generate_data(teacher, 5, 12, batch=2, seed=1))
    assert not torch.equal(found, generate_data(teacher, 5, 12, batch=2, seed=2))
    logits = teacher.eval()(input_ids=found).logits
    torch.testing.assert_close(found[:, 1:5], logits[:, :4].argmax(dim=-1))
    assert not torch.equal(found[:, 5:], logits[:, 4:-1].argmax(dim=-1)), "the others are drawn"


def test_the_loss_is_a_cross_entropy() -> None:
    logits = torch.randn(2, 3, 7)
    own = distillation_loss(logits, logits)
    entropy = torch.distributions.Categorical(logits=logits).entropy()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(own, entropy.mean())
    assert float(distillation_loss(torch.randn(2, 3, 7), logits)) > float(own)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    torch.testing.assert_close(distillation_loss(logits, logits, mask), entropy[mask == 1].mean())


def test_a_student_comes_closer() -> None:
    teacher = opt(1)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter *= 3  # distributions that are worth learning
    student = quantization_aware(copy.deepcopy(teacher), bits=2, kurtosis=0)
    losses = distil(student, teacher, generate_data(teacher, 8, 16), steps=30, lr=1e-3)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(("count", "length"), [(0, 8), (2, 1)])
def test_no_text_is_refused(count: int, length: int) -> None:
    with pytest.raises(UserError, match="texts of"):
        generate_data(opt(1), count, length)
