"""The quantised graph in integers: values on fixed-point grids, and what each operator becomes."""
