"""Benchmarks: one file per hot path, `python -m benchmarks.run SUITE`, results under benchmarks/results/."""
