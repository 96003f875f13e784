"""step(closure), finish(closure) and what they refuse."""

import pytest
import torch
from reference import build_optimizer, build_reference, mlp
from reference.scripted import state_bits

METHODS = ["SAM", "F-SAM sigma=0.5 lmbda=0.9", "Eigen-SAM given v"]
BASES = ["SGD momentum", "AdamW", "RMSprop"]


def recording(problem):
    """A closure that notes the loss, the weights and whether it met gradients."""
    calls = []

    def closure():
        loss = problem.loss()
        met_gradients = any(p.grad is not None and p.grad.any() for p in problem.params())
        calls.append((loss.item(), problem.weights(), met_gradients))
        loss.backward()
        return loss

    return closure, calls


def reference_step(loop, problem):
    for step in (loop.first_step, loop.second_step):
        loop.zero_grad()
        problem.closure()
        step()


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", METHODS)
def test_step_evaluates_twice_and_returns_the_first_loss(backend, method, base):
    reference, problem = mlp(), mlp()
    loop = build_reference(method, base, reference.params())
    optimizer = build_optimizer(method, base, problem.params(), backend)
    for _ in range(5):
        closure, calls = recording(problem)
        start = problem.weights()
        loss = optimizer.step(closure)
        assert len(calls) == 2
        assert loss.item() == calls[0][0] != calls[1][0]
        assert torch.equal(calls[0][1], start) and not torch.equal(calls[1][1], start)
        assert [met_gradients for _, _, met_gradients in calls] == [False, False]
        assert all(p.grad is not None for p in problem.params())  # the second ones, as torch leaves them
        reference_step(loop, reference)
        torch.testing.assert_close(problem.weights(), reference.weights(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", METHODS)
def test_a_step_that_does_not_climb_costs_one_evaluation_and_feeds_the_average(backend, method, base):
    """SAM that starts late, or is taken every second step."""
    reference, problem = mlp(), mlp()
    loop = build_reference(method, base, reference.params())
    optimizer = build_optimizer(method, base, problem.params(), backend)
    for k in range(6):
        rho = 0.05 * (k % 2)
        loop.param_groups[0]["rho"] = optimizer.param_groups[0]["rho"] = rho
        closure, calls = recording(problem)
        loss = optimizer.step(closure)
        assert len(calls) == 1 + k % 2 and loss.item() == calls[0][0]
        reference_step(loop, reference)
        torch.testing.assert_close(problem.weights(), reference.weights(), rtol=1e-12, atol=1e-12)


def test_step_enables_gradients_for_the_closure(backend):
    problem = mlp()
    optimizer = build_optimizer("SAM", "SGD", problem.params(), backend)
    start = problem.weights()
    with torch.no_grad():
        optimizer.step(problem.closure)
    assert not torch.equal(problem.weights(), start)


@pytest.mark.parametrize("method", METHODS)
def test_step_after_backward_is_refused_and_names_finish(backend, method):
    problem = mlp()
    optimizer = build_optimizer(method, "SGD momentum", problem.params(), backend)
    optimizer.step(problem.closure)
    before = problem.weights(), state_bits(optimizer, problem.params())
    closure, calls = recording(problem)
    problem.closure()
    gradients = [p.grad.clone() for p in problem.params()]
    with pytest.raises(RuntimeError, match=r"finish\(closure\)"):
        optimizer.step(closure)
    assert not calls
    assert torch.equal(problem.weights(), before[0]) and state_bits(optimizer, problem.params()) == before[1]
    assert all(torch.equal(p.grad, g) for p, g in zip(problem.params(), gradients, strict=True))
    optimizer.finish(closure)
    assert len(calls) == 1


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", METHODS)
def test_finish_takes_the_gradients_at_hand_as_the_first_pass(backend, method, base):
    """loss.backward(); optimizer.finish(closure) is davda54's loss.backward(); optimizer.step(closure)."""
    reference, problem = mlp(), mlp()
    loop = build_reference(method, base, reference.params())
    optimizer = build_optimizer(method, base, problem.params(), backend)
    for _ in range(5):
        closure, calls = recording(problem)
        problem.closure()
        optimizer.finish(closure)
        assert len(calls) == 1 and not calls[0][2]
        assert all(p.grad is None or not p.grad.any() for p in problem.params())
        reference_step(loop, reference)
        torch.testing.assert_close(problem.weights(), reference.weights(), rtol=1e-12, atol=1e-12)


def test_finish_without_gradients_is_refused(backend):
    problem = mlp()
    optimizer = build_optimizer("SAM", "SGD", problem.params(), backend)
    start = problem.weights()
    with pytest.raises(RuntimeError, match="backward"):
        optimizer.finish(problem.closure)
    assert torch.equal(problem.weights(), start)


@pytest.mark.parametrize("call", ["step", "finish"])
def test_a_missing_closure_is_refused(backend, call):
    problem = mlp()
    optimizer = build_optimizer("SAM", "SGD", problem.params(), backend)
    problem.closure()
    start = problem.weights()
    with pytest.raises((TypeError, RuntimeError, ValueError), match="closure"):
        getattr(optimizer, call)()
    assert torch.equal(problem.weights(), start)


def test_a_closure_that_returns_nothing_is_refused(backend):
    problem = mlp()
    optimizer = build_optimizer("F-SAM sigma=0.5 lmbda=0.9", "SGD momentum", problem.params(), backend)
    before = problem.weights(), state_bits(optimizer, problem.params())

    def closure():
        problem.closure()

    with pytest.raises((TypeError, RuntimeError, ValueError), match=r"closure.*return"):
        optimizer.step(closure)
    assert torch.equal(problem.weights(), before[0]) and state_bits(optimizer, problem.params()) == before[1]


@pytest.mark.parametrize("call", ["step", "finish", "accumulate"])
def test_a_step_between_the_passes_is_refused_and_that_step_goes_on(backend, call):
    problem = mlp()
    optimizer = build_optimizer("SAM", "SGD", problem.params(), backend)
    problem.closure()
    optimizer.first_step()
    with pytest.raises(RuntimeError, match="second_step"):
        getattr(optimizer, call)(problem.closure)
    optimizer.zero_grad()
    problem.closure()
    optimizer.second_step()


@pytest.mark.parametrize("first_backward", [False, True], ids=["first pass", "second pass"])
def test_a_closure_that_forgets_backward_is_refused(backend, first_backward):
    problem = mlp()
    optimizer = build_optimizer("F-SAM sigma=0.5 lmbda=0.9", "SGD momentum", problem.params(), backend)
    before = problem.weights(), state_bits(optimizer, problem.params())
    backward = [first_backward, False]

    def closure():
        return problem.closure() if backward.pop(0) else problem.loss()

    with pytest.raises(RuntimeError, match=r"left no gradients.*backward"):
        optimizer.step(closure)
    assert torch.equal(problem.weights(), before[0]) and state_bits(optimizer, problem.params()) == before[1]


@pytest.mark.parametrize("method", ["step", "finish", "accumulate"])
def test_a_step_without_its_closure_says_what_it_needs(backend, method):
    optimizer = build_optimizer("SAM", "SGD", [torch.nn.Parameter(torch.ones(2))], backend)
    with pytest.raises(TypeError, match=rf"{method}\(\) needs a closure.*first_step"):
        getattr(optimizer, method)(None)
