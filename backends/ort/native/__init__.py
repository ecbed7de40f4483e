"""Fused kernels of the integer operators, in C, as a library of custom operators for ONNX Runtime."""
