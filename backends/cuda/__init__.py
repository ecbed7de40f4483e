"""NVIDIA GPUs: a whole program as CUDA code, a plan of launches, and a loader that needs the driver alone."""
