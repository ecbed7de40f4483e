"""One spelling: every architecture, exporter and fused variant gives the same counts."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import onnx_ir as ir
import pytest

from qcompile.graph.blocks import find_blocks
from qcompile.graph.linears import find_experts, find_linears
from qcompile.graph.provenance import layer_name
from qcompile.graph.workspace import Workspace
from qcompile.models.architectures import ARCHITECTURES
from qcompile.models.fused import FUSED
from tests.graph.models import Canonical, Library, canonicalise, difference, operators, session

TOLERANCE = 1e-5  # relative, at unmasked positions; measured: at most 2e-6


@dataclasses.dataclass(frozen=True)
class Counts:
    """What the canonical graph of two layers holds. ``curve``: the activation of the feed-forward part; ``skips``: why
    something stays as it is."""

    norms: int
    attentions: int
    linears: int
    curve: str
    rotary: int = 0
    groups: int = 1
    experts: int = 0
    blocks: tuple[str, ...] = ()
    skips: tuple[str, ...] = dataclasses.field(default=(), compare=False)

    def of(self, model: ir.Model) -> Counts:
        found = operators(model)
        attentions = [n for n in model.graph if n.op_type in ("Attention", "GroupedAttention")]
        groups = {int(n.attributes["groups"].as_int()) if "groups" in n.attributes else 1 for n in attentions}
        curves = [c for c in ("Gelu", "Silu", "Relu") if c in found]
        return Counts(
            norms=found.get("LayerNormalization", 0) + found.get("RMSNormalization", 0),
            attentions=len(attentions),
            linears=len(find_linears(model.graph)),
            curve=f"{len(curves) and found[curves[0]]} {' '.join(curves)}",
            rotary=found.get("RotaryEmbedding", 0),
            groups=groups.pop() if len(groups) == 1 else 0,
            experts=len(find_experts(model.graph)),
            blocks=tuple(block.name for block in find_blocks(model)) if self.blocks else (),
        )


def _pair(prefix: str) -> tuple[str, ...]:
    return f"{prefix}.0", f"{prefix}.1"


_CONV = "not seen as a linear: Conv has no kernel in low bits here"
_LLAMA = Counts(5, 2, 15, "2 Silu", rotary=4, groups=2, blocks=_pair("model.layers"))
_BERT = Counts(5, 2, 12, "2 Gelu", blocks=_pair("encoder.layer"))
_GPT2 = Counts(5, 2, 9, "2 Gelu", blocks=_pair("transformer.h"))
EXPECTED: dict[str, Counts] = {
    "bert": _BERT,
    "roberta": _BERT,
    "distilbert": dataclasses.replace(_BERT, blocks=_pair("transformer.layer")),
    "gpt2": _GPT2,
    "opt": Counts(5, 2, 13, "2 Relu", blocks=_pair("model.decoder.layers")),
    "opt_post_ln": Counts(4, 2, 13, "2 Relu", blocks=_pair("model.decoder.layers")),
    "bloom": dataclasses.replace(_GPT2, norms=6),
    "llama": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": dataclasses.replace(_LLAMA, norms=9),
    "gemma": dataclasses.replace(_LLAMA, curve="2 Gelu"),
    "phi": Counts(3, 2, 13, "2 Gelu", rotary=4, blocks=_pair("model.layers")),
    "falcon": dataclasses.replace(_GPT2, norms=3, rotary=4, groups=4),
    "falcon_new": dataclasses.replace(_GPT2, norms=5, rotary=4),
    "mixtral": dataclasses.replace(_LLAMA, linears=11, experts=4),
    "t5": Counts(12, 6, 37, "4 Gelu", blocks=_pair("encoder.block") + _pair("decoder.block")),
    "vit": Counts(5, 2, 13, "2 Gelu", blocks=_pair("vit.layers"), skips=(_CONV,)),
}
VARIANTS = [
    *((name, 20, "sdpa") for name in ARCHITECTURES),
    *((name, 18, "eager") for name in ("bert", "llama")),
    *((name, 23, "sdpa") for name in ("bert", "llama", "phi")),
]
# Packed projections: one linear for three. The saved session keeps neither names nor their order.
PACKED = {"bert_attention": 8, "gpt2_attention": 9}
NAMELESS = "llama_session"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    return Library(tmp_path_factory.mktemp("canonical"))


def check(found: Canonical, expected: Counts) -> None:
    model = ir.load(found.path)
    assert expected.of(model) == expected
    assert [skip.reason for skip in found.entry.skips] == list(expected.skips)
    assert {n.domain for n in model.graph} <= {"", "qcompile"}
    assert difference(session(found.source), session(found.path)) <= TOLERANCE


@pytest.mark.parametrize(("name", "opset", "attention"), VARIANTS)
def test_architecture(name: str, opset: int, attention: str, library: Library) -> None:
    check(library.architecture(name, opset, attention), EXPECTED[name])


@pytest.mark.parametrize("name", FUSED)
def test_fused_operators_give_the_form_of_the_plain_export(name: str, library: Library) -> None:
    expected = EXPECTED[FUSED[name].architecture]
    if name in PACKED:
        expected = dataclasses.replace(expected, linears=PACKED[name])
    if name == NAMELESS:
        expected = dataclasses.replace(expected, blocks=("block.0", "block.1"))
    check(library.fused(name), expected)


@pytest.mark.parametrize("name", ["gpt2", "bloom", "mixtral", "t5"])
def test_a_second_run_changes_nothing(name: str, library: Library, tmp_path: Path) -> None:
    with Workspace(tmp_path) as workspace:
        model = library.architecture(name).load(workspace)
        before = [(n.op_type, n.name) for n in model.graph]
        entry = canonicalise(model, workspace)
        assert set(entry.facts["recognised"].values()) == {0}
        assert [(n.op_type, n.name) for n in model.graph] == before


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "mixtral"])
def test_new_nodes_speak_in_the_names_of_the_user(name: str, library: Library) -> None:
    """Norms, attentions and linears of the canonical graph lie in a block of the user's model."""
    model = ir.load(library.architecture(name).path)
    kinds = ("RMSNormalization", "LayerNormalization", "Attention", "GroupedAttention", "MatMul")
    inside = [layer_name(n) for n in model.graph if n.op_type in kinds]
    prefixes = EXPECTED[name].blocks
    outside = [n for n in inside if not n.startswith(prefixes)]
    assert sorted(n.rsplit(".")[-1] for n in outside) in OUTSIDE[name]


OUTSIDE = {
    "bert": [["LayerNorm"]],
    "gpt2": [["lm_head", "ln_f"]],
    "llama": [["lm_head", "norm"]],
    "mixtral": [["lm_head", "norm"]],
}
