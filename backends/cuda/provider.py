"""What ONNX Runtime's CUDA provider has kernels for, as data, and which nodes of a program it would leave to the CPU.

source:  the list of operators and types that ONNX Runtime publishes (docs/OperatorKernels.md, CUDAExecutionProvider),
         restricted to what this project writes
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

FLOATS = ("FLOAT", "FLOAT16", "DOUBLE", "BFLOAT16")
HALVES = ("FLOAT", "FLOAT16")
WHOLE = ("INT32", "INT64", "UINT32", "UINT64")
NARROW = ("INT8", "UINT8", "INT16", "UINT16")
NUMBERS = (*FLOATS, *WHOLE)
ANY = (*NUMBERS, *NARROW, "BOOL")
BITS = ("INT8", "UINT8", "INT4", "UINT4")

# operator -> types of its first input
KERNELS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("Cast", "Concat", "ConstantOfShape", "Expand", "Flatten", "Gather", "GatherElements", "Identity", "Reshape",
         "ScatterElements", "ScatterND", "Shape", "Size", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze",
         "Where"), ANY,
    ),
    **dict.fromkeys(("Add", "Sub", "Mul", "Div"), (*NUMBERS, *NARROW)),
    **dict.fromkeys(("Max", "Min", "Mod", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"), NUMBERS),
    **dict.fromkeys(("And", "Not", "Or", "Xor"), ("BOOL",)),
    **dict.fromkeys(
        ("Attention", "Erf", "Exp", "Gelu", "Gemm", "LayerNormalization", "MatMul", "RMSNormalization", "Relu",
         "RotaryEmbedding", "Sigmoid", "Softmax", "Sqrt", "Tanh"), FLOATS,
    ),
    **dict.fromkeys(("Cos", "Floor", "Log", "Reciprocal", "Round", "Sin"), (*HALVES, "DOUBLE")),
    **dict.fromkeys(("ReduceMax", "ReduceMean", "ReduceSum"), (*HALVES, "DOUBLE", "INT32", "INT64")),
    **dict.fromkeys(("MatMulNBits", "QuickGelu", "FastGelu", "BiasGelu"), (*HALVES, "BFLOAT16")),
    "Abs": (*NUMBERS, *NARROW), "Clip": (*HALVES, "DOUBLE", "INT64", "UINT64", "INT8", "UINT8"),
    "CumSum": (*HALVES, "DOUBLE", *WHOLE), "DequantizeLinear": BITS, "Equal": (*HALVES, "DOUBLE", *WHOLE, "BOOL"),
    "GatherND": (*FLOATS, "INT64", "BOOL"), "IsNaN": FLOATS, "MatMulInteger": ("INT8",),
    "Neg": (*FLOATS, "INT16", "INT32", "INT64", "INT8"), "NonZero": (*HALVES, "INT32", "INT64", "UINT8", "BOOL"),
    "Pow": (*FLOATS, "INT32", "INT64"), "QuantizeLinear": HALVES,
    "Range": ("FLOAT", "DOUBLE", "INT16", "INT32", "INT64"),
    "ReduceMin": (*HALVES, "DOUBLE", "INT32", "INT64", "INT8", "UINT8"), "Sign": (*NUMBERS, *NARROW),
    "Tile": (*FLOATS, "INT32", "INT64"), "TopK": (*HALVES, "DOUBLE", "INT32", "INT64"),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Fallback:
    """A node that the CPU would run, between copies from the GPU and back."""

    node: str
    operator: str
    reason: str


def fallbacks(model: ir.Model) -> list[Fallback]:
    """Of ``model``, whose values have types, in the order of its graph."""
    found = []
    for node in model.graph:
        if node.op_type == "Constant":
            continue
        kinds = KERNELS.get(node.op_type)
        kind = next((value.dtype.name for value in node.inputs if value is not None and value.dtype is not None), "")
        if kinds is None:
            found.append(Fallback(str(node.name), node.op_type, "the provider has no kernel of this operator"))
        elif kind and kind not in kinds:
            reason = f"the provider has no kernel of this operator for {kind.lower()}"
            found.append(Fallback(str(node.name), node.op_type, reason))
    return found
