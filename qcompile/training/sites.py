"""Which linears of a model get clips, and which of them share one."""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from qcompile.errors import UserError

HEADS = ("lm_head", "head", "classifier", "score", "embed_out", "qa_outputs")
TOGETHER = (  # last names of siblings that read one tensor
    ("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q_lin", "k_lin", "v_lin"), ("to_q", "to_k", "to_v"),
    ("wq", "wk", "wv"), ("q", "k", "v"), ("gate_proj", "up_proj"), ("wi_0", "wi_1"), ("w1", "w3"),
)  # fmt: skip
CROSS = ("cross", "encoder_attn", "encdec", "attn2")  # attention whose queries read a tensor of their own


def readers_of_one_input(linears: Mapping[str, nn.Module]) -> list[list[str]]:
    """``linears`` by name, in groups that read the same tensor, as far as their names tell."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, linear in linears.items():
        parent, _, last = name.rpartition(".")
        together = next((names for names in TOGETHER if last in names), (last,))
        if last == together[0] and any(part in parent.lower() for part in CROSS):
            together = (last,)
        groups.setdefault((parent, together, getattr(linear, "in_features", None)), []).append(name)
    return list(groups.values())


def is_linear(module: nn.Module) -> bool:
    """nn.Linear, or transformers' Conv1D, which is one with its weight transposed."""
    return isinstance(module, nn.Linear) or (type(module).__name__ == "Conv1D" and hasattr(module, "nx"))


def choose(model: nn.Module, sites: str | Sequence[str] | None) -> dict[str, nn.Module]:
    linears = {name: module for name, module in model.named_modules() if is_linear(module)}
    uncalled = dict(_never_called(model))
    for name in sorted(set(uncalled) & set(linears)):
        warnings.warn(f"'{name}' stays as it is: {uncalled[name]}", stacklevel=3)
        del linears[name]
    if not linears:
        raise UserError(
            "the model has no linear layer to quantise",
            where=type(model).__name__,
            hint="nn.Linear and transformers' Conv1D count; did you pass the model itself?",
        )
    if sites is None:
        find: Any = getattr(model, "get_output_embeddings", None)
        head = None if find is None else find()
        body = {n: m for n, m in linears.items() if m is not head and n.rpartition(".")[2] not in HEADS}
        return body or linears
    return _matching(linears, [sites] if isinstance(sites, str) else sites)


def _matching(linears: dict[str, nn.Module], patterns: Iterable[str]) -> dict[str, nn.Module]:
    chosen: set[str] = set()
    for pattern in patterns:
        found = fnmatch.filter(linears, pattern)
        if not found:
            raise UserError(
                f"sites: '{pattern}' matches no linear layer",
                hint=f"a glob on names such as {', '.join(list(linears)[:3])}",
            )
        chosen.update(found)
    if not chosen:
        raise UserError("sites is an empty list", hint="None takes all linears but the head")
    return {name: linear for name, linear in linears.items() if name in chosen}


def _never_called(model: nn.Module) -> Iterator[tuple[str, str]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            inner = f"{name}.out_proj" if name else "out_proj"
            yield inner, "nn.MultiheadAttention reads its weight without calling it"


