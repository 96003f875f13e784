"""A whole training step as one CUDA graph: :func:`capture`."""

from fastsam.graphs.captured_step import CapturedStep, capture

__all__ = ["CapturedStep", "capture"]
