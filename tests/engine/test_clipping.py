"""Clipping inside the second pass is torch's own clipping before the base step."""

import pytest
import torch
from reference import build_optimizer, build_reference, mlp
from reference.scripted import bits, like
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from fastsam import SAM

METHODS = ["SAM", "ASAM", "F-SAM sigma=0.5 lmbda=0.9", "Momentum-SAM"]
BASES = ["SGD momentum", "AdamW", "RMSprop"]
CLIPPERS = {"max_norm": clip_grad_norm_, "clip_value": clip_grad_value_}


@pytest.mark.parametrize("amount", [1e-3, 0.1, 1e6])
@pytest.mark.parametrize("kind", CLIPPERS)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", METHODS)
def test_clipping_is_torchs_own(backend, method, base, kind, amount):
    reference, problem = mlp(), mlp()
    loop = build_reference(method, base, reference.params())
    optimizer = build_optimizer(method, base, problem.params(), backend)
    for _ in range(4):
        optimizer.step(problem.closure, **{kind: amount})
        loop.zero_grad()
        if method != "Momentum-SAM":
            reference.closure()
        loop.first_step()
        loop.zero_grad()
        reference.closure()
        CLIPPERS[kind](reference.params(), amount)
        loop.second_step()
        torch.testing.assert_close(problem.weights(), reference.weights(), rtol=1e-10, atol=1e-11)
        problem.next_batch()
        reference.next_batch()


@pytest.mark.parametrize("kind", CLIPPERS)
def test_torchs_own_function_between_the_passes_keeps_working(backend, kind):
    inside, outside = mlp(), mlp()
    one, other = (build_optimizer("SAM", "SGD momentum", p.params(), backend) for p in (inside, outside))
    one.step(inside.closure, **{kind: 0.01})
    outside.closure()
    other.first_step(zero_grad=True)
    outside.closure()
    CLIPPERS[kind](outside.params(), 0.01)
    other.second_step()
    torch.testing.assert_close(inside.weights(), outside.weights(), rtol=1e-12, atol=1e-13)


def test_finite_gradients_whose_squares_float32_cannot_hold_are_no_overflow(backend):
    p = torch.nn.Parameter(like(torch.zeros(9000), 1))
    before, g = p.detach().clone(), like(p, 2)
    g[[5, 4000, 8999]] *= 1e25
    optimizer = SAM([p], torch.optim.SGD, rho=0.5, lr=0.1, backend=backend)
    p.grad = g.clone()
    optimizer.first_step()
    step = (g.double() / g.double().norm()).float()
    torch.testing.assert_close(p.detach() - before, 0.5 * step, rtol=1e-4, atol=1e-6)
    p.grad = g.clone()
    optimizer.second_step(max_norm=2.0)
    assert optimizer.found_inf == 0
    torch.testing.assert_close(p.detach(), before - 0.1 * 2.0 * step)


def test_the_norm_is_global_over_groups_that_do_not_climb(backend):
    reference, problem = mlp(), mlp()
    first, *rest = problem.params()
    groups = [{"params": [first], "perturb": False}, {"params": rest}]
    optimizer = build_optimizer("SAM", "SGD", groups, backend)
    first, *rest = reference.params()
    loop = build_reference("SAM", "SGD", [{"params": [first], "perturb": False}, {"params": rest}])
    optimizer.step(problem.closure, max_norm=0.05)
    reference.closure()
    loop.first_step()
    loop.zero_grad()
    reference.closure()
    clip_grad_norm_(reference.params(), 0.05)
    loop.second_step()
    torch.testing.assert_close(problem.weights(), reference.weights(), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("options", [
    {"max_norm": -1.0}, {"max_norm": float("nan")}, {"clip_value": -0.5}, {"max_norm": "1"},
    {"max_norm": 1.0, "clip_value": 1.0},
], ids=str)  # fmt: skip
def test_clipping_that_makes_no_sense_is_refused(backend, options):
    problem = mlp()
    optimizer = build_optimizer("SAM", "SGD momentum", problem.params(), backend)
    before = bits(problem.params())
    with pytest.raises(ValueError, match=next(iter(options))):
        optimizer.step(problem.closure, **options)
    assert bits(problem.params()) == before
    optimizer.step(problem.closure)


def test_an_unknown_option_is_refused_and_loses_nothing(backend):
    problem = mlp()
    optimizer = build_optimizer("SAM", "SGD momentum", problem.params(), backend)
    before = bits(problem.params())
    with pytest.raises(TypeError, match="clip_norm"):
        optimizer.step(problem.closure, clip_norm=1.0)
    optimizer.accumulate(problem.closure)
    with pytest.raises(TypeError, match="clip_norm"):
        optimizer.descend(clip_norm=1.0)
    assert bits(problem.params()) == before


@pytest.mark.parametrize("options", [dict(max_norm=-1.0), dict(max_norm=1.0, clip_value=1.0)])
def test_a_refused_clipping_leaves_no_weight_perturbed(options):
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = SAM([parameter], torch.optim.SGD, lr=0.1)
    for step, given in ((optimizer.first_step, {}), (optimizer.second_step, options)):
        parameter.grad = torch.ones(3)
        if given:
            with pytest.raises(ValueError, match="max_norm"):
                step(**given)
        else:
            step()
    assert torch.equal(parameter, torch.ones(3))
