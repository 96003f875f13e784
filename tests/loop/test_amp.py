"""GradScaler and low precision in both passes."""

import contextlib

import pytest
import torch
from reference import build_optimizer, find, mlp
from reference.scripted import bits, noise, random_gradients, set_gradients, state_bits

import fastsam

ALL_METHODS = ["SAM", "ASAM", "F-SAM sigma=0.5 lmbda=0.9", "Eigen-SAM given v"]
FAMILY = ["Momentum-SAM", "GSAM", "LookSAM k=3"]
BASES = ["SGD momentum", "AdamW", "RMSprop"]


def a_scaler(scale=1024.0, **options):
    return torch.amp.GradScaler("cpu", init_scale=scale, **options)


def make(method, base, backend):
    problem = mlp(torch.float32)
    optimizer = build_optimizer(method, base, problem.params(), backend)
    if find(method).eigenvector == "given":
        optimizer.eigenvector = [noise(p.shape, 900 + i, p.dtype) * 0.1 for i, p in enumerate(problem.params())]
    return problem, optimizer


def scaled_backward(problem, scaler):
    loss = problem.loss()
    scaler.scale(loss).backward()
    return loss


def manual_step(problem, optimizer, scaler, between=lambda k: None):
    optimizer.zero_grad()
    evaluations = optimizer.evaluations
    if isinstance(optimizer, fastsam.MomentumSAM):
        optimizer.first_step(grad_scaler=scaler)
    for k, step in list(enumerate((optimizer.first_step, optimizer.second_step)))[2 - evaluations :]:
        scaled_backward(problem, scaler)
        between(k)
        step(zero_grad=True, grad_scaler=scaler)
    scaler.update()


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", ALL_METHODS + FAMILY)
def test_a_power_of_two_changes_nothing(backend, method, base):
    """Weights and the average too: m is fed unscaled gradients."""
    (problem, optimizer), (twin_problem, twin) = make(method, base, backend), make(method, base, backend)
    scaler = a_scaler(growth_interval=2)
    for k in range(6):
        if k % 2:
            optimizer.step(lambda: scaled_backward(problem, scaler), grad_scaler=scaler)
            scaler.update()
        else:
            manual_step(problem, optimizer, scaler)
        twin.step(twin_problem.closure)
        problem.next_batch()
        twin_problem.next_batch()
    assert scaler.get_scale() > 1024
    torch.testing.assert_close(problem.weights(), twin_problem.weights(), rtol=0, atol=1e-6)
    for p, q in zip(problem.params(), twin_problem.params(), strict=True):
        for key, value in twin.state[q].items():
            torch.testing.assert_close(optimizer.state[p][key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("overflows", [(0,), (1,), (0, 1)], ids=["pass one", "pass two", "both"])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", ALL_METHODS)
def test_an_overflow_changes_nothing_and_lowers_the_scale(backend, method, base, overflows):
    problem, optimizer = make(method, base, backend)
    scaler = a_scaler()
    manual_step(problem, optimizer, scaler)
    before = bits(problem.params()), state_bits(optimizer, problem.params())

    def spoil(k):
        if k in overflows:
            problem.params()[1].grad[0] = float("inf")

    manual_step(problem, optimizer, scaler, spoil)
    assert (bits(problem.params()), state_bits(optimizer, problem.params())) == before
    assert scaler.get_scale() == 512 and optimizer.found_inf == 1.0
    manual_step(problem, optimizer, scaler)
    assert bits(problem.params()) != before[0] and optimizer.found_inf == 0.0 and scaler.get_scale() == 512


@pytest.mark.parametrize("passes", [(0,), (1,), (0, 1)], ids=["pass one", "pass two", "both"])
@pytest.mark.parametrize("base", BASES)
def test_unscale_before_a_pass_is_not_done_again(backend, base, passes):
    problem, optimizer = make("F-SAM sigma=0.5 lmbda=0.9", base, backend)
    twin_problem, twin = make("F-SAM sigma=0.5 lmbda=0.9", base, backend)
    scaler = a_scaler()
    for _ in range(3):
        manual_step(problem, optimizer, scaler, lambda k: scaler.unscale_(optimizer) if k in passes else None)
        twin.step(twin_problem.closure)
        torch.testing.assert_close(problem.weights(), twin_problem.weights(), rtol=0, atol=1e-6)


def test_unscale_twice_is_refused_and_loses_nothing(backend):
    problem, optimizer = make("SAM", "SGD momentum", backend)
    scaler = a_scaler()
    scaled_backward(problem, scaler)
    scaler.unscale_(optimizer)
    gradients = bits([p.grad for p in problem.params()])
    with pytest.raises(RuntimeError, match="unscale_"):
        scaler.unscale_(optimizer)
    assert bits([p.grad for p in problem.params()]) == gradients
    optimizer.first_step(zero_grad=True, grad_scaler=scaler)
    scaled_backward(problem, scaler)
    optimizer.second_step(grad_scaler=scaler)


def test_an_abandoned_pass_does_not_pass_for_unscaled(backend):
    """unscale_, then an exception: the next step's gradients are scaled, and m must not take them as they are."""
    problem, optimizer = make("F-SAM sigma=0.5 lmbda=0.9", "SGD momentum", backend)
    twin_problem, twin = make("F-SAM sigma=0.5 lmbda=0.9", "SGD momentum", backend)
    scaler = a_scaler()
    scaled_backward(problem, scaler)
    optimizer.first_step(zero_grad=True, grad_scaler=scaler)
    scaled_backward(problem, scaler)
    scaler.unscale_(optimizer)
    optimizer.restore()
    optimizer.zero_grad()
    manual_step(problem, optimizer, scaler)
    twin.step(twin_problem.closure)
    for p, q in zip(problem.params(), twin_problem.params(), strict=True):
        torch.testing.assert_close(optimizer.state[p]["momentum"], twin.state[q]["momentum"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("first", "second"), [(True, False), (False, True)])
def test_one_scaler_in_both_passes(backend, first, second):
    problem, optimizer = make("SAM", "SGD momentum", backend)
    scaler = a_scaler()
    before = bits(problem.params())
    scaled_backward(problem, scaler)
    optimizer.first_step(grad_scaler=scaler if first else None)
    with pytest.raises(RuntimeError, match="same grad_scaler"):
        optimizer.second_step(grad_scaler=scaler if second else None)
    assert bits(problem.params()) == before and state_bits(optimizer, problem.params()) == [{}] * len(before)
    optimizer.zero_grad()
    manual_step(problem, optimizer, scaler)


def test_the_scalers_own_step_is_refused_and_names_the_way(backend):
    problem, optimizer = make("SAM", "SGD momentum", backend)
    scaler = a_scaler()
    before = bits(problem.params())
    scaled_backward(problem, scaler)
    with pytest.raises((RuntimeError, TypeError), match=r"first_step|closure"):
        scaler.step(optimizer)
    assert bits(problem.params()) == before


def test_a_scaler_that_scaled_nothing_or_was_not_updated(backend):
    problem, optimizer = make("SAM", "SGD momentum", backend)
    problem.closure()
    with pytest.raises(RuntimeError, match="scale"):
        optimizer.first_step(grad_scaler=a_scaler())
    optimizer.zero_grad()
    scaler = a_scaler()
    manual_step(problem, optimizer, scaler)
    scaled_backward(problem, scaler)
    optimizer.first_step(zero_grad=True, grad_scaler=scaler)
    scaled_backward(problem, scaler)
    optimizer.second_step(zero_grad=True, grad_scaler=scaler)
    scaled_backward(problem, scaler)
    before = bits(problem.params())
    with pytest.raises(RuntimeError, match="update"):
        optimizer.first_step(grad_scaler=scaler)
    assert bits(problem.params()) == before


def test_a_disabled_scaler_is_no_scaler(backend):
    (problem, optimizer), (twin_problem, twin) = (make("SAM", "AdamW", backend) for _ in range(2))
    manual_step(problem, optimizer, torch.amp.GradScaler("cpu", enabled=False))
    twin.step(twin_problem.closure)
    assert torch.equal(problem.weights(), twin_problem.weights())


def test_a_disabled_scaler_is_no_scaler_in_accumulation(backend):
    (problem, optimizer), (twin_problem, twin) = (make("SAM", "AdamW", backend) for _ in range(2))
    disabled = torch.amp.GradScaler("cpu", enabled=False)
    for _ in range(2):
        optimizer.accumulate(problem.closure, grad_scaler=disabled)
        twin.accumulate(twin_problem.closure)
    optimizer.descend(grad_scaler=disabled)
    twin.descend()
    assert torch.equal(problem.weights(), twin_problem.weights())


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", ALL_METHODS)
def test_pure_bfloat16_weights_train(backend, method, base):
    """Computed in float32 and rounded once: within a few units of bfloat16 of a float32 step on the same gradients."""
    shapes = ((40, 3), (7,))
    low = [torch.nn.Parameter(noise(s, i, torch.bfloat16)) for i, s in enumerate(shapes)]
    high = [torch.nn.Parameter(p.detach().float()) for p in low]
    for params in (low, high):
        optimizer = build_optimizer(method, base, params, backend)
        if find(method).eigenvector == "given":
            optimizer.eigenvector = [noise(p.shape, 900 + i, torch.bfloat16).to(p.dtype) for i, p in enumerate(params)]
        for k in range(4):
            set_gradients(params, [g.to(p.dtype) for g, p in zip(random_gradients(low, k), params, strict=True)])
            optimizer.first_step() if k % 2 == 0 else optimizer.second_step()
    for p, q in zip(low, high, strict=True):
        assert p.dtype == torch.bfloat16
        torch.testing.assert_close(p.float(), q, rtol=0.02, atol=0.02)


def test_autocast_with_bfloat16_needs_no_scaler(backend):
    problem = mlp(torch.float32)
    optimizer = fastsam.FriendlySAM(problem.params(), torch.optim.SGD, lr=0.1, backend=backend)
    first = problem.loss().item()

    def closure():
        with torch.autocast("cpu", torch.bfloat16):
            loss = problem.loss()
        loss.backward()
        return loss

    for _ in range(10):
        optimizer.step(closure)
    assert problem.loss().item() < first
    assert all(p.dtype == torch.float32 for p in problem.params())


def manual(optimizer, closure):
    closure()
    optimizer.first_step(zero_grad=True)
    closure()
    optimizer.second_step(zero_grad=True)


def finished(optimizer, closure):
    closure()
    optimizer.finish(closure)


def accumulated(optimizer, closure):
    for _ in range(2):
        optimizer.accumulate(closure)
    optimizer.descend(zero_grad=True)


def looked_around(optimizer, closure):
    closure()
    with optimizer.perturbed():
        optimizer.zero_grad()
        closure()
    closure()
    optimizer.base_optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("step", [manual, finished, accumulated, looked_around, lambda o, c: o.step(c)])
def test_autocast_around_a_whole_training_is_that_around_each_pass(backend, step):
    """It keeps casts of weights for as long as it lasts, whatever becomes of the weights."""
    ends = []
    for around in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.Tanh(), torch.nn.Linear(64, 5))
        x, y = torch.randn(32, 20), torch.randint(0, 5, (32,))
        optimizer = fastsam.SAM(model.parameters(), torch.optim.SGD, rho=0.5, lr=0.1, backend=backend)

        def closure(model=model, x=x, y=y):
            with torch.autocast("cpu", torch.bfloat16):
                loss = torch.nn.functional.cross_entropy(model(x), y)
            loss.backward()
            return loss

        # Even one that is switched off keeps the casts of those inside it.
        with torch.autocast("cpu", torch.bfloat16) if around else contextlib.nullcontext():
            for _ in range(1 if step is looked_around else 3):
                step(optimizer, closure)
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*ends)


@pytest.mark.parametrize("how", ["closure", "by hand"])
def test_gradients_that_were_unscaled_are_divided_once_where_there_is_no_radius(backend, how):
    """They are those of both halves of such a step."""
    w, scaler = torch.nn.Parameter(torch.ones(3)), a_scaler(8.0)
    optimizer = fastsam.FriendlySAM([w], torch.optim.SGD, rho=0.0, lr=0.1, backend=backend)

    def closure():
        loss = w.square().sum()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        return loss

    if how == "closure":
        optimizer.step(closure, grad_scaler=scaler)
    else:
        closure()
        optimizer.second_step(grad_scaler=scaler)
    torch.testing.assert_close(w.detach(), torch.full((3,), 0.8))
    torch.testing.assert_close(optimizer.state[w]["momentum"], torch.full((3,), 2.0))
