"""What goes wrong in training, told with the name of the layer: ranges that collapse, values that are not numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from qcompile.errors import UserError
from qcompile.training.clips import Quantiser

EVERY = 16  # passes between two checks on a device that would have to wait for them


def interval(model: nn.Module) -> int:
    """Passes between two checks: on a CPU each one is checked."""
    first = next(model.parameters(), None)
    return 1 if first is None or first.device.type == "cpu" else EVERY


def check_ranges(linears: Mapping[str, nn.Module]) -> None:
    """Raise UserError for a range that is empty or not finite."""
    held = {name: getattr(linear, "clip", None) for name, linear in linears.items()}
    clips = {name: clip for name, clip in held.items() if isinstance(clip, Quantiser)}
    if not clips:
        return
    found = torch.cat([clip.width().detach().float().cpu() for clip in clips.values()])
    good = torch.isfinite(found) & (found > 0)
    if bool(good.all()):
        return
    name = list(clips)[int((~good).nonzero()[0])]
    collapsed = bool(torch.isfinite(found).all())
    values = ", ".join(f"{key} = {value.item():g}" for key, value in clips[name].learned().items())
    raise UserError(
        f"the clip range of a layer {'collapsed' if collapsed else 'is not finite'}: {values}",
        where=name,
        hint="a smaller learning rate for parameters named 'clip' (see parameter_groups), no weight decay on them; "
        "or leave the layer out with sites=",
    )


def check_terms(terms: Mapping[str, torch.Tensor]) -> None:
    """Raise UserError where a layer's kurtosis is not a number."""
    found = torch.stack([term.detach().float().cpu() for term in terms.values()])
    if not bool(torch.isfinite(found).all()):
        name = list(terms)[int((~torch.isfinite(found)).nonzero()[0])]
        raise _not_a_number("the output of a layer", name)


def check_output(model: nn.Module, args: tuple[Any, ...], options: dict[str, Any], output: Any) -> None:
    """Raise UserError where the loss, or the first tensor of another output, holds NaN; the layer is searched for."""
    tensor = _first_tensor(output)
    if tensor is None or not bool(torch.isnan(tensor.detach()).any()):
        return
    name = _find_layer(model, args, options)
    what = "the loss" if tensor.ndim == 0 else "the model's output"
    raise _not_a_number(what, name or "no linear's output: an operator behind the last one")


def _not_a_number(what: str, where: str) -> UserError:
    hint = "a smaller learning rate, gradient clipping, or bfloat16 in place of float16; was a weight loaded wrongly?"
    return UserError(f"{what} is not a number", where=where, hint=hint)


def _first_tensor(output: Any) -> torch.Tensor | None:
    if isinstance(output, torch.Tensor):
        return output if output.is_floating_point() else None
    if isinstance(output, dict):
        output = list(output.values())
    if isinstance(output, list | tuple):
        return next((found for item in output if (found := _first_tensor(item)) is not None), None)
    return None


@torch.no_grad()
def _find_layer(model: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> str:
    """The first module, in order of execution and innermost, whose output has NaN; the pass is run again."""
    seen: list[str] = []

    def look(name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            tensor = _first_tensor(output)
            if not seen and tensor is not None and bool(torch.isnan(tensor).any()):
                seen.append(name)

        return hook

    handles = [part.register_forward_hook(look(name)) for name, part in model.named_modules() if name]
    try:
        model.forward(*args, **options)
    finally:
        for handle in handles:
            handle.remove()
    return seen[0] if seen else ""
