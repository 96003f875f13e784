"""A description of the machine, kept importable under this name for the other scripts of this folder."""

from fastsam.bench.machine import machine

__all__ = ["machine"]
