"""GPUs through OpenCL: a whole program as OpenCL C, a plan of launches, run through whatever platform is installed."""
