"""Benchmarks: ``python -m benchmarks.optimizer_step`` measures, ``python -m benchmarks.report`` prints."""
