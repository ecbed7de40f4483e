"""Low-bit matrix products in TensorIR, written for each processor's integer units; scheduled loops for GPUs."""

from qcompile.backends.tvm.kernels.api import (
    KERNELS,
    matmul_integer,
    matmul_nbits,
    matmul_nbits_int8,
    matmul_w4a8,
    pack_integer,
    pack_nbits,
)
from qcompile.backends.tvm.kernels.features import features, host_target, native_target

__all__ = [
    "KERNELS",
    "features",
    "host_target",
    "matmul_integer",
    "matmul_nbits",
    "matmul_nbits_int8",
    "matmul_w4a8",
    "native_target",
    "pack_integer",
    "pack_nbits",
]
