"""Models small enough to train in a test."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

VOCAB, WIDTH = 64, 32


def opt(layers: int = 2) -> Any:
    """A pre-LN decoder with biases and GELU, in training mode."""
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, word_embed_proj_dim=WIDTH, num_hidden_layers=layers,
        num_attention_heads=2, ffn_dim=2 * WIDTH, max_position_embeddings=64, activation_function="gelu",
        dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    return OPTForCausalLM._from_config(config).train()


def ids(rows: int = 2, length: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


class Perceptron(nn.Module):
    """No Hugging Face model: two linears and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(torch.tanh(self.second(torch.relu(self.first(x)))))
        return found
