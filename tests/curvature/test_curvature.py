"""Hessian-vector products both ways, what they must leave alone, and Eigen-SAM in loops of every kind."""

import copy
import gc
import importlib
import json
import math
import os
import random
import re
import subprocess
import sys
import warnings
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from reference import mlp
from torch import nn

import fastsam
from fastsam import curvature
from fastsam.commands.training import networks
from fastsam.curvature import Chunks, Hessian, hessian_vector_product
from fastsam.methods.eigen import Estimate

WAYS = ["exact", "finite-difference"]


def noise_like(params, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype) for p in params]


def cosine(a, b):
    a, b = (torch.cat([x.double().reshape(-1) for x in v]) for v in (a, b))
    return float(a @ b / (a.norm() * b.norm()))


class Attention(nn.Module):
    """Self-attention through torch's fused kernel, or written out."""

    def __init__(self, dim, fused):
        super().__init__()
        self.fused, self.qkv, self.out = fused, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        n, tokens, dim = x.shape
        q, k, v = self.qkv(x).view(n, tokens, 3, 2, dim // 2).permute(2, 0, 3, 1, 4)
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1) @ v
        return x + self.out(y.transpose(1, 2).reshape(n, tokens, dim))


def vit(fused=False):
    """A small vision transformer and a batch, in float32."""
    torch.manual_seed(0)
    blocks = [m for _ in range(2) for m in (nn.LayerNorm(32), Attention(32, fused), nn.Linear(32, 32), nn.GELU())]
    return nn.Sequential(nn.Conv2d(1, 32, 2, 2), nn.Flatten(2), _Transpose(), *blocks, nn.Flatten(), nn.Linear(512, 10))


class _Transpose(nn.Module):
    def forward(self, x):
        return x.transpose(1, 2)


class _Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.SiLU())

    def forward(self, x):
        return x + self.body(x)


def resnet():
    """A small residual network with BatchNorm and smooth activations, in float32."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), _Residual(16), nn.AvgPool2d(2), _Residual(16), nn.Flatten(), nn.Linear(256, 10)
    )


def images(n=32):
    generator = torch.Generator().manual_seed(7)
    return torch.randn(n, 1, 8, 8, generator=generator), torch.randint(0, 10, (n,), generator=generator)


def trained(build):
    """Ten steps from the start, where the spectrum has begun to spread."""
    model, (x, y) = build(), images(128)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for i in range(10):
        optimizer.zero_grad()
        F.cross_entropy(model(x[i::4]), y[i::4]).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model


# ---- products ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", WAYS)
def test_a_known_hessian(method):
    w = nn.Parameter(torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64))
    v = torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64)
    (product,) = hessian_vector_product(lambda: (w**3).sum() + w[0] * w[2], [w], [v], method=method)
    torch.testing.assert_close(
        product, 6 * w.detach() * v + torch.tensor([-1.0, 0, 1.0]).double(), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("direction", ["noise", "gradient", "eigenvector"])
@pytest.mark.parametrize("build", [vit, resnet])
def test_finite_differences_agree_with_the_exact_product(build, direction):
    model = trained(build)
    exact = copy.deepcopy(model).double()
    x, y = images()

    def loss():
        return F.cross_entropy(model(x), y)

    def autocast_loss():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(x)
        return F.cross_entropy(logits.float(), y)

    def exact_loss():
        return F.cross_entropy(exact(x.double()), y)

    if direction == "noise":
        v = noise_like(exact.parameters())
    elif direction == "gradient":
        v = list(torch.autograd.grad(exact_loss(), list(exact.parameters())))
    else:
        v = curvature.top_eigenpairs(exact_loss, exact).vectors[0]
    truth = hessian_vector_product(exact_loss, exact, v, method="exact")
    v = [x.float() for x in v]
    single = hessian_vector_product(loss, model, v, method="finite-difference")
    half = hessian_vector_product(autocast_loss, model, v, method="finite-difference")
    assert cosine(single, truth) >= 0.999
    assert cosine(half, truth) >= 0.95
    lengths = [torch.cat([x.double().reshape(-1) for x in h]).norm() for h in (single, half, truth)]
    assert abs(lengths[0] / lengths[2] - 1) < 0.01 and abs(lengths[1] / lengths[2] - 1) < 0.3


HALVES = [torch.float16, torch.bfloat16]


def in_half(dtype, own=None):
    """A small vision transformer, its loss in float32 and its loss under autocast.

    With ``own`` a dropout whose masks come from this generator, which nobody else knows of, makes the second random.
    """
    torch.manual_seed(1)
    model = networks.vit(10, image=8, patch=2, dim=32, depth=2, heads=4, channels=1)
    x, y = images()

    def dropout(module, inputs, output):
        mask = torch.rand(output.shape, generator=own) > 0.3
        return output * mask / 0.7

    def loss():
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return F.cross_entropy(model(x), y)

    def half():
        with torch.autocast("cpu", dtype=dtype):
            logits = model(x)
        return F.cross_entropy(logits.float(), y)

    if own is not None:
        model.norm.register_forward_hook(dropout)
    return model, loss, half


@pytest.mark.parametrize("dtype", HALVES)
def test_a_move_that_was_too_far_for_its_direction_is_made_again(dtype):
    """From a random direction to the top eigenvector curvature grows a hundredfold, and the radius was the former's."""
    model, loss, half = in_half(dtype)
    torch.manual_seed(0)
    top = curvature.top_eigenpairs(loss, model, which="magnitude", method="exact")
    torch.manual_seed(1)
    start = noise_like(model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        options = dict(which="magnitude", method="finite-difference", start=start, products=20)
        found = curvature.top_eigenpairs(half, model, **options)
    assert float(found.eigenvalues[0]) == pytest.approx(float(top.eigenvalues[0]), rel=0.1)
    assert curvature.alignment(found.vectors[0], top.vectors[0]) > 0.95


@pytest.mark.parametrize("beyond", [math.inf, math.nan])
def test_a_move_to_where_gradients_overflow_is_made_again(beyond):
    """As under a GradScaler: the gradients are finite at the weights, and not where the loss is large."""
    w = nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    first = True

    def closure():
        nonlocal first
        w.grad = 2 * w.detach()
        if first:
            w.grad += beyond
        first = False
        return w.detach().square().sum()

    with Hessian(closure, [w], closure=True, method="finite-difference") as hessian:
        h = hessian.product(torch.tensor([1.0, 0.0], dtype=torch.float64))
    torch.testing.assert_close(h, torch.tensor([2.0, 0.0], dtype=torch.float64), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", HALVES)
def test_a_random_loss_in_half_precision_is_said_to_be_noise(dtype):
    model, _, half = in_half(dtype, own=torch.Generator().manual_seed(0))
    with pytest.warns(RuntimeWarning, match="noise"), Hessian(half, model, method="finite-difference") as hessian:
        for _ in range(3):
            hessian.product(hessian.random())


def test_an_autocast_region_around_the_call_does_not_keep_old_casts_of_the_weights():
    model, (x, y) = trained(vit), images()
    v = noise_like(model.parameters())
    truth = hessian_vector_product(lambda: F.cross_entropy(model(x), y), model, v, method="exact")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(x)
        product = hessian_vector_product(
            lambda: F.cross_entropy(model(x).float(), y), model, v, method="finite-difference"
        )
    assert cosine(product, truth) >= 0.95
    lengths = [torch.cat([x.double().reshape(-1) for x in h]).norm() for h in (product, truth)]
    assert abs(lengths[0] / lengths[1] - 1) < 0.3


@pytest.mark.parametrize("method", WAYS)
def test_the_product_is_linear_in_the_length_of_the_vector(method):
    problem = mlp()
    v = noise_like(problem.params())
    one = hessian_vector_product(problem.loss, problem.model, v, method=method)
    for scale in (1e-9, 1e9):
        product = hessian_vector_product(problem.loss, problem.model, [x * scale for x in v], method=method)
        torch.testing.assert_close([x / scale for x in product], one, rtol=1e-9, atol=1e-12)
    zero = hessian_vector_product(problem.loss, problem.model, [x * 0 for x in v], method=method)
    assert not any(x.any() for x in zero)


def test_the_radius_follows_the_weights_and_the_precision():
    def radius(scale, dtype):
        w = nn.Parameter(torch.full((100,), scale, dtype=dtype))
        with Hessian(lambda: w.square().sum(), [w]) as hessian:
            return hessian.radius()

    assert radius(3.0, torch.float32) == pytest.approx(0.03 * 2**-11.5 * 30)
    assert radius(6.0, torch.float32) == pytest.approx(2 * radius(3.0, torch.float32))
    assert radius(3.0, torch.float64) == pytest.approx(0.03 * 2**-26 * 30)
    assert radius(3.0, torch.bfloat16) > 200 * radius(3.0, torch.float32)
    assert radius(0.0, torch.float32) > 0, "weights that are all zero"


@pytest.mark.parametrize("method", WAYS)
def test_frozen_and_unused_parameters_have_zeros(method):
    problem = mlp()
    problem.model[0].weight.requires_grad_(False)
    unused = nn.Parameter(torch.ones(3, dtype=torch.float64))
    params = [*problem.params(), unused]
    product = hessian_vector_product(problem.loss, params, noise_like(params), method=method)
    assert not product[0].any() and not product[-1].any() and product[1].any()
    assert unused.grad is None and problem.model[0].weight.grad is None


def test_parameters_of_several_dtypes_share_one_vector():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8).double(), _Cast(torch.float32), nn.Tanh(), nn.Linear(8, 3))
    x, y = torch.randn(20, 6).double(), torch.randint(0, 3, (20,))
    v = noise_like(model.parameters())
    products = [hessian_vector_product(lambda: F.cross_entropy(model(x), y), model, v, method=m) for m in WAYS]
    assert cosine(*products) > 0.999


class _Cast(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, x):
        return x.to(self.dtype)


@pytest.mark.parametrize("method", WAYS)
def test_batches_and_chunks_give_the_hessian_of_all_the_data(method):
    problem = mlp()
    x, y = problem.inputs[0], problem.targets[0]
    v = noise_like(problem.params())

    def loss(batch):
        return F.cross_entropy(problem.model(batch[0]), batch[1])

    whole = hessian_vector_product(lambda: loss((x, y)), problem.model, v, method="exact")
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=5, shuffle=True)
    for batches in (Chunks((x, y), 7), loader, [(x[:3], y[:3]), (x[3:], y[3:])]):
        product = hessian_vector_product(loss, problem.model, v, batches=batches, method=method)
        torch.testing.assert_close(product, whole, rtol=1e-5, atol=1e-7)
    assert len(Chunks((x, y), 7)) == len(list(Chunks({"x": x, "y": y}, 7))) == 3


def test_chunks_bound_the_samples_that_meet_the_model_at_once():
    problem, sizes = mlp(), []
    x, y = problem.inputs.flatten(0, 1), problem.targets.flatten()

    def loss(batch):
        sizes.append(len(batch[0]))
        return F.cross_entropy(problem.model(batch[0]), batch[1])

    curvature.trace(loss, problem.model, probes=2, batches=Chunks((x, y), 9), method="finite-difference")
    assert max(sizes) == 9


# ---- what has no second derivative ----------------------------------------------------------------------


def test_auto_is_exact_where_it_can_be():
    problem = mlp()
    with warnings.catch_warnings(), Hessian(problem.loss, problem.model) as hessian:
        warnings.simplefilter("error")
        hessian.product(hessian.random())
        assert hessian.method == "exact"


def relu_resnet():
    """The same network with kinks, which finite differences count."""
    model = resnet()
    for module in model.modules():
        if isinstance(module, _Residual):
            module.body[2] = nn.ReLU()
    return model


def two_losses(loss):
    """As in gradient accumulation: several backward passes in one closure, one of them through torch.autograd."""
    whole = loss()
    (0.25 * whole).backward()
    part = loss()
    torch.autograd.backward([part, 0.5 * part], [torch.tensor(0.25), None])
    return whole


def from_outside(loss):
    value = loss()
    (-value).backward(gradient=torch.tensor(-1.0))
    return value


def scaled(loss):
    value = loss()
    (value * 1024).backward()
    return value


def statistics_put_back(loss):
    """As the second pass of a step does: the graph holds BatchNorm's statistics, which are written over."""
    value = loss()
    value.backward()
    for b in loss.model.buffers():
        b.copy_(b.clone())
    return value


CLOSURES = {
    "one loss": (lambda loss: (lambda value: (value.backward(), value)[1])(loss()), 1.0),
    "gradient= given": (from_outside, 1.0),
    "several backward passes": (two_losses, 1.0),
    "scaled": (scaled, 1024.0),
    "statistics put back": (statistics_put_back, 1.0),
}
EVALUATIONS = {"several backward passes": 3, "statistics put back": 3}  # for three products; else one serves all


@pytest.mark.parametrize("name", CLOSURES)
def test_products_of_a_closure_are_those_of_double_backward(name):
    """On a network with kinks, where finite differences are something else altogether."""
    model, (x, y) = relu_resnet(), images()
    evaluate, scale = CLOSURES[name]
    calls = []

    def loss():
        return F.cross_entropy(model(x), y)

    loss.model = model

    def closure():
        calls.append(1)
        return evaluate(loss)

    v = noise_like(model.parameters())
    truth = hessian_vector_product(loss, model, v, method="exact")
    before, original = snapshot(model), torch.autograd.backward
    with Hessian(closure, model, closure=True, loss_scale=scale) as hessian:
        products = [hessian.tensors(hessian.product(hessian.flat(v))) for _ in range(3)]
        assert hessian.method == "exact"
    assert all(cosine(product, truth) > 1 - 1e-9 for product in products)
    torch.testing.assert_close(products[-1], truth, rtol=1e-3, atol=1e-5)
    # One graph serves all products; several are never in memory at once, so each product needs them anew.
    assert len(calls) == EVALUATIONS.get(name, 1)
    assert torch.autograd.backward is original
    assert_unchanged(model, before)


def reentrant(model, x):
    return torch.utils.checkpoint.checkpoint(model, x.requires_grad_(), use_reentrant=True)


NOT_EXACT = {
    "reentrant checkpoints": (lambda model, x: reentrant(model, x), "checkpoint"),
    "compiled": (lambda model, x: torch.compile(model, backend="aot_eager")(x), "compiled"),
    "gradients from elsewhere": (lambda model, x: model(x), "not those of the losses"),
}


@pytest.mark.parametrize("name", NOT_EXACT)
def test_a_closure_without_a_second_derivative_falls_back_once(name):
    model, (x, y) = resnet(), images()
    forward, reason = NOT_EXACT[name]
    backward = torch.autograd.backward if name == "gradients from elsewhere" else None

    def closure():
        loss = F.cross_entropy(forward(model, x), y)
        loss.backward() if backward is None else backward(loss)
        return loss

    optimizer = fastsam.EigenSAM(model.parameters(), torch.optim.SGD, lr=1e-3, freq=1)
    with pytest.warns(RuntimeWarning, match=f"finite differences: .*{reason}") as caught:
        for _ in range(3):
            optimizer.step(closure)
    assert len([w for w in caught if "finite differences" in str(w.message)]) == 1
    strict = fastsam.EigenSAM(model.parameters(), torch.optim.SGD, lr=1e-3, freq=1, estimate=Estimate(method="exact"))
    strict.step(closure)
    weights = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="finite-difference"):
        strict.step(closure)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), weights, strict=True))


def test_reentrant_checkpoints_do_not_pass_for_layers_without_curvature():
    """Double backward does not see the parameters in them: their part of the product would be zero."""
    body, head, (x, y) = resnet()[:4], resnet()[4:], images()
    params = [*body.parameters(), *head.parameters()]
    v = noise_like(params)
    truth = hessian_vector_product(lambda: F.cross_entropy(head(body(x)), y), params, v, method="exact")
    with pytest.warns(RuntimeWarning, match="finite differences: .*use_reentrant=False"):
        product = hessian_vector_product(lambda: F.cross_entropy(head(reentrant(body, x)), y), params, v)
    assert cosine(product, truth) > 0.999


class Once(torch.autograd.Function):
    """x^2, which can be differentiated once."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 2 * g * ctx.saved_tensors[0]


@pytest.mark.parametrize("linear", [True, False], ids=["then linear", "then squared"])
def test_a_function_that_is_differentiated_once_does_not_pass_for_a_linear_one(linear):
    w = nn.Parameter(torch.ones(3, dtype=torch.float64))

    def loss():
        square = Once.apply(w)
        return (square if linear else square.square()).sum()

    with pytest.warns(RuntimeWarning, match="finite differences: Once is once_differentiable"):
        (product,) = hessian_vector_product(loss, [w], [torch.ones(3, dtype=torch.float64)])
    assert product.tolist() == pytest.approx([2.0 if linear else 12.0] * 3, rel=1e-6)


class Twice(Once):
    """x^2, whose second derivative fails."""

    @staticmethod
    def backward(ctx, g):
        return Fails.apply(2 * g * ctx.saved_tensors[0])


class Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        raise RuntimeError("no second derivative here")


@pytest.mark.parametrize("kind", ["loss", "closure"])
def test_what_double_backward_left_is_freed_before_differences_begin(kind):
    """It may be why there was no memory."""
    importlib.import_module(
        "torch._dynamo"
    )  # a backward pass may be what imports it first, and its import keeps frames
    w, graphs, alive = nn.Parameter(torch.ones(3)), [], []

    def loss():
        alive.append(bool(graphs) and graphs[0]() is not None)
        square = Twice.apply(w)
        square.grad_fn.part = torch.zeros(1)  # lives as long as the graph
        graphs.append(weakref.ref(square.grad_fn.part))
        value = square.sum()
        if kind == "closure":
            value.backward()
        return value

    gc.disable()
    try:
        with pytest.warns(RuntimeWarning, match="finite differences"):
            hessian_vector_product(loss, [w], [torch.ones(3)], closure=kind == "closure")
    finally:
        gc.enable()
    assert len(alive) > 2 and not any(alive)


def test_too_little_memory_for_double_backward_is_no_reason_to_stop(monkeypatch):
    problem = mlp()
    original = torch.autograd.grad

    def grad(*args, **kwargs):
        if kwargs.get("create_graph"):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", grad)
    v = noise_like(problem.params())
    with pytest.warns(RuntimeWarning, match="finite differences: CUDA out of memory"):
        hessian_vector_product(problem.closure, problem.model, v, closure=True)
    with pytest.raises(torch.OutOfMemoryError):
        hessian_vector_product(problem.loss, problem.model, v, method="exact")


def test_auto_falls_back_once_for_fused_attention():
    model, plain = vit(fused=True), vit()
    plain.load_state_dict(model.state_dict())
    x, y = images()
    v = noise_like(model.parameters())
    with (
        pytest.warns(RuntimeWarning, match=r"finite differences: .*not implemented") as caught,
        Hessian(lambda: F.cross_entropy(model(x), y), model) as hessian,
    ):
        products = [hessian.tensors(hessian.product(hessian.flat(v))) for _ in range(3)]
    assert len(caught) == 1 and hessian.method == "finite-difference"
    truth = hessian_vector_product(lambda: F.cross_entropy(plain(x), y), plain, v, method="exact")
    assert all(cosine(product, truth) > 0.999 for product in products)


def test_auto_falls_back_for_a_compiled_model():
    plain, (x, y) = resnet(), images()
    compiled = torch.compile(copy.deepcopy(plain), backend="aot_eager")
    v = noise_like(plain.parameters())
    buffers = [b.clone() for b in compiled.buffers()]
    with pytest.warns(RuntimeWarning, match="finite differences"):
        product = hessian_vector_product(lambda: F.cross_entropy(compiled(x), y), list(compiled.parameters()), v)
    assert all(torch.equal(a, b) for a, b in zip(compiled.buffers(), buffers, strict=True))
    truth = hessian_vector_product(lambda: F.cross_entropy(plain(x), y), plain, v, method="exact")
    assert cosine(product, truth) > 0.999


def test_exact_is_refused_with_the_way_out():
    model, (x, y) = vit(fused=True), images()
    with pytest.raises(RuntimeError, match="finite-difference"):
        hessian_vector_product(
            lambda: F.cross_entropy(model(x), y), model, noise_like(model.parameters()), method="exact"
        )


def test_several_processes_go_through_backward(monkeypatch):
    """DistributedDataParallel reduces gradients in backward() alone."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    problem, calls = mlp(), []
    for p in problem.params():
        p.register_post_accumulate_grad_hook(calls.append)
    with pytest.warns(RuntimeWarning, match="several processes"):
        hessian_vector_product(problem.loss, problem.model, noise_like(problem.params()))
    assert len(calls) >= 2 * len(problem.params())


# ---- nothing is left behind ------------------------------------------------------------------------------


class Busy(nn.Module):
    """Everything that a forward pass can change: BatchNorm, dropout, Python's and NumPy's generators."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.drop = nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Dropout(0.3)
        self.last = nn.Linear(12, 3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.last.eval()  # a flag that differs from its parent's

    def forward(self, x):
        import numpy

        self.calls = self.calls + 1
        scale = 1 + 0.1 * random.random() + 0.1 * numpy.random.rand()
        return self.last(self.drop(torch.tanh(self.norm(self.first(x))))) * scale


def snapshot(model):
    import numpy

    return {
        "weights": [p.detach().clone() for p in model.parameters()],
        "buffers": {name: b.clone() for name, b in model.named_buffers()},
        "training": {name: m.training for name, m in model.named_modules()},
        "gradients": [(p.grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()],
        "torch": torch.get_rng_state(),
        "numpy": numpy.random.get_state()[1].copy(),
        "python": random.getstate(),
    }


def assert_unchanged(model, before):
    after = snapshot(model)
    for name in ("weights", "torch"):
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=0)
    torch.testing.assert_close(after["buffers"], before["buffers"], rtol=0, atol=0)
    assert after["training"] == before["training"] and after["python"] == before["python"]
    assert (after["numpy"] == before["numpy"]).all()
    for (g, values), (old, old_values) in zip(after["gradients"], before["gradients"], strict=True):
        assert g is old and (g is None or torch.equal(values, old_values))


@pytest.mark.parametrize("known", [True, False], ids=["model given", "modules found"])
@pytest.mark.parametrize("ending", ["returns", "raises"])
@pytest.mark.parametrize("method", WAYS)
@pytest.mark.parametrize("flattened", [False, True], ids=["", "flattened"])
def test_an_estimate_leaves_everything_as_it_was(method, ending, known, flattened):
    torch.manual_seed(0)
    model = Busy()
    x, y = torch.randn(10, 6), torch.randint(0, 3, (10,))
    if flattened:
        fastsam.flatten_parameters(model)
    optimizer = fastsam.SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    F.cross_entropy(model(x), y).backward()
    if not flattened:
        model.last.bias.grad = None
    before, calls = snapshot(model), []

    def loss():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        calls.append(1)
        torch.manual_seed(len(calls))
        if ending == "raises" and len(calls) == (3 if method != "exact" else 1):
            raise KeyboardInterrupt
        return loss

    params = model if known else list(model.parameters())
    try:
        with Hessian(loss, params, method=method, eval_mode=True) as hessian:
            v = hessian.random()
            first = hessian.product(v)
            torch.testing.assert_close(hessian.product(v), first, rtol=1e-4, atol=1e-4)
    except KeyboardInterrupt:
        assert ending == "raises"
    else:
        assert ending == "returns"
    assert_unchanged(model, before)


def test_dropout_draws_the_same_mask_in_every_pass():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Dropout(0.5), nn.Linear(40, 3)).double()
    x, y = torch.randn(10, 6).double(), torch.randint(0, 3, (10,))
    v = noise_like(model.parameters())
    exact, difference = (hessian_vector_product(lambda: F.cross_entropy(model(x), y), model, v, method=m) for m in WAYS)
    assert cosine(exact, difference) > 1 - 1e-6


# ---- bad input ---------------------------------------------------------------------------------------------


def weights_after(model, run):
    before = [p.detach().clone() for p in model.parameters()]
    run()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    assert all(p.grad is None for p in model.parameters())


BAD_LOSSES = {
    "not a tensor": (lambda p: p.loss().item(), TypeError, "as a tensor"),
    "not a scalar": (lambda p: p.model(p.inputs[0]), ValueError, "scalar"),
    "no graph": (lambda p: p.loss().detach(), RuntimeError, "without a graph"),
    "backward inside": (lambda p: p.closure(), RuntimeError, "closure=True"),
    "not finite": (lambda p: p.loss() * float("nan"), FloatingPointError, "not finite"),
}


@pytest.mark.parametrize("method", [*WAYS, "auto"])
@pytest.mark.parametrize("name", BAD_LOSSES)
def test_a_loss_that_cannot_be_used_is_refused(name, method):
    problem = mlp()
    make, error, message = BAD_LOSSES[name]

    def run():
        with pytest.raises(error, match=message):
            hessian_vector_product(lambda: make(problem), problem.model, noise_like(problem.params()), method=method)

    weights_after(problem.model, run)


BAD_CLOSURES = {
    "forgets backward": (lambda p: p.loss(), RuntimeError, "backward"),
    "returns nothing": (lambda p: p.closure() and None, TypeError, "None"),
}


@pytest.mark.parametrize("name", BAD_CLOSURES)
def test_a_closure_that_cannot_be_used_is_refused(name):
    problem = mlp()
    make, error, message = BAD_CLOSURES[name]

    def run():
        with pytest.raises(error, match=message), Hessian(lambda: make(problem), problem.model, closure=True) as h:
            h.product(h.random())

    weights_after(problem.model, run)


def test_a_vector_of_the_wrong_shape_is_refused():
    problem = mlp()
    v = noise_like(problem.params())
    for wrong in (v[:-1], [v[0].T.contiguous(), *v[1:]]):
        with pytest.raises(ValueError, match="vector"):
            hessian_vector_product(problem.loss, problem.model, wrong)
    with Hessian(problem.loss, problem.model) as hessian, pytest.raises(ValueError, match="shape"):
        hessian.product(torch.zeros(3, dtype=torch.float64))


def test_options_out_of_range_are_refused():
    problem = mlp()
    for options, error, message in (
        ({"method": "magic"}, ValueError, "method"),
        ({"radius": -1.0}, ValueError, "radius"),
        ({"closure": True, "batches": [1]}, ValueError, "closure"),
        ({"batches": iter([])}, TypeError, "once"),
    ):
        with pytest.raises(error, match=message):
            Hessian(problem.loss, problem.model, **options)
    problem.model.requires_grad_(False)
    with pytest.raises(ValueError, match="none of the parameters"):
        Hessian(problem.loss, problem.model)
    with pytest.raises(RuntimeError, match="with"):
        Hessian(problem.loss, [nn.Parameter(torch.ones(2))]).product(torch.ones(2))
    with pytest.raises(ValueError, match="no batch"):
        curvature.trace(lambda batch: None, nn.Linear(2, 2), batches=[])


@pytest.mark.parametrize("method", WAYS)
def test_a_loss_that_changes_between_calls_is_said_to_be_noise(method):
    problem = mlp()
    own = torch.Generator().manual_seed(0)

    def loss(batch):
        return F.cross_entropy(problem.model(batch[0] + torch.randn(batch[0].shape, generator=own)), batch[1])

    data = (problem.inputs[0].float().double(), problem.targets[0])
    with (
        pytest.warns(RuntimeWarning, match="noise") as caught,
        Hessian(loss, problem.model, batches=[data], method=method) as hessian,
    ):
        for _ in range(3):
            hessian.product(hessian.random())
    assert len(caught) == 1


def test_weights_that_are_not_finite_are_refused():
    w = nn.Parameter(torch.tensor([float("inf"), 1.0]))
    with pytest.raises(FloatingPointError):
        hessian_vector_product(lambda: w.square().sum(), [w], [torch.ones(2)], method="finite-difference")


# ---- sharpness ---------------------------------------------------------------------------------------------


def quadratic(eigenvalues):
    values = torch.tensor(eigenvalues, dtype=torch.float64)
    w = nn.Parameter(torch.ones(len(values), dtype=torch.float64))
    return w, lambda: 0.5 * (values * w * w).sum()


def test_the_trace_and_its_standard_error():
    w, loss = quadratic([3.0, 2.0, -1.0])  # z'Hz is the same for all signs z
    result = curvature.trace(loss, [w], probes=4)
    assert result.value == pytest.approx(4.0) and result.standard_error == pytest.approx(0, abs=1e-9)
    problem = mlp()
    exact = sum(
        float(hessian_vector_product(problem.loss, problem.model, list(unit))[i].reshape(-1)[j])
        for i, j, unit in _units(problem.params())
    )
    result = curvature.trace(problem.loss, problem.model, probes=60, generator=torch.Generator().manual_seed(0))
    assert len(result.samples) == 60 and 0 < result.standard_error < 0.5 * abs(exact)
    assert abs(result.value - exact) < 4 * result.standard_error
    few = curvature.trace(problem.loss, problem.model, probes=200, tolerance=0.2)
    assert 5 <= len(few.samples) < 200 and few.standard_error <= 0.2 * abs(few.value)
    for options in ({"probes": 1}, {"tolerance": 0.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            curvature.trace(problem.loss, problem.model, **options)


def _units(params):
    for i, p in enumerate(params):
        for j in range(p.numel()):
            unit = [torch.zeros_like(q) for q in params]
            unit[i].view(-1)[j] = 1
            yield i, j, unit


def test_the_spectral_density_holds_the_spectrum():
    eigenvalues = [10.0] * 5 + [0.0] * 80 + [-2.0] * 15
    w, loss = quadratic(eigenvalues)
    result = curvature.spectral_density(
        loss, [w], probes=40, steps=5, sigma=0.3, generator=torch.Generator().manual_seed(0)
    )
    assert torch.trapezoid(result.density, result.grid) == pytest.approx(1.0, abs=1e-6)
    for centre, share in ((10, 0.05), (0, 0.8), (-2, 0.15)):
        near = (result.grid - centre).abs() < 0.95
        assert torch.trapezoid(result.density[near], result.grid[near]) == pytest.approx(share, abs=0.03)
    assert result.weights.sum(dim=1).tolist() == pytest.approx([1.0] * 40)


def test_every_measure_of_a_compiled_model_in_chunks_is_that_of_the_plain_one():
    """What PyHessian does with double backward on one batch, on the CPU, here without a second derivative."""
    plain, (x, y) = trained(resnet).eval(), images()
    compiled = torch.compile(copy.deepcopy(plain), backend="aot_eager")

    def measures(loss, model, **options):
        def generator():
            return torch.Generator().manual_seed(0)

        pairs = curvature.top_eigenpairs(loss, model, 2, tolerance=1e-3, generator=generator(), **options)
        trace = curvature.trace(loss, model, probes=5, generator=generator(), **options)
        density = curvature.spectral_density(loss, model, probes=1, steps=8, generator=generator(), **options)
        return pairs, trace, density

    expected = measures(lambda: F.cross_entropy(plain(x), y), plain, method="exact")
    found = measures(
        lambda batch: F.cross_entropy(compiled(batch[0]), batch[1]),
        list(compiled.parameters()),
        batches=Chunks((x, y), 8),
        method="finite-difference",
    )
    torch.testing.assert_close(found[0].eigenvalues, expected[0].eigenvalues, rtol=1e-2, atol=0)
    assert all(
        curvature.alignment(*vectors) > 0.99 for vectors in zip(found[0].vectors, expected[0].vectors, strict=True)
    )
    assert found[1].samples == pytest.approx(expected[1].samples, rel=0.05, abs=0.05 * abs(expected[1].value))
    width = float(expected[2].nodes.max() - expected[2].nodes.min())
    assert (found[2].nodes - expected[2].nodes).abs().max() < 0.05 * width


@pytest.mark.parametrize(
    "measure, options, products",
    [
        (curvature.top_eigenpairs, {"k": 2}, None),
        (curvature.top_eigenpairs, {"solver": "power", "which": "magnitude"}, None),
        (curvature.trace, {"probes": 7}, 7),
        (curvature.spectral_density, {"probes": 2, "steps": 3}, 6),
    ],
    ids=["lanczos", "power", "trace", "density"],
)
def test_progress_is_told_after_every_product_and_changes_none(measure, options, products):
    problem, told = mlp(), []

    def measured(**more):
        return measure(problem.loss, problem.model, generator=torch.Generator().manual_seed(0), **options, **more)

    silent, result = measured(), measured(progress=lambda: told.append(1))
    assert len(told) == (products or result.products) > 0
    for name, value in vars(silent).items():
        if name != "vectors":
            torch.testing.assert_close(getattr(result, name), value, rtol=0, atol=0)


@pytest.mark.parametrize("force", [None, "1"], ids=["in a file", "on a terminal"])
def test_the_command_shows_products_and_batches_on_a_terminal_only(tmp_path, monkeypatch, force):
    """The numbers are the same; a bar is gone when its measure is done."""
    pytest.importorskip("matplotlib")
    from typer.testing import CliRunner

    from fastsam.commands.sharpness import app

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "sharp_project.py").write_text("from torch import nn\ndef build(): return nn.Linear(4, 3)\n")
    torch.manual_seed(0)
    torch.save(nn.Linear(4, 3).state_dict(), "model.pt")
    torch.save((torch.randn(20, 4), torch.randint(0, 3, (20,))), "data.pt")
    arguments = ["model.pt", "--model", "sharp_project:build", "--data", "data.pt", "--chunk", "8", "--trace", "4"]
    arguments += ["--products", "9", "--json", "out.json", "--density", "density.png"]
    result = CliRunner().invoke(app, arguments, env={"FORCE_COLOR": force, "COLUMNS": "120", "TERM": "xterm"})
    assert result.exit_code == 0, result.output
    lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", result.output).replace("\r", "\n").splitlines()
    for what, products in (("eigenvalues, at most", r"\d/9"), ("trace", "4/4"), ("spectral density", "75/75")):
        shown = [line for line in lines if re.search(rf"^{what} .*━ +{products} .*batch 3 of 3", line)]
        assert bool(shown) == (force is not None), what
    model, (x, y) = nn.Linear(4, 3), torch.load("data.pt")
    model.load_state_dict(torch.load("model.pt"))
    pairs = curvature.top_eigenpairs(
        lambda batch: F.cross_entropy(model(batch[0]), batch[1]), model, products=9, batches=list(Chunks((x, y), 8)),
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert json.loads(Path("out.json").read_text())["eigenvalues"] == pairs.eigenvalues.tolist()


def test_alignment_is_the_cosine_without_its_sign():
    v = [torch.tensor([1.0, 0.0]), torch.tensor([[0.0]])]
    assert curvature.alignment(v, [-x for x in v]) == 1.0
    assert curvature.alignment([torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])], v) == pytest.approx(0.6)
    assert curvature.alignment([x * 0 for x in v], v) == 0.0
    with pytest.raises(ValueError, match="shapes"):
        curvature.alignment(v, v[:1])


def test_the_perturbation_is_what_the_optimizer_adds(backend):
    problem = mlp()
    optimizer = fastsam.SAM(problem.params(), torch.optim.SGD, lr=0.1, rho=0.3, backend=backend)
    problem.closure()
    before = problem.weights()
    e = curvature.perturbation(optimizer)
    assert torch.equal(problem.weights(), before)
    g = [p.grad for p in problem.params()]
    assert cosine(e, g) > 1 - 1e-9
    assert torch.cat([x.reshape(-1) for x in e]).norm() == pytest.approx(0.3)


# ---- Eigen-SAM in any loop ---------------------------------------------------------------------------------


def eigen_sam(problem, backend="auto", **options):
    options = {"lr": 0.05, "rho": 0.05, "freq": 3, **options}
    return fastsam.EigenSAM(problem.params(), torch.optim.SGD, backend=backend, **options)


@pytest.mark.parametrize("method", WAYS)
def test_step_refreshes_the_vector_by_itself(backend, method):
    manual, closure = mlp(), mlp()
    one, other = eigen_sam(manual, backend), eigen_sam(closure, backend, estimate=Estimate(method=method))
    for step in range(7):
        torch.manual_seed(step)
        if one.eigenvector_due():
            one.update_eigenvector(manual.loss)
        manual.closure()
        one.first_step(zero_grad=True)
        manual.closure()
        one.second_step(zero_grad=True)
        torch.manual_seed(step)
        other.step(closure.closure)
        assert (other.eigenvector is None) == (step < 3)
    assert abs(cosine(one.eigenvector, other.eigenvector)) > 1 - 1e-6
    torch.testing.assert_close(closure.weights(), manual.weights(), rtol=1e-5, atol=1e-6)
    assert other.last_estimate.products == 5 and other.last_estimate.vectors is None


def test_accumulate_refreshes_the_vector_from_the_first_micro_batch():
    problem, calls = mlp(), []
    optimizer = eigen_sam(problem)

    def closure():
        calls.append(1)
        return problem.closure()

    for step in range(5):
        weights = copy.deepcopy(problem.model.state_dict())
        for i in range(2):
            calls.clear()
            torch.manual_seed(step)
            optimizer.accumulate(closure)
            # An exact estimate is one evaluation more, before the first micro-batch of the step alone.
            assert len(calls) == (3 if step == 3 and i == 0 else 2)
            assert (optimizer.eigenvector is None) == (step < 3)
        optimizer.descend(zero_grad=True)
        if step == 3:
            alone = mlp()
            alone.model.load_state_dict(weights)
            torch.manual_seed(step)
            expected = eigen_sam(alone)
            expected.update_eigenvector(alone.loss)
    assert cosine(optimizer.eigenvector, expected.eigenvector) > 1 - 1e-9


def test_finish_refreshes_the_vector_and_keeps_the_gradients_at_hand():
    stepped, finished = mlp(), mlp()
    one, other = eigen_sam(stepped), eigen_sam(finished)
    for _ in range(5):
        torch.manual_seed(0)
        one.step(stepped.closure)
        finished.closure()
        torch.manual_seed(0)
        other.finish(finished.closure)
    torch.testing.assert_close(finished.weights(), stepped.weights(), rtol=0, atol=0)


@pytest.mark.parametrize("method", WAYS)
@pytest.mark.parametrize("eval_mode", [None, True])
def test_a_refresh_inside_step_leaves_no_trace(eval_mode, method):
    def train(freq):
        torch.manual_seed(0)
        model = Busy()
        x, y = torch.randn(10, 6), torch.randint(0, 3, (10,))
        estimate = Estimate(eval_mode=eval_mode, method=method)
        optimizer = fastsam.EigenSAM(
            model.parameters(), torch.optim.SGD, lr=0.1, alpha=0.0, freq=freq, estimate=estimate
        )
        random.seed(0)
        __import__("numpy").random.seed(0)
        modes = []

        def closure():
            loss = F.cross_entropy(model(x), y)
            modes.append(model.norm.training)
            loss.backward()
            return loss

        for _ in range(4):
            optimizer.step(closure)
        return model, optimizer, modes

    (with_refresh, optimizer, modes), (without, _, _) = train(2), train(100)
    assert optimizer.eigenvector is not None and len(modes) > 8
    # With alpha = 0 the vector has no part in the step: the two trainings are the same to the last bit.
    gradients = [(p.grad, p.grad.clone()) for p in with_refresh.parameters()]
    assert all(torch.equal(p.grad, g) for p, (_, g) in zip(without.parameters(), gradients, strict=True))
    assert_unchanged(with_refresh, {**snapshot(without), "gradients": gradients})
    assert (False in modes) == bool(eval_mode)


def test_the_estimate_may_take_a_closure_of_its_own():
    problem, small = mlp(), []
    optimizer = eigen_sam(problem, freq=1)

    def estimate_closure():
        loss = F.cross_entropy(problem.model(problem.inputs[0][:4]), problem.targets[0][:4])
        small.append(1)
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(problem.closure, estimate_closure)
    assert len(small) == 1
    optimizer.estimate = Estimate(method="finite-difference", products=3)
    optimizer.step(problem.closure, estimate_closure)
    assert len(small) >= 1 + 2 * 3


@pytest.mark.parametrize("warm_start", [True, False])
def test_lanczos_takes_the_largest_eigenvalue_where_power_iteration_says_it_is_negative(warm_start):
    w, loss = quadratic([1.0, -9.0, 2.0, 0.5])
    w.grad = None
    optimizer = fastsam.EigenSAM([w], torch.optim.SGD, lr=0.1)
    with pytest.warns(RuntimeWarning, match="lanczos") as caught:
        for _ in range(3):
            optimizer.update_eigenvector(loss)
    assert len(caught) == 1
    estimate = Estimate("lanczos", products=4, tolerance=1e-6, warm_start=warm_start)
    optimizer = fastsam.EigenSAM([w], torch.optim.SGD, lr=0.1, estimate=estimate)
    for _ in range(2):
        optimizer.update_eigenvector(loss)
    assert optimizer.eigenvector[0].abs().argmax() == 2
    assert float(optimizer.last_estimate.eigenvalues[0]) == pytest.approx(2.0)
    assert optimizer.last_estimate.converged
    assert optimizer.last_estimate.products == (1 if warm_start else 4)


def test_frozen_parameters_and_groups_that_do_not_climb_have_no_part_in_the_vector():
    problem = mlp()
    first, second, *rest = problem.params()
    first.requires_grad_(False)
    groups = [{"params": [first, *rest]}, {"params": [second], "perturb": False}]
    optimizer = fastsam.EigenSAM(groups, torch.optim.SGD, lr=0.1)
    optimizer.update_eigenvector(problem.loss)
    v = optimizer.eigenvector
    assert not v[0].any() and not v[-1].any() and all(x.any() for x in v[1:-1])


def test_a_linear_loss_leaves_the_step_to_sam():
    def run(method, **options):
        w = nn.Parameter(torch.ones(4, dtype=torch.float64))
        optimizer = method([w], torch.optim.SGD, lr=0.1, **options)
        for _ in range(3):
            optimizer.step(lambda: (lambda loss: (loss.backward(), loss)[1])((w * torch.arange(4.0)).sum()))
        return w.detach()

    assert torch.equal(run(fastsam.EigenSAM, freq=1), run(fastsam.SAM))


def test_training_goes_on_after_an_estimate_that_is_not_finite():
    problem, broken = mlp(), []
    optimizer = eigen_sam(problem, freq=2)

    def closure():
        loss = problem.loss() * (float("nan") if broken else 1.0)
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    v = [x.clone() for x in optimizer.eigenvector]
    optimizer.step(closure)
    broken.append(1)
    before = problem.weights()
    with pytest.warns(RuntimeWarning, match="not refreshed"):
        optimizer.step(closure)
    assert torch.equal(problem.weights(), before) and optimizer.found_inf == 1
    assert all(torch.equal(a, b) for a, b in zip(optimizer.eigenvector, v, strict=True))
    with pytest.raises(FloatingPointError):
        optimizer.update_eigenvector(lambda: problem.loss() * float("nan"))
    broken.clear()
    optimizer.step(closure)
    assert not torch.equal(problem.weights(), before)


def test_stale_gradients_are_refused_before_the_estimate():
    problem, calls = mlp(), []
    optimizer = eigen_sam(problem, freq=1)
    optimizer.step(problem.closure)
    problem.closure()
    with pytest.raises(RuntimeError, match="finish"):
        optimizer.step(lambda: calls.append(1))
    assert not calls


@pytest.mark.parametrize("method", WAYS)
@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_a_scaled_loss_does_not_change_the_estimate(scale, method):
    problem = mlp(torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    optimizer = eigen_sam(problem, freq=1, estimate=Estimate(method=method))

    def closure():
        loss = problem.loss()
        scaler.scale(loss).backward()
        return loss

    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            optimizer.step(closure, grad_scaler=scaler)
            scaler.update()
    assert optimizer.last_estimate.products == 5
    truth = float(curvature.top_eigenpairs(problem.loss, problem.model, which="magnitude").eigenvalues[0])
    assert 0.05 < abs(float(optimizer.last_estimate.eigenvalues[0]) / truth) < 20


def test_options_of_the_estimate_out_of_range_are_refused():
    for options in ({"solver": "qr"}, {"products": 0}, {"tolerance": -1.0}, {"method": "magic"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            Estimate(**options)
    with pytest.raises(TypeError, match="Estimate"):
        fastsam.EigenSAM([nn.Parameter(torch.ones(2))], torch.optim.SGD, lr=0.1, estimate="lanczos")


def test_an_eigen_sam_that_was_copied_or_saved_goes_on():
    problem = mlp()
    optimizer = eigen_sam(problem, freq=1)
    for _ in range(2):
        optimizer.step(problem.closure)
    clone = copy.deepcopy(optimizer)
    assert cosine(clone.eigenvector, optimizer.eigenvector) > 1 - 1e-12 and clone.estimate == optimizer.estimate
    fresh = eigen_sam(problem, freq=1)
    fresh.load_state_dict(optimizer.state_dict())
    assert cosine(fresh.eigenvector, optimizer.eigenvector) > 1 - 1e-12


# ---- memory ------------------------------------------------------------------------------------------------

#: A process forked for each kind begins with the modules and has nothing else to count.
SCRIPT = """
import os, sys, torch, fastsam
from fastsam.curvature import hessian_vector_product
from fastsam.methods.eigen import Estimate
fastsam.backends()  # loads them all: their code is no part of the measurement
kinds = iter(sys.argv[1:])
while kind := next(kinds, None):
    if os.fork() == 0:
        break
    assert os.wait()[1] == 0
else:
    sys.exit()
w = [torch.nn.Parameter(torch.full((1 << 21, 3), 0.5)) for _ in range(4)]
loss = lambda: sum((p * p).sum() for p in w)
closure = lambda: (lambda value: (value.backward(), value)[1])(loss())
if kind in ("pass", "product"):
    closure()
    for p in w:
        p.grad = None
    if kind == "product":
        hessian_vector_product(loss, w, [p.detach() for p in w], method="finite-difference")
else:
    optimizer = fastsam.EigenSAM(
        w, torch.optim.SGD, lr=0.1, momentum=0.9, freq=2, estimate=Estimate(products=2, method="finite-difference")
    )
    optimizer.eigenvector = [p.detach() for p in w]
    for _ in range(2 + (kind == "estimate")):
        optimizer.step(closure)
    assert (optimizer.last_estimate is not None) == (kind == "estimate")
print(kind, next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1], flush=True)
"""


def test_finite_differences_need_two_vectors_beyond_a_training_step():
    if not os.path.exists("/proc/self/status"):
        pytest.skip("the peak of a process is read from /proc, which this system does not have")
    gc.collect()
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "1048576"}
    command = [sys.executable, "-c", SCRIPT, "pass", "product", "step", "estimate"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    peak = {kind: int(kib) / 1024 for kind, kib in map(str.split, run.stdout.splitlines())}
    for training, measured in (("pass", "product"), ("step", "estimate")):
        assert 1 < (peak[measured] - peak[training]) / 96 <= 2.2
