"""GPUs in browsers: a whole program as WGSL, and a plan of launches."""
