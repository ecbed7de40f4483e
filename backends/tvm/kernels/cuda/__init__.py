"""Low-bit matrix products in CUDA C, for GPUs from compute capability 8.0 on; built with nvcc, which needs no GPU."""
