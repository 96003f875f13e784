"""What each rank does in test_curvature_on_ranks.py."""

import warnings

import torch
from rank_training import spread, whole

import fastsam
from fastsam import curvature
from fastsam.methods.eigen import Estimate


def setting(how):
    """A rank's training, and the options that let curvature see how it is spread."""
    training = spread(how)
    return training, {"model": training.model} if how == "DDP" else {}


def joined(tensors):
    return torch.cat([whole(t.detach()).reshape(-1) for t in tensors])


def eigenpairs(how, solver, method):
    training, options = setting(how)
    params = list(training.model.parameters())
    which = "magnitude" if solver == "power" else "both"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pairs = curvature.top_eigenpairs(
            training.loss,
            params,
            1 if solver == "power" else 2,
            which=which,
            solver=solver,
            products=80,
            tolerance=1e-4,
            method=method,
            generator=torch.Generator().manual_seed(2),
            **options,
        )
    return pairs.eigenvalues, pairs.residuals, [joined(v) for v in pairs.vectors], joined(params)


def trace(how):
    training, options = setting(how)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return curvature.trace(training.loss, list(training.model.parameters()), probes=200, **options).value


def own_eigenvector(how, steps, base="SGD"):
    """Eigen-SAM that estimates its own vector every third step, from a given start; weights, v, and what was said."""
    training, options = setting(how)
    kind = dict(rho=0.1, alpha=0.5, freq=3, lr=0.05, momentum=0.9, estimate=Estimate(products=4))
    optimizer = fastsam.EigenSAM(training.model.parameters(), torch.optim.SGD, **kind)
    generator = torch.Generator().manual_seed(3)
    v = [torch.randn(p.shape, dtype=torch.float64, generator=generator) for p in training.model.parameters()]
    optimizer.eigenvector = v
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        weights = training.run(optimizer, steps, **options)
    return weights, joined(optimizer.eigenvector), [str(w.message) for w in said]


def first_estimates_agree(how):
    """v of this rank after an estimate from noise, though ranks have drawn different random numbers."""
    training, options = setting(how)
    optimizer = fastsam.EigenSAM(training.model.parameters(), torch.optim.SGD, freq=1, lr=0.05)
    torch.manual_seed(torch.distributed.get_rank())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        training.run(optimizer, 2, **options)
    return joined(optimizer.eigenvector), training.weights()


def monitored(how, path):
    training, options = setting(how)
    optimizer = fastsam.SAM(training.model.parameters(), torch.optim.SGD, rho=0.05, lr=0.05)
    monitor = curvature.CurvatureMonitor(
        optimizer, f"{path}-{torch.distributed.get_rank()}.csv", every=1, products=60, **options
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return monitor.measure(training.loss)
