"""The compiler TVM: whole programs from the quantised IR, as one shared library and its parameters."""
