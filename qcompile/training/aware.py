"""One call prepares a model for training with low-bit activations, and returns the same model.

    linear(x)  ->  linear(clip(x)), and kurtosis(linear(x)) added to the loss
The clip is a submodule of its linear and both work through hooks, so that classes, names of weights and the
signature of forward stay as they are.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from qcompile.capture.hf_folder import CLIPS
from qcompile.errors import UserError, unknown_name
from qcompile.training import checks
from qcompile.training.clips import QUANTISERS, Quantiser
from qcompile.training.kurtosis import STRIDE, Meter
from qcompile.training.sites import choose, readers_of_one_input

_METER, _NAME = "_qcompile_meter", "_qcompile_name"
IGNORED = -100  # a label that is not predicted


def quantization_aware(
    model: nn.Module,
    bits: int | None = 4,
    kurtosis: float = 1e-5,
    sites: str | Sequence[str] | None = None,
    *,
    quantiser: str = "clip",
    stride: int = STRIDE,
) -> nn.Module:
    """Give the linears of ``model`` learned clips and a regulariser; returns ``model`` itself.

    bits:      of the linears' inputs, 2 to 8; None leaves them float
    kurtosis:  factor on the sum over linears of the mean kurtosis of a token's output; 0 leaves it out
    sites:     globs on the names of linears; None takes all but an output head
    quantiser: "clip" (both ends learned), "pact" or "lsq"
    stride:    one token of so many has its kurtosis taken

    Call it before the optimizer is made. A clip starts at the extremes of the first batch that it sees; linears that
    read one tensor share theirs.
    In training mode a Hugging Face model's ``loss`` has the regulariser in it; for another model add
    ``regularization_loss(model)``. Raises UserError for a model without linears, for a pattern that matches none,
    and in training for a range that collapses or a loss that is NaN, with the layer's name.
    """
    if quantiser not in QUANTISERS:
        raise unknown_name("quantiser", quantiser, QUANTISERS)
    if kurtosis < 0 or kurtosis != kurtosis:
        raise UserError(f"kurtosis is {kurtosis}", hint="0 leaves it out; 1e-5 is what the paper uses")
    if find_meter(model) is not None:
        raise UserError("the model is quantization-aware already", hint="call quantization_aware once")
    chosen = choose(model, sites)
    meter = Meter(kurtosis, stride, list(chosen))
    if bits is not None:
        for readers in readers_of_one_input(chosen):
            _give_clip([chosen[name] for name in readers], QUANTISERS[quantiser](bits))
    for name, linear in chosen.items():
        setattr(linear, _METER, meter)
        setattr(linear, _NAME, name)
        linear.register_forward_hook(_observe_output)
    setattr(model, _METER, meter)
    model.register_forward_pre_hook(_open, with_kwargs=True)
    model.register_forward_hook(_close, with_kwargs=True)
    patterns = [sites] if isinstance(sites, str) else None if sites is None else list(sites)
    _note(model, {"bits": bits, "kurtosis": kurtosis, "sites": patterns, "quantiser": quantiser, "stride": stride})
    return model


def regularization_loss(model: nn.Module) -> torch.Tensor:
    """What to add to the loss of the last forward pass; zero where ``loss`` has it already, and in eval mode.

    ``model`` may be wrapped (DistributedDataParallel, accelerate).
    """
    meter = find_meter(model)
    if meter is None:
        raise UserError("the model is not quantization-aware", hint="call quantization_aware(model) first")
    total = None if meter.is_included else meter.total()
    if total is not None:
        checks.check_terms(meter.terms)
        return total
    return torch.zeros((), device=next(model.parameters()).device)


def parameter_groups(model: nn.Module, lr: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """Groups for a torch optimizer: matrices with decay, biases and norms without, and clips.

    Clips have no decay. Their rate is that of weights, for a step is a share of the range; from scratch ten times as
    much at first follows activations that grow.
    """
    clips = {id(p) for module in model.modules() if isinstance(module, Quantiser) for p in module.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    weights = [p for p in trained if id(p) not in clips]
    return [
        {"params": [p for p in weights if p.ndim > 1], "lr": lr, "weight_decay": weight_decay, "name": "weights"},
        {"params": [p for p in weights if p.ndim <= 1], "lr": lr, "weight_decay": 0.0, "name": "biases"},
        {"params": [p for p in trained if id(p) in clips], "lr": lr, "weight_decay": 0.0, "name": "clip"},
    ]  # fmt: skip


def restore(model: nn.Module, settings: dict[str, Any], tensors: dict[str, torch.Tensor]) -> nn.Module:
    """``model``, loaded without its clips, made as it was trained: settings from its config, clips from ``tensors``."""
    known = ("bits", "kurtosis", "sites", "quantiser", "stride")
    try:
        quantization_aware(model, **{key: settings[key] for key in known})
    except (KeyError, TypeError) as error:
        hint = "save the model again with save_pretrained"
        raise UserError(f"config.{CLIPS} is not what quantization_aware wrote: {error}", hint=hint) from error
    wanted = {name for name in model.state_dict() if ".clip." in name}
    absent = sorted(wanted - set(tensors))
    if absent:
        what = f"{len(absent)} learned ranges are not in the files: {', '.join(absent[:3])}..."
        raise UserError(what, hint="were they saved with the weights? save_pretrained does")
    model.load_state_dict({name: tensors[name] for name in wanted}, strict=False)
    return model


def find_meter(model: nn.Module) -> Meter | None:
    """The meter of ``model``, or of the module that it wraps."""
    return next((vars(part)[_METER] for part in model.modules() if _METER in vars(part)), None)


def aware_linears(model: nn.Module) -> dict[str, nn.Module]:
    """The linears that were chosen, by name."""
    return {vars(part)[_NAME]: part for part in model.modules() if _NAME in vars(part)}


def _note(model: nn.Module, settings: dict[str, Any]) -> None:
    """Leave the settings in a Hugging Face config, so that a saved folder tells what its clips are."""
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "to_dict"):
        setattr(config, CLIPS, settings)


def _give_clip(linears: Sequence[nn.Module], clip: Quantiser) -> None:
    """One clip for linears that read one tensor. It is a submodule of the first alone, so that it is saved once."""
    clip.readers = len(linears)
    linears[0].add_module("clip", clip.to(next(linears[0].parameters()).device))
    for linear in linears[1:]:
        vars(linear)["clip"] = clip
    for linear in linears:
        linear.register_forward_pre_hook(_clip_input)


# --------------------------------------------------------------------------- hooks: functions, so that copies work


def _clip_input(linear: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (linear.clip(args[0]), *args[1:])


def _observe_output(linear: nn.Module, _args: tuple[Any, ...], output: torch.Tensor) -> None:
    if linear.training and not torch.compiler.is_exporting():
        vars(linear)[_METER].observe(vars(linear)[_NAME], output)


def _open(model: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
    meter: Meter = vars(model)[_METER]
    meter.is_open, meter.terms = False, {}
    if torch.compiler.is_exporting() or not model.training:
        return
    if getattr(model, "_is_replica", False):
        hint = "start one process for each device: torchrun or accelerate launch"
        raise UserError("nn.DataParallel cannot train a quantization-aware model", hint=hint)
    if meter.passes % checks.interval(model) == 0:
        checks.check_ranges(aware_linears(model))
    if torch.is_grad_enabled():
        meter.open(options.get("attention_mask"))


def _close(model: nn.Module, args: tuple[Any, ...], options: dict[str, Any], output: Any) -> Any:
    meter: Meter = vars(model)[_METER]
    if not meter.is_open:
        return None
    meter.is_open = False
    if meter.passes == 1:
        _tell_uncalled(model)
    total = meter.total()
    added, loss = _with_regulariser(output, options, total)
    meter.is_included = loss is not None and total is not None
    if (meter.passes - 1) % checks.interval(model) == 0:
        checks.check_output(model, args, options, output if loss is None else loss)
    return added


def _tell_uncalled(model: nn.Module) -> None:
    clips = {name: linear.clip for name, linear in aware_linears(model).items() if hasattr(linear, "clip")}
    silent = [name for name, clip in clips.items() if isinstance(clip, Quantiser) and not clip.has_started()]
    if silent:
        warnings.warn(f"the first pass did not call {len(silent)} linears: {', '.join(silent[:3])}", stacklevel=2)


def _with_regulariser(
    output: Any, options: dict[str, Any], total: torch.Tensor | None
) -> tuple[Any, torch.Tensor | None]:
    """The output of a Hugging Face model with ``total`` added to its loss, and that loss; no loss, no change."""
    loss = getattr(output, "loss", None)
    if isinstance(loss, torch.Tensor):
        if total is not None:
            output.loss = loss = loss + total.to(loss.device) * _share(options)
        return output, loss
    is_first = isinstance(output, tuple) and output and isinstance(output[0], torch.Tensor) and output[0].ndim == 0
    if is_first and options.get("labels") is not None:
        loss = output[0]
        if total is not None:
            loss = loss + total.to(loss.device) * _share(options)
        return (loss, *output[1:]), loss
    return output, None


def _share(options: dict[str, Any]) -> Any:
    """This batch's part of one step: ``transformers.Trainer`` divides a loss by the tokens of all its batches."""
    labels, count = options.get("labels"), options.get("num_items_in_batch")
    if labels is None or count is None:
        return 1.0
    return (labels != IGNORED).sum() / count
