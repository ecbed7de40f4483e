"""Hand-built graphs in ONNX Runtime's fused operators, with the weights of the small random models.

The optimizer of ONNX Runtime 1.31 does not find attention in what torch exports today, but the files that
users have (older exports, the generation builder) hold Attention, MultiHeadAttention and GroupQueryAttention
nodes. Each graph here computes what the architecture that it is named after computes.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnx_ir.tape

from qcompile.models.architectures import HEADS, HIDDEN, LAYERS, POSITIONS, build

OPSET, IR_VERSION = 20, 10
HEAD_DIM = HIDDEN // HEADS
KV_HEADS = 2
MICROSOFT = "com.microsoft"


class Draft:
    """A graph in the making: the weights of one architecture by their own names, and the ops so far."""

    def __init__(self, architecture: str) -> None:
        module = build(architecture)[0]
        self.weights = {name: value.detach().numpy() for name, value in module.state_dict().items()}
        self.tape = onnx_ir.tape.Tape()
        self.known: dict[str, ir.Value] = {}
        shape = ir.Shape(["batch", "sequence"])
        self.input_ids = ir.val("input_ids", dtype=ir.DataType.INT64, shape=shape)
        self.attention_mask = ir.val("attention_mask", dtype=ir.DataType.INT64, shape=shape)

    def weight(self, name: str, *, transpose: bool = False) -> ir.Value:
        """The initializer ``name``; a linear's (out, in) weight is transposed for MatMul."""
        value = self.weights[name]
        return self.constant(name, value.T.copy() if transpose else value)

    def constant(self, name: str, value: np.ndarray) -> ir.Value:
        if name not in self.known:
            self.known[name] = self.tape.initializer(ir.tensor(value, name=name), name=name)
        return self.known[name]

    def ops(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        name: str,
        outputs: int,
        domain: str = "",
        **attributes: int | float,
    ) -> list[ir.Value]:
        """A node ``name/op_type`` with several outputs."""
        values = self.tape.op_multi_out(
            op_type, inputs, attributes, num_outputs=outputs, domain=domain, name=f"{name}/{op_type}"
        )
        for index, value in enumerate(values):
            value.name = f"{name}/{op_type}_output_{index}"
        return list(values)

    def op(self, op_type: str, *inputs: ir.Value | None, name: str, **attributes: int | float) -> ir.Value:
        """A node of the standard domain with one output."""
        return self.ops(op_type, *inputs, name=name, outputs=1, domain="", **attributes)[0]

    def fused(self, op_type: str, *inputs: ir.Value | None, name: str, **attributes: int | float) -> ir.Value:
        """A node of ONNX Runtime's own domain with one output."""
        return self.ops(op_type, *inputs, name=name, outputs=1, domain=MICROSOFT, **attributes)[0]

    def linear(self, name: str, x: ir.Value) -> ir.Value:
        """x @ W^T without the bias, which the fused operator that follows adds."""
        return self.op("MatMul", x, self.weight(f"{name}.weight", transpose=True), name=name)

    def model(self, output: ir.Value, output_name: str) -> ir.Model:
        output.name = output_name
        output.dtype = ir.DataType.FLOAT
        graph = ir.Graph(
            [self.input_ids, self.attention_mask],
            [output],
            nodes=self.tape.nodes,
            initializers=self.tape.initializers,
            opset_imports={"": OPSET, MICROSOFT: 1},
            name="main",
        )
        graph.sort()
        return ir.Model(graph, ir_version=IR_VERSION, producer_name="qcompile.models.fused")


def bert_attention() -> ir.Model:
    """Attention over packed QKV weights with a 2-D mask; SkipLayerNormalization, BiasGelu."""
    draft = Draft("bert")
    mask = draft.op("Cast", draft.attention_mask, name="mask", to=int(ir.DataType.INT32))
    x = _bert_embeddings(draft)
    for layer in range(LAYERS):
        scope = f"encoder.layer.{layer}.attention.self"
        weight, bias = _packed_qkv(draft, scope)
        context = draft.fused("Attention", x, weight, bias, mask, name=scope, num_heads=HEADS)
        x = _bert_after_attention(draft, layer, context, x)
    return draft.model(x, "last_hidden_state")


def bert_mha() -> ir.Model:
    """MultiHeadAttention with three MatMuls, a packed bias and a key padding mask."""
    draft = Draft("bert")
    mask = draft.op("Cast", draft.attention_mask, name="mask", to=int(ir.DataType.INT32))
    x = _bert_embeddings(draft)
    for layer in range(LAYERS):
        scope = f"encoder.layer.{layer}.attention.self"
        query, key, value = (draft.linear(f"{scope}.{part}", x) for part in ("query", "key", "value"))
        bias = _packed_qkv(draft, scope)[1]
        context = draft.fused(
            "MultiHeadAttention", query, key, value, bias, mask, name=scope, num_heads=HEADS
        )
        x = _bert_after_attention(draft, layer, context, x)
    return draft.model(x, "last_hidden_state")


def gpt2_attention() -> ir.Model:
    """Unidirectional Attention; SkipLayerNormalization that also returns the sum; FastGelu with bias."""
    draft = Draft("gpt2")
    mask = draft.op("Cast", draft.attention_mask, name="mask", to=int(ir.DataType.INT32))
    tokens = draft.op("Gather", draft.weight("transformer.wte.weight"), draft.input_ids, name="wte")
    positions = draft.op("Gather", draft.weight("transformer.wpe.weight"), _positions(draft), name="wpe")
    residual = draft.op("Add", tokens, positions, name="embeddings")
    norms = [f"transformer.h.{layer}.ln_{which}" for layer in range(LAYERS) for which in (1, 2)]
    norms.append("transformer.ln_f")
    x = draft.op("LayerNormalization", residual, *_affine(draft, norms[0]), name=norms[0], epsilon=1e-5)
    for layer in range(LAYERS):
        scope = f"transformer.h.{layer}"
        qkv = [draft.weight(f"{scope}.attn.c_attn.{part}") for part in ("weight", "bias")]
        x = draft.fused("Attention", x, *qkv, mask, name=f"{scope}.attn", num_heads=HEADS, unidirectional=1)
        x, residual = _gpt2_project(draft, f"{scope}.attn.c_proj", x, residual, norms[2 * layer + 1])
        x = draft.op("MatMul", x, draft.weight(f"{scope}.mlp.c_fc.weight"), name=f"{scope}.mlp.c_fc")
        x = draft.fused("FastGelu", x, draft.weight(f"{scope}.mlp.c_fc.bias"), name=f"{scope}.mlp.act")
        x, residual = _gpt2_project(draft, f"{scope}.mlp.c_proj", x, residual, norms[2 * layer + 2])
    return draft.model(draft.linear("lm_head", x), "logits")


def llama_gqa() -> ir.Model:
    """The generation builder's form: GroupQueryAttention that rotates, SkipSimplifiedLayerNormalization."""
    return _llama(rotary_inside=True)


def llama_rotary() -> ir.Model:
    """RotaryEmbedding nodes before a GroupQueryAttention that does not rotate; QuickGelu(alpha=1) as SiLU."""
    return _llama(rotary_inside=False)


def _bert_embeddings(draft: Draft) -> ir.Value:
    scope = "embeddings"
    words = draft.op(
        "Gather", draft.weight(f"{scope}.word_embeddings.weight"), draft.input_ids, name=f"{scope}.words"
    )
    positions = draft.op(
        "Gather",
        draft.weight(f"{scope}.position_embeddings.weight"),
        _positions(draft),
        name=f"{scope}.positions",
    )
    kind = draft.constant(f"{scope}.token_type_0", draft.weights[f"{scope}.token_type_embeddings.weight"][0])
    placed = draft.op("Add", positions, kind, name=f"{scope}.add_type")
    summed = draft.op("Add", words, placed, name=f"{scope}.add")
    norm = f"{scope}.LayerNorm"
    return draft.op("LayerNormalization", summed, *_affine(draft, norm), name=norm, epsilon=1e-12)


def _bert_after_attention(draft: Draft, layer: int, context: ir.Value, x: ir.Value) -> ir.Value:
    """Output projection, residual and norm, FFN, residual and norm: all of a layer that follows attention."""
    scope = f"encoder.layer.{layer}"
    x = _bert_output(draft, f"{scope}.attention.output", context, x)
    dense = f"{scope}.intermediate.dense"
    inner = draft.fused("BiasGelu", draft.linear(dense, x), draft.weight(f"{dense}.bias"), name=dense)
    return _bert_output(draft, f"{scope}.output", inner, x)


def _bert_output(draft: Draft, scope: str, x: ir.Value, skip: ir.Value) -> ir.Value:
    projected = draft.linear(f"{scope}.dense", x)
    bias = draft.weight(f"{scope}.dense.bias")
    norm = f"{scope}.LayerNorm"
    return draft.fused(
        "SkipLayerNormalization", projected, skip, *_affine(draft, norm), bias, name=norm, epsilon=1e-12
    )


def _packed_qkv(draft: Draft, scope: str) -> tuple[ir.Value, ir.Value]:
    """(hidden, 3 hidden) weight and (3 hidden) bias of Q, K and V side by side."""
    parts = [f"{scope}.{part}" for part in ("query", "key", "value")]
    weight = np.concatenate([draft.weights[f"{part}.weight"].T for part in parts], axis=1)
    bias = np.concatenate([draft.weights[f"{part}.bias"] for part in parts])
    packed = draft.constant(f"{scope}.qkv.bias", bias)
    return draft.constant(f"{scope}.qkv.weight", weight), packed


def _gpt2_project(
    draft: Draft, scope: str, x: ir.Value, residual: ir.Value, norm: str
) -> tuple[ir.Value, ir.Value]:
    """(norm(x @ W + b + residual), x @ W + b + residual)."""
    projected = draft.op("MatMul", x, draft.weight(f"{scope}.weight"), name=scope)
    bias = draft.weight(f"{scope}.bias")
    inputs = (projected, residual, *_affine(draft, norm), bias)
    return _skip_norm(draft, "SkipLayerNormalization", inputs, norm, 1e-5)


def _skip_norm(
    draft: Draft, op_type: str, inputs: tuple[ir.Value, ...], name: str, epsilon: float
) -> tuple[ir.Value, ir.Value]:
    outputs = draft.ops(op_type, *inputs, name=name, outputs=4, domain=MICROSOFT, epsilon=epsilon)
    outputs[1].name = outputs[2].name = ""  # mean and inverse deviation: left out
    return outputs[0], outputs[3]


def _affine(draft: Draft, norm: str) -> tuple[ir.Value, ir.Value]:
    return draft.weight(f"{norm}.weight"), draft.weight(f"{norm}.bias")


def _positions(draft: Draft) -> ir.Value:
    """0, 1, ... sequence - 1."""
    length = draft.op("Shape", draft.input_ids, name="length", start=1, end=2)
    scalar = draft.op("Squeeze", length, name="length_scalar")
    zero, one = (draft.constant(f"range_{i}", np.array(i, dtype=np.int64)) for i in (0, 1))
    return draft.op("Range", zero, scalar, one, name="positions")


def _llama(*, rotary_inside: bool) -> ir.Model:
    draft = Draft("llama")
    residual = draft.op(
        "Gather", draft.weight("model.embed_tokens.weight"), draft.input_ids, name="embed_tokens"
    )
    norms = [f"model.layers.{i}.{n}" for i in range(LAYERS) for n in _LLAMA_NORMS] + ["model.norm"]
    first = draft.weight(f"{norms[0]}.weight")
    x = draft.op("SimplifiedLayerNormalization", residual, first, name=norms[0], epsilon=1e-6, axis=-1)
    for layer in range(LAYERS):
        scope = f"model.layers.{layer}"
        attended = _llama_attention(draft, f"{scope}.self_attn", x, rotary_inside=rotary_inside)
        x, residual = _llama_skip_norm(draft, attended, residual, norms[2 * layer + 1])
        inner = _llama_mlp(draft, f"{scope}.mlp", x, quick_gelu=not rotary_inside)
        x, residual = _llama_skip_norm(draft, inner, residual, norms[2 * layer + 2])
    return draft.model(draft.linear("lm_head", x), "logits")


_LLAMA_NORMS = ("input_layernorm", "post_attention_layernorm")


def _llama_attention(draft: Draft, scope: str, x: ir.Value, *, rotary_inside: bool) -> ir.Value:
    query, key, value = (draft.linear(f"{scope}.{part}_proj", x) for part in "qkv")
    cos, sin = _rotary_tables(draft)
    if not rotary_inside:
        query = _rotate(draft, query, HEADS, f"{scope}.q_rotary")
        key = _rotate(draft, key, KV_HEADS, f"{scope}.k_rotary")
    tables = (cos, sin) if rotary_inside else ()
    inputs = (query, key, value, None, None, *_lengths(draft), *tables)
    outputs = draft.ops(
        "GroupQueryAttention",
        *inputs,
        name=scope,
        outputs=3,  # and the present keys and values, which nothing reads
        domain=MICROSOFT,
        num_heads=HEADS,
        kv_num_heads=KV_HEADS,
        do_rotary=int(rotary_inside),
    )
    return draft.linear(f"{scope}.o_proj", outputs[0])


def _rotate(draft: Draft, x: ir.Value, heads: int, name: str) -> ir.Value:
    start = draft.constant("rotary_start", np.zeros(1, dtype=np.int64))
    return draft.fused("RotaryEmbedding", x, start, *_rotary_tables(draft), name=name, num_heads=heads)


def _rotary_tables(draft: Draft) -> tuple[ir.Value, ir.Value]:
    """cos and sin of position * theta^(-2i/d), each (positions, head_dim / 2), theta 10000."""
    frequencies = 10000.0 ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angles = np.arange(POSITIONS)[:, None] * frequencies
    cos = draft.constant("cos_cache", np.cos(angles).astype(np.float32))
    return cos, draft.constant("sin_cache", np.sin(angles).astype(np.float32))


def _lengths(draft: Draft) -> tuple[ir.Value, ir.Value]:
    """seqlens_k: each row's last position (batch); total_sequence_length: a scalar. Both int32."""
    if "one_axis" in draft.known:
        return draft.known["seqlens_k"], draft.known["total_length"]
    axis = draft.constant("one_axis", np.array([1], dtype=np.int64))
    count = draft.op("ReduceSum", draft.attention_mask, axis, name="count", keepdims=0)
    last = draft.op("Sub", count, axis, name="last")
    length = draft.op("Shape", draft.attention_mask, name="total", start=1, end=2)
    int32 = int(ir.DataType.INT32)
    draft.known["seqlens_k"] = draft.op("Cast", last, name="seqlens_k", to=int32)
    scalar = draft.op("Squeeze", length, name="total_scalar")
    draft.known["total_length"] = draft.op("Cast", scalar, name="total_length", to=int32)
    return draft.known["seqlens_k"], draft.known["total_length"]


def _llama_skip_norm(draft: Draft, x: ir.Value, residual: ir.Value, norm: str) -> tuple[ir.Value, ir.Value]:
    inputs = (x, residual, draft.weight(f"{norm}.weight"))
    return _skip_norm(draft, "SkipSimplifiedLayerNormalization", inputs, norm, 1e-6)


def _llama_mlp(draft: Draft, scope: str, x: ir.Value, *, quick_gelu: bool) -> ir.Value:
    gate, up = (draft.linear(f"{scope}.{part}_proj", x) for part in ("gate", "up"))
    if quick_gelu:
        silu = draft.fused("QuickGelu", gate, name=f"{scope}.act_fn", alpha=1.0)
    else:
        silu = draft.op("Mul", gate, draft.op("Sigmoid", gate, name=f"{scope}.act_fn"), name=f"{scope}.silu")
    return draft.linear(f"{scope}.down_proj", draft.op("Mul", silu, up, name=f"{scope}.gated"))
