"""Every method in every kind of training loop on real digits, against the same loop written out by hand."""

import copy

import pytest
import torch
from reference.loops import ReferenceEigenSAM, ReferenceFriendlySAM, ReferenceSAM
from torch import nn

import fastsam

pytest.importorskip("sklearn")

STEPS, BATCH, MICRO_BATCHES = 6, 32, 4
METHODS = {
    "SAM": (fastsam.SAM, ReferenceSAM, dict(rho=0.05)),
    "ASAM": (fastsam.SAM, ReferenceSAM, dict(rho=0.5, adaptive=True)),
    "F-SAM": (fastsam.FriendlySAM, ReferenceFriendlySAM, dict(rho=0.05, sigma=0.7, lmbda=0.8)),
    "Eigen-SAM": (fastsam.EigenSAM, ReferenceEigenSAM, dict(rho=0.05, alpha=0.2)),
}
BASES = {
    "SGD": (torch.optim.SGD, dict(lr=0.05, momentum=0.9)),
    "AdamW": (torch.optim.AdamW, dict(lr=0.003, weight_decay=0.05, eps=1e-4)),
    "a third party's": (None, dict(lr=0.003, weight_decay=0.01)),
}


def base_of(name):
    base, options = BASES[name]
    if base is None:
        # its update must not jump with a gradient's sign, as Lion's does: rounding could not be told from a mistake
        base = pytest.importorskip("pytorch_optimizer").AdaBelief
        options = {**options, "eps": 1e-4}
    return base, options


@pytest.fixture(scope="module")
def digits():
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(data.data / 16, dtype=torch.float32)[order]
    return images, torch.tensor(data.target)[order]


def batches(digits):
    images, labels = digits
    for k in range(STEPS):
        part = slice(k * BATCH, (k + 1) * BATCH)
        yield images[part], labels[part]


def a_model():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 10))


def a_vector(params):
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(p.shape, generator=generator) * 0.02 for p in params]


def loss_of(model, x, y, autocast=False):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return nn.functional.cross_entropy(model(x), y)


def train_by_hand(loop, model, digits, kind):
    """Plain torch: loss by loss, pass by pass."""
    for x, y in batches(digits):
        for step in (loop.first_step, loop.second_step):
            loop.zero_grad()
            if kind == "accumulation":
                for xs, ys in zip(x.chunk(MICRO_BATCHES), y.chunk(MICRO_BATCHES), strict=True):
                    (loss_of(model, xs, ys) / MICRO_BATCHES).backward()
            else:
                loss_of(model, x, y, autocast=kind == "bf16 autocast").backward()
            if kind == "clipping" and step == loop.second_step:
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            step()


def train_with_fastsam(optimizer, model, digits, kind):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12) if kind == "GradScaler" else None
    run = torch.compile(model, backend="eager") if kind == "compiled model" else model
    for x, y in batches(digits):

        def closure(x=x, y=y):
            if kind == "accumulation":
                for xs, ys in zip(x.chunk(MICRO_BATCHES), y.chunk(MICRO_BATCHES), strict=True):
                    (loss_of(run, xs, ys) / MICRO_BATCHES).backward()
                return torch.zeros(())
            loss = loss_of(run, x, y, autocast=kind == "bf16 autocast")
            (loss if scaler is None else scaler.scale(loss)).backward()
            return loss

        options = {"max_norm": 0.1} if kind == "clipping" else {}
        optimizer.step(closure, grad_scaler=scaler, **options)
        if scaler is not None:
            scaler.update()


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("kind", ["plain", "GradScaler", "bf16 autocast", "accumulation", "clipping", "compiled model"])
@pytest.mark.parametrize("method", METHODS)
def test_every_loop_agrees_with_the_loop_by_hand(digits, method, kind, base):
    ours, theirs, options = METHODS[method]
    base, base_options = base_of(base)
    model, expected = a_model(), a_model()
    optimizer = ours(model.parameters(), base, **options, **base_options)
    loop = theirs(list(expected.parameters()), base, **options, **base_options)
    if method == "Eigen-SAM":
        optimizer.eigenvector = a_vector(model.parameters())
        loop.eigenvector = a_vector(expected.parameters())
    start = copy.deepcopy(model)
    train_with_fastsam(optimizer, model, digits, kind)
    train_by_hand(loop, expected, digits, kind)
    # half precision rounds weights of slightly different perturbations differently: its unit is 2^-8
    tolerance = 2e-3 if kind == "bf16 autocast" else 2e-5
    for p, q, before in zip(model.parameters(), expected.parameters(), start.parameters(), strict=True):
        moved = (q - before).abs().max()
        assert moved > 0
        torch.testing.assert_close(p, q, rtol=0, atol=tolerance * max(1.0, moved.item()))
    x, y = next(batches(digits))
    assert loss_of(model, x, y) < loss_of(start, x, y)


@pytest.mark.parametrize("method", METHODS)
def test_the_sign_updates_of_lion_train_too(digits, method):
    lion = pytest.importorskip("pytorch_optimizer").Lion
    ours, _, options = METHODS[method]
    model = a_model()
    optimizer = ours(model.parameters(), lion, **options, lr=1e-3)
    x, y = next(batches(digits))
    before = loss_of(model, x, y).item()
    train_with_fastsam(optimizer, model, digits, "plain")
    assert loss_of(model, x, y) < before
