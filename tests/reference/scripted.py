"""Steps whose gradients are given in advance, and so are the same for every backend."""

import itertools

import torch

from .table import METHODS, build_optimizer


def noise(shape, seed, dtype=torch.float64):
    """Normal numbers rounded to `dtype`, the same for a seed whatever the dtype."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)


def like(tensor, seed):
    """Noise in the shape, dtype and memory layout of a tensor."""
    return torch.empty_like(tensor).copy_(noise(tensor.shape, seed, tensor.dtype))


def random_gradients(params, seed):
    return [like(p.detach(), seed + 7 * i) for i, p in enumerate(params)]


def make_scripted(method, base, backend, dtype=torch.float64, shapes=((5, 3), (7,), (), (40,)), **extra):
    """A few parameters and a fastsam optimizer of them, with an eigenvector where the table has one given."""
    params = [torch.nn.Parameter(noise(shape, i, dtype)) for i, shape in enumerate(shapes)]
    optimizer = build_optimizer(method, base, params, backend, **extra)
    if METHODS[method].eigenvector == "given":
        optimizer.eigenvector = [like(p.detach(), 900 + i) * 0.1 for i, p in enumerate(params)]
    return params, optimizer


def set_gradients(params, gradients):
    for p, gradient in zip(params, gradients, strict=True):
        p.grad = gradient


def scripted_steps(optimizer, params, passes):
    """Take one step for every two entries of `passes` (lists of gradients; None is a missing one).

    Returns copies of the weights: perturbed, updated, perturbed, updated, ...
    """
    seen = []
    passes = iter(passes)
    for first, second in zip(passes, passes, strict=False):
        set_gradients(params, [None if g is None else g.clone() for g in first])
        optimizer.first_step()
        seen.append(copies(params))
        set_gradients(params, [None if g is None else g.clone() for g in second])
        optimizer.second_step()
        seen.append(copies(params))
    return seen


def copies(tensors):
    return [t.detach().clone() for t in tensors]


def bits(tensors):
    """The tensors' bytes, which tell -0.0 from 0.0 and one NaN from another."""
    return [t.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes() for t in tensors]


def state_bits(optimizer, params):
    """Every state tensor of every parameter, as bytes."""
    return [
        {
            key: bits([value]) if isinstance(value, torch.Tensor) else value
            for key, value in sorted(optimizer.state.get(p, {}).items())
        }
        for p in params
    ]


def assert_same_rounding(actual, expected, dtype, slack=4):
    """Equal within `slack` units in the last place, of the value itself or of the largest weight.

    Units are of `dtype`, or of what is compared where that is narrower.
    """
    flat = list(itertools.chain.from_iterable(expected))
    largest = max((t.abs().max().item() for t in flat if t.numel()), default=1.0)
    for step, (a, b) in enumerate(zip(actual, expected, strict=True)):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            eps = max(torch.finfo(dtype).eps, torch.finfo(x.dtype).eps)
            torch.testing.assert_close(
                x.double(), y.double(), rtol=slack * eps, atol=slack * eps * largest,
                msg=lambda text, step=step, i=i: f"record {step}, parameter {i}: {text}",
            )  # fmt: skip
