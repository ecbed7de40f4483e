"""The tables of the README, one command each; see ``make benchmarks``."""
