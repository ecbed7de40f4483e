"""quantization_aware on Hugging Face and plain modules: the loss, copies, checkpoints, loops, and what it refuses."""

from __future__ import annotations

import copy
import inspect
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qcompile.errors import UserError
from qcompile.training import parameter_groups, quantization_aware, regularization_loss
from qcompile.training.aware import aware_linears, find_meter
from qcompile.training.clips import ActClip, Quantiser
from qcompile.training.kurtosis import Meter, token_kurtosis
from qcompile.training.sites import readers_of_one_input
from tests.training.small import Perceptron, ids, opt


def step(model: Any, **options: Any) -> torch.Tensor:
    loss: torch.Tensor = model(input_ids=ids(), labels=ids(), **options).loss
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# --------------------------------------------------------------------------- the regulariser


def test_kurtosis_of_known_distributions() -> None:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(4, 20000, generator=generator)
    assert token_kurtosis(normal).mean() == pytest.approx(3, abs=0.1)
    assert token_kurtosis(torch.rand(4, 20000, generator=generator)).mean() == pytest.approx(1.8, abs=0.05)
    spike = torch.zeros(1, 400)
    spike[0, 7] = 100
    assert float(token_kurtosis(spike)) == pytest.approx(400, rel=0.01)


def test_the_regularisers_gradient_is_exact() -> None:
    model = quantization_aware(Perceptron().double(), bits=None, kurtosis=0.5)
    x = torch.randn(40, 8, dtype=torch.float64, requires_grad=True)

    def loss(x: torch.Tensor) -> torch.Tensor:
        find_meter(model).passes = 0  # type: ignore[union-attr]
        model(x)
        return regularization_loss(model)

    assert torch.autograd.gradcheck(loss, (x,), eps=1e-6, atol=1e-4)


def test_the_loss_of_a_hugging_face_model_has_it() -> None:
    torch.manual_seed(0)
    plain = float(step(opt()))
    model = quantization_aware(opt(), bits=None, kurtosis=0.01)
    inputs = {"input_ids": ids(), "labels": ids()}
    find_meter(model).turns = 1  # type: ignore[union-attr]
    loss = float(model(**inputs).loss)
    terms = find_meter(model).terms  # type: ignore[union-attr]
    assert len(terms) == 12 and set(terms) == set(aware_linears(model))
    assert loss == pytest.approx(plain + 0.01 * sum(float(term) for term in terms.values()), abs=1e-5)
    assert float(regularization_loss(model)) == 0.0, "it is in the loss already"
    assert float(model(**inputs, return_dict=False)[0]) == pytest.approx(loss, abs=1e-5)
    assert float(model.eval()(**inputs).loss) == pytest.approx(plain, abs=1e-5)


def test_a_trainer_that_divides_by_all_tokens_gets_its_share() -> None:
    model = quantization_aware(opt(), bits=None, kurtosis=1.0)
    find_meter(model).turns = 1  # type: ignore[union-attr]
    inputs = {"input_ids": ids(), "labels": ids()}
    count = ids().numel()
    whole, half = (model(**inputs, num_items_in_batch=torch.tensor(n)).loss for n in (count, 2 * count))
    assert float(half) == pytest.approx(float(whole) / 2, rel=1e-4)


def test_elsewhere_it_is_asked_for() -> None:
    model = quantization_aware(Perceptron(), bits=4, kurtosis=0.1)
    model(torch.randn(64, 8))
    loss = regularization_loss(model)
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(loss.detach()) > 0.1 * 2 * 1
    assert model.first.weight.grad is not None and float(model.first.weight.grad.abs().max()) > 0  # type: ignore[operator, union-attr]
    model.eval()(torch.randn(4, 8))
    assert float(regularization_loss(model)) == 0.0


def test_padding_does_not_count() -> None:
    mask = torch.ones(2, 16, dtype=torch.long)
    mask[1, 5:] = 0
    other = ids()
    other[1, 5:] = 63
    found = []
    for tokens in (ids(), other):
        model = quantization_aware(opt(), bits=None, kurtosis=1.0)
        model(input_ids=tokens, attention_mask=mask)
        found.append({k: float(v) for k, v in find_meter(model).terms.items()})  # type: ignore[union-attr]
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_sampling_takes_other_tokens_each_time() -> None:
    meter = Meter(1.0)
    rows = torch.ones(2048, 4)
    rows[:, 0] = torch.arange(2048.0)
    seen = []
    for _ in range(3):
        meter.open(None)
        meter.observe("a", rows.requires_grad_())
        seen.append(float(meter.terms["a"].detach()))
    assert meter._step(2048) == 16 and meter._step(10) == 1 and meter._step(1 << 20) == 256
    assert meter._step(128) == 2


def test_many_layers_take_turns() -> None:
    layers = nn.Sequential(*(nn.Linear(8, 8) for _ in range(32)))
    model = quantization_aware(layers, bits=None, kurtosis=1.0, sites="*")
    meter, seen, losses = find_meter(model), [], []
    assert meter is not None and meter.turns == 8
    x = torch.randn(64, 8)
    for _ in range(8):
        model(x)
        seen += list(meter.terms)
        losses.append(float(regularization_loss(model).detach()))
    assert sorted(seen) == sorted(aware_linears(model)), "each layer once in eight passes"
    meter.turns = 1
    model(x)
    assert sum(losses) / 8 == pytest.approx(float(regularization_loss(model).detach()), rel=1e-4)


# --------------------------------------------------------------------------- the module stays what it was


def test_names_signature_and_groups() -> None:
    before = opt()
    names, signature = set(dict(before.named_parameters())), inspect.signature(before.forward)
    model = quantization_aware(before)
    assert model is before and inspect.signature(model.forward) == signature
    added = set(dict(model.named_parameters())) - names
    assert added and all(".clip." in name for name in added) and names < set(dict(model.named_parameters()))
    groups = parameter_groups(model, lr=1e-3, weight_decay=0.1)
    clips = next(group for group in groups if group["name"] == "clip")
    assert len(clips["params"]) == len(added) and clips["weight_decay"] == 0 and clips["lr"] == 1e-3
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    assert not any("lm_head" in name for name in aware_linears(model))


def test_a_state_dict_carries_the_ranges() -> None:
    model = quantization_aware(opt())
    step(model)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other = quantization_aware(opt())
    other.load_state_dict(torch.load(buffer, weights_only=True))
    clips = [part for part in other.modules() if isinstance(part, Quantiser)]
    assert clips and all(clip.has_started() for clip in clips)
    torch.testing.assert_close(other.eval()(ids()).logits, model.eval()(ids()).logits, rtol=0, atol=0)


def test_a_copy_has_a_regulariser_of_its_own() -> None:
    model = quantization_aware(opt(), kurtosis=0.1)
    step(model)
    twin = copy.deepcopy(model)
    assert find_meter(twin) is not find_meter(model)
    assert all(vars(part)["_qcompile_meter"] is find_meter(twin) for part in aware_linears(twin).values())
    model.zero_grad()
    twin.zero_grad()
    find_meter(twin).passes = find_meter(model).passes = 0  # type: ignore[union-attr]
    assert float(step(model)) == float(step(twin))


@pytest.mark.parametrize("bits", [None, 4])
def test_gradient_checkpointing_changes_nothing(bits: int | None) -> None:
    found = []
    for checkpointing in (False, True):
        model: Any = quantization_aware(opt(), bits=bits, kurtosis=0.1)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        loss = step(model)
        found.append({"loss": loss} | gradients(model))
        assert len(find_meter(model).terms) == 12 / 3, "nothing is counted twice"  # type: ignore[union-attr]
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-5, atol=1e-7)


def test_reentrant_checkpointing_is_refused() -> None:
    model: Any = quantization_aware(opt(), kurtosis=0.1)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(UserError, match="without gradients") as caught:
        step(model)
    assert "use_reentrant=False" in caught.value.hint and "layers.0" in caught.value.where


def test_bfloat16_autocast() -> None:
    model = quantization_aware(opt(), kurtosis=0.01)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(input_ids=ids(), labels=ids()).loss
    loss.backward()
    assert torch.isfinite(loss) and all(term.dtype == torch.float32 for term in find_meter(model).terms.values())  # type: ignore[union-attr]
    assert all(torch.isfinite(grad).all() for grad in gradients(model).values())


def test_conv1d_of_gpt2_is_a_linear() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=32)
    model = quantization_aware(GPT2LMHeadModel._from_config(config), sites="*.mlp.*")
    assert list(aware_linears(model)) == ["transformer.h.0.mlp.c_fc", "transformer.h.0.mlp.c_proj"]


def test_readers_of_one_tensor_share_a_clip_that_works_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantization_aware(opt(1))
    names = {name.removesuffix(".clip") for name, part in model.named_modules() if isinstance(part, Quantiser)}
    assert {name.rpartition(".")[2] for name in names} == {"k_proj", "out_proj", "fc1", "fc2"}
    attention: Any = model.model.decoder.layers[0].self_attn  # type: ignore[union-attr, index]
    assert attention.q_proj.clip is attention.v_proj.clip is attention.k_proj.clip
    seen: list[torch.Tensor] = []
    fake = ActClip.fake

    def counted(clip: ActClip, x: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return fake(clip, x)

    monkeypatch.setattr(ActClip, "fake", counted)
    step(model)
    assert len(seen) == 4
    once = gradients(model)
    model.zero_grad()
    attention.q_proj.clip.readers = 1
    find_meter(model).passes = 0  # type: ignore[union-attr]
    step(model)
    assert len(seen) == 4 + 6
    for name, value in gradients(model).items():
        torch.testing.assert_close(value, once[name], rtol=1e-4, atol=1e-7)


def test_a_shared_clip_does_not_mistake_one_tensor_for_another() -> None:
    clip = ActClip(4)
    clip.mark_started()
    clip.readers = 3
    x = torch.randn(4, 8)
    assert clip(x) is clip(x)
    x.mul_(2)
    torch.testing.assert_close(clip(x), clip.fake(x))
    with torch.no_grad():
        clip.c_plus.add_(0.1)
    torch.testing.assert_close(clip(x), clip.fake(x))
    torch.testing.assert_close(clip(x.clone().mul_(0.5)), clip.fake(0.5 * x))
    with torch.no_grad():
        assert not clip(x).requires_grad
    assert clip(x).requires_grad


def test_queries_of_another_sequence_have_their_own_clip() -> None:
    layers = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("q_proj", "k_proj", "v_proj")})
    found = readers_of_one_input({f"decoder.encoder_attn.{name}": part for name, part in layers.items()})
    assert sorted(map(len, found)) == [1, 2]
    layers["v_proj"] = nn.Linear(4, 8)
    found = readers_of_one_input({f"attn.{name}": part for name, part in layers.items()})
    assert sorted(map(len, found)) == [1, 2], "another width is another tensor"


def test_what_attention_never_calls_is_told() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    with pytest.warns(UserWarning, match=r"self_attn.out_proj' stays as it is"):
        model = quantization_aware(layer)
    assert set(aware_linears(model)) == {"linear1", "linear2"}
    model.train()(torch.randn(2, 5, 16))
    assert all(part.clip.has_started() for part in aware_linears(model).values())  # type: ignore[union-attr, operator]


# --------------------------------------------------------------------------- loops


def test_a_step_of_training_helps() -> None:
    model = quantization_aware(opt(), bits=4, kurtosis=1e-3)
    optimizer = torch.optim.AdamW(parameter_groups(model, 3e-3))
    losses, before = [], {n: p.detach().clone() for n, p in model.named_parameters() if ".clip." in n}
    for _ in range(15):
        losses.append(float(step(model)))
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.3
    after = dict(model.named_parameters())
    assert all(not torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_inside_the_trainer(tmp_path: Path, accumulate: int) -> None:
    from transformers import Trainer, TrainingArguments

    model = quantization_aware(opt(1), bits=4, kurtosis=1e-3)
    rows = [{"input_ids": row, "labels": row} for row in ids(8)]
    arguments = TrainingArguments(
        tmp_path, max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=accumulate, use_cpu=True,
        report_to=[], save_steps=1, save_total_limit=2, disable_tqdm=True, gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )  # fmt: skip
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-3))
    trainer = Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, None))
    trainer.train()
    twin = copy.deepcopy(model)
    other = torch.optim.AdamW(parameter_groups(twin, 1e-3))
    arguments.max_steps = 3
    again = Trainer(twin, arguments, train_dataset=rows, optimizers=(other, None))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert (tmp_path / "checkpoint-3").is_dir()


def test_inside_accelerate() -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # another test's trainer has set it
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model = quantization_aware(opt(1), bits=4, kurtosis=1e-3)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(parameter_groups(model, 1e-3)))
    loss = model(input_ids=ids(), labels=ids()).loss
    accelerator.backward(loss)
    optimizer.step()
    assert torch.isfinite(loss) and find_meter(model) is not None


# --------------------------------------------------------------------------- what is refused


def test_a_model_without_linears() -> None:
    with pytest.raises(UserError, match="no linear layer") as caught:
        quantization_aware(nn.Conv2d(3, 3, 3))
    assert caught.value.where == "Conv2d"


def test_a_pattern_that_matches_nothing() -> None:
    with pytest.raises(UserError, match=r"'\*\.fc9' matches no linear layer") as caught:
        quantization_aware(opt(), sites=["*.fc1", "*.fc9"])
    assert "self_attn" in caught.value.hint


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"bits": 1}, "activations of 1 bits"),
        ({"kurtosis": -1.0}, "kurtosis is -1.0"),
        ({"quantiser": "plact"}, "unknown quantiser 'plact'"),
        ({"sites": []}, "empty list"),
    ],
)
def test_bad_options(options: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=text):
        quantization_aware(Perceptron(), **options)


def test_twice_is_once_too_often() -> None:
    model = quantization_aware(Perceptron())
    with pytest.raises(UserError, match="already"):
        quantization_aware(model)


@pytest.mark.parametrize("quantiser", ["clip", "pact", "lsq"])
def test_a_range_that_collapses_names_its_layer(quantiser: str) -> None:
    model = quantization_aware(opt(), quantiser=quantiser)
    step(model)
    with torch.no_grad():
        for parameter in model.model.decoder.layers[1].fc1.clip.parameters():  # type: ignore[union-attr, index]
            parameter.fill_(-1.0)
    with pytest.raises(UserError, match="collapsed") as caught:
        step(model)
    assert caught.value.where == "model.decoder.layers.1.fc1" and "learning rate" in caught.value.hint


def test_a_range_that_is_no_number_names_its_layer() -> None:
    model = quantization_aware(Perceptron(), kurtosis=0)
    model(torch.randn(4, 8))
    model.second.clip.c_plus.data.fill_(torch.nan)  # type: ignore[operator, union-attr]
    with pytest.raises(UserError, match="not finite") as caught:
        model(torch.randn(4, 8))
    assert caught.value.where == "second"


@pytest.mark.parametrize("kurtosis", [0.0, 0.1])
def test_a_loss_that_is_no_number_names_the_layer(kurtosis: float) -> None:
    model = quantization_aware(opt(), bits=None, kurtosis=kurtosis)
    step(model)
    model.model.decoder.layers[1].fc1.weight.data[3, 3] = torch.nan  # type: ignore[union-attr, index]
    with pytest.raises(UserError, match="the loss is not a number") as caught:
        step(model)
    assert caught.value.where == "model.decoder.layers.1.fc1"


def test_a_kurtosis_that_is_no_number_names_the_layer() -> None:
    model = quantization_aware(Perceptron(), bits=None, kurtosis=0.1)
    model.second.weight.data[0] = torch.inf  # type: ignore[operator, union-attr]
    model.head = nn.Identity()
    model.forward = lambda x: model.second(torch.relu(model.first(x))).nan_to_num()  # type: ignore[operator]
    model(torch.randn(4, 8))
    with pytest.raises(UserError, match="not a number") as caught:
        regularization_loss(model)
    assert caught.value.where == "second"


def test_data_parallel_replicas_are_refused() -> None:
    model = quantization_aware(Perceptron())
    vars(model)["_is_replica"] = True
    with pytest.raises(UserError, match="DataParallel"):
        model(torch.randn(4, 8))
