"""TVM: low-bit kernels of the project's own, for processors and GPUs."""
