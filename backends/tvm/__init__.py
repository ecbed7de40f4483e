"""The compiler TVM: whole programs from the quantised IR, and low-bit kernels of the project's own."""
