"""A decoder with its key/value cache as plain inputs and outputs, so that one graph prefills and decodes.

    logits, present.N.key, present.N.value  =  f(input_ids, attention_mask, position_ids, past_key_values.N.key, ...)

Shapes: input_ids and position_ids (batch, sequence); attention_mask (batch, past_sequence + sequence), 1 at every
real token of past and present; past_key_values.N (batch, heads, past_sequence, width), of which past_sequence may be
0; present.N = past_key_values.N with the new tokens behind it. The names are those of Optimum and onnxruntime-genai.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from qcompile.errors import UserError

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

BATCH, LENGTH, PAST = 2, 4, 3  # of the example; none is 0 or 1, which torch.export would take for constants
WITHOUT = "compile it without --with-past"
TOTAL = "past_sequence + sequence"


class Cache:
    """The cache of ``module``, a causal language model of transformers. Raises UserError where it has none."""

    def __init__(self, module: Any) -> None:
        import torch

        name, ids = type(module).__name__, torch.zeros(BATCH, PAST, dtype=torch.long)
        if module.config.is_encoder_decoder or not hasattr(module, "lm_head"):
            raise UserError(f"{name} is no decoder with a language model's head", hint=WITHOUT)
        with torch.no_grad():
            made = getattr(module(input_ids=ids, use_cache=True), "past_key_values", None)
        tensors = _tensors(made) if made is not None else []
        if not tensors or any(not isinstance(x, torch.Tensor) or x.shape[2:3] != (PAST,) for x in tensors):
            what = "is not one key and one value (batch, heads, tokens, width) for each layer"
            raise UserError(f"the cache of {name} {what}", hint=WITHOUT)
        self.past = [torch.randn(x.shape) for x in tensors]
        self.takes_positions = "position_ids" in inspect.signature(module.forward).parameters

    def example(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Arguments of a ``forward`` that ``tensors_only`` has put in place, and the dynamic axes of each."""
        import torch

        ids = torch.arange(BATCH * LENGTH).reshape(BATCH, LENGTH)
        tokens = {0: "batch", 1: "sequence"}
        inputs = {"input_ids": ids, "attention_mask": torch.ones(BATCH, PAST + LENGTH, dtype=torch.long)}
        axes: dict[str, Any] = {"input_ids": tokens, "attention_mask": {0: "batch", 1: "total_sequence"}}
        if self.takes_positions:
            inputs["position_ids"] = torch.arange(PAST, PAST + LENGTH).repeat(BATCH, 1)
            axes["position_ids"] = tokens
        past = [{0: "batch", 2: "past_sequence"}] * len(self.past)
        return inputs | {"past": self.past}, axes | {"past": past}

    def port_names(self) -> tuple[list[str], list[str]]:
        """Names of the graph's inputs, in the order of ``example``, and of its outputs."""
        parts = [f"{n // 2}.{'value' if n % 2 else 'key'}" for n in range(len(self.past))]
        tokens = [name for name in self.example()[0] if name != "past"]
        inputs = [*tokens, *(f"past_key_values.{part}" for part in parts)]
        return inputs, ["logits", *(f"present.{part}" for part in parts)]


@contextlib.contextmanager
def tensors_only(module: Any) -> Iterator[None]:
    """Give ``module`` a ``forward`` of tensors only, whose ``past`` is key, value, key, value ... of its layers.

    A wrapper around the module would do as well, but for the names: every one of them would begin with its own.
    """
    from transformers import DynamicCache

    whole = module.forward

    def forward(
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        past: Sequence[torch.Tensor] = (),
    ) -> tuple[torch.Tensor, ...]:
        given = {} if position_ids is None else {"position_ids": position_ids}
        cache = DynamicCache(list(zip(past[::2], past[1::2], strict=True)))
        out = whole(input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True, **given)
        return out.logits, *_tensors(out.past_key_values)

    module.forward = forward
    try:
        yield
    finally:
        del module.forward


def _tensors(cache: Any) -> list[Any]:
    return [x for layer in cache.layers for x in (layer.keys, layer.values)]


def name_total(model: ir.Model) -> None:
    """One name for the axis of past and present tokens together."""
    import onnx_ir as ir

    for value in (*model.graph.inputs, *model.graph.outputs):
        name, shape = str(value.name), value.shape
        if name == "attention_mask":
            value.shape = ir.Shape(["batch", TOTAL])
        elif name.startswith("present.") and shape is not None:
            value.shape = ir.Shape([shape[0], shape[1], TOTAL, shape[3]])
