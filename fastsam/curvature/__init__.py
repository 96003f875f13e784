"""Curvature of the loss: Hessian-vector products, eigenpairs, trace, spectral density, alignment.

    >>> from fastsam import curvature
    >>> pairs = curvature.top_eigenpairs(lambda: loss_fn(model(x), y), model, k=5)
    >>> trace = curvature.trace(lambda batch: loss_fn(model(batch[0]), batch[1]), model, batches=loader)

Everything works where a backward pass does: on the CPU, on compiled models, with fused attention. Weights, buffers,
gradients, training flags and random generators are afterwards exactly what they were.
"""

from fastsam.curvature.measure import (
    Chunks,
    SpectralDensity,
    Trace,
    alignment,
    perturbation,
    spectral_density,
    top_eigenpairs,
    trace,
)
from fastsam.curvature.monitor import CurvatureMonitor
from fastsam.curvature.plot import draw_density, draw_panels
from fastsam.curvature.products import Hessian, hessian_vector_product
from fastsam.curvature.solvers import Eigenpairs, lanczos, power_iteration
from fastsam.loop.frozen import Frozen

__all__ = [
    "Chunks",
    "CurvatureMonitor",
    "Eigenpairs",
    "Frozen",
    "Hessian",
    "SpectralDensity",
    "Trace",
    "alignment",
    "draw_density",
    "draw_panels",
    "hessian_vector_product",
    "lanczos",
    "perturbation",
    "power_iteration",
    "spectral_density",
    "top_eigenpairs",
    "trace",
]
