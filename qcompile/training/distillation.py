"""Training without the original data: a float model writes the text, and its quantised twin learns its distributions.

The first tokens of a text are the likeliest ones, the others are drawn: the text stays coherent and covers much.
Source: LLM-QAT, arXiv 2305.17888.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from qcompile.errors import UserError
from qcompile.training.aware import parameter_groups, regularization_loss

GREEDY = 4  # tokens behind the first that are not drawn


@torch.no_grad()
def generate_data(
    teacher: nn.Module, count: int, length: int, *, batch: int = 16, greedy: int = GREEDY, seed: int = 0
) -> torch.Tensor:
    """``count`` texts (count, length) of token ids that ``teacher``, a causal Hugging Face model, writes.

    Each begins with a token drawn evenly from the vocabulary.
    """
    if count < 1 or length < 2:
        raise UserError(f"{count} texts of {length} tokens", hint="one text at least, of two tokens at least")
    device = next(teacher.parameters()).device
    draw = torch.Generator().manual_seed(seed)
    training = teacher.training
    teacher.eval()
    found = [_texts(teacher, min(batch, count - done), length, greedy, draw, device) for done in range(0, count, batch)]
    teacher.train(training)
    return torch.cat(found)


def _texts(
    teacher: Any, rows: int, length: int, greedy: int, draw: torch.Generator, device: torch.device
) -> torch.Tensor:
    vocabulary = teacher.get_input_embeddings().num_embeddings
    ids = torch.randint(0, vocabulary, (rows, 1), generator=draw).to(device)
    past, last = None, ids
    for place in range(1, length):
        out = teacher(input_ids=last, past_key_values=past, use_cache=True)
        past, logits = out.past_key_values, out.logits[:, -1].float()
        if place <= greedy:
            last = logits.argmax(dim=-1, keepdim=True)
        else:
            last = torch.multinomial(logits.softmax(dim=-1).cpu(), 1, generator=draw).to(device)
        ids = torch.cat([ids, last], dim=1)
    return ids


def distillation_loss(student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Mean cross-entropy (nats a token) of the student's logits (..., vocabulary) under the teacher's distribution.

    mask: nonzero at tokens that count, of the leading shape
    """
    expected = teacher.float().softmax(dim=-1)
    nats = -(expected * student.float().log_softmax(dim=-1)).sum(dim=-1)
    if mask is None:
        return nats.mean()
    counts = mask.to(nats.dtype)
    return (nats * counts).sum() / counts.sum().clamp(min=1)


def distil(
    student: nn.Module, teacher: nn.Module, data: torch.Tensor, *, steps: int, lr: float = 1e-5, batch: int = 8
) -> list[float]:
    """Train ``student``, which is quantization-aware, on the teacher's distributions over ``data``; the losses.

    ``data`` (count, length) is gone through in order, again from the start where it ends.
    """
    if steps < 1:
        raise UserError(f"{steps} steps of distillation", hint="one at least")
    optimizer = torch.optim.AdamW(parameter_groups(student, lr))
    losses = []
    teacher.eval()
    student.train()
    for ids in _batches(data, batch, steps):
        with torch.no_grad():
            expected = teacher(input_ids=ids).logits
        loss = distillation_loss(student(input_ids=ids).logits, expected)
        (loss + regularization_loss(student)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
    return losses


def _batches(data: torch.Tensor, batch: int, steps: int) -> Iterator[torch.Tensor]:
    for step in range(steps):
        yield data[torch.arange(step * batch, (step + 1) * batch) % len(data)]
