"""NVIDIA GPUs: a whole program as CUDA code, a plan of launches, run through the driver alone."""
