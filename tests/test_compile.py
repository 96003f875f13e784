"""Compiled models train, without a recompilation, and a compiled step around the optimizer is never wrong."""

import pytest
import torch
import torch._dynamo
from reference import build_optimizer, find, mlp
from reference.scripted import noise
from torch._dynamo.testing import CompileCounterWithBackend

ALL_METHODS = ["SAM", "ASAM", "F-SAM sigma=0.5 lmbda=0.9", "Eigen-SAM given v"]
FAMILY = ["Momentum-SAM", "GSAM", "LookSAM k=3"]
STEPS = 6
BASE_FOR = {"step": "SGD momentum", "manual": "RMSprop", "accumulate": "AdamW", "perturbed": "AdamW"}


@pytest.fixture(autouse=True)
def a_fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make(method, base, backend):
    problem = mlp(torch.float32)
    optimizer = build_optimizer(method, base, problem.params(), backend)
    if find(method).eigenvector == "given":
        optimizer.eigenvector = [noise(p.shape, 900 + i, p.dtype) * 0.1 for i, p in enumerate(problem.params())]
    return problem, optimizer


def expected_weights(method, base, backend):
    problem, optimizer = make(method, base, backend)
    for _ in range(STEPS):
        problem.next_batch()
        optimizer.step(problem.closure)
    return problem.weights()


@pytest.mark.parametrize(
    ("how", "method"),
    [
        *((how, method) for how in ("step", "manual", "accumulate") for method in ALL_METHODS),
        *(("step", method) for method in FAMILY),
        ("accumulate", "Momentum-SAM"),
    ],
)
def test_a_compiled_model_is_compiled_once(method, how):
    base, backend = BASE_FOR[how], "auto"
    expected = expected_weights(method, base, backend)
    problem, optimizer = make(method, base, backend)
    counter = CompileCounterWithBackend("eager")
    problem.model = torch.compile(problem.model, backend=counter)
    after_two = None
    for k in range(STEPS):
        problem.next_batch()
        if how == "step":
            optimizer.step(problem.closure)
        elif how == "accumulate":
            optimizer.accumulate(problem.closure)
            optimizer.descend(zero_grad=True)
        else:
            for step in (optimizer.first_step, optimizer.second_step):
                problem.closure()
                step(zero_grad=True)
        if k == 1:
            after_two = counter.frame_count
    assert counter.frame_count == after_two == 1
    torch.testing.assert_close(problem.weights(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("how", "method"),
    [
        *((how, method) for how in ("step", "manual", "perturbed") for method in ALL_METHODS),
        *(("step", method) for method in FAMILY),
    ],
)
def test_the_optimizer_inside_a_compiled_step_breaks_the_graph_and_is_right(method, how):
    base, backend = BASE_FOR[how], "auto"
    expected = expected_weights(method, base, backend)
    problem, optimizer = make(method, base, backend)
    counter = CompileCounterWithBackend("eager")

    def train_step(x, y):
        def closure():
            loss = torch.nn.functional.cross_entropy(problem.model(x), y)
            loss.backward()
            return loss

        if how == "step":
            return optimizer.step(closure)
        loss = torch.nn.functional.cross_entropy(problem.model(x), y)
        loss.backward()
        if how == "perturbed":
            with optimizer.perturbed():
                pass
        optimizer.first_step(zero_grad=True)
        torch.nn.functional.cross_entropy(problem.model(x), y).backward()
        optimizer.second_step(zero_grad=True)
        return loss

    compiled, counts = torch.compile(train_step, backend=counter), []
    for _ in range(STEPS):
        problem.next_batch()
        compiled(problem.inputs[problem.batch], problem.targets[problem.batch])
        counts.append(counter.frame_count)
    # perturbed() does not feed F-SAM's average, and so leaves no trace
    torch.testing.assert_close(problem.weights(), expected, rtol=0, atol=1e-6)
    assert counts[1:] == [counts[1]] * (STEPS - 1)


def test_a_methods_own_entry_points_are_left_alone_too():
    """Eigen-SAM overrides second_step: traced, its Python-side count would be a constant of the graph."""
    problem, optimizer = make("Eigen-SAM given v", "SGD", "auto")

    @torch.compile(backend="eager")
    def both(x, y):
        for step in (optimizer.first_step, optimizer.second_step):
            torch.nn.functional.cross_entropy(problem.model(x), y).backward()
            step(zero_grad=True)

    for k in range(4):
        both(problem.inputs[0], problem.targets[0])
        assert optimizer.param_groups[0]["steps"] == k + 1


def test_entry_points_of_every_class_in_between_are_left_alone():
    problem, optimizer = make("SAM", "SGD", "auto")
    counter = CompileCounterWithBackend("eager")

    @torch.compile(backend=counter)
    def train():
        optimizer.accumulate(problem.closure)
        optimizer.descend(zero_grad=True)

    train()
    assert counter.frame_count == 0, "kernels and closures are called, not traced"


def test_gradients_of_a_compiled_backward(backend):
    expected = expected_weights("F-SAM sigma=0.5 lmbda=0.9", "AdamW", backend)
    problem, optimizer = make("F-SAM sigma=0.5 lmbda=0.9", "AdamW", backend)
    problem.model = torch.compile(problem.model, backend="aot_eager")
    for _ in range(STEPS):
        problem.next_batch()
        optimizer.step(problem.closure)
    torch.testing.assert_close(problem.weights(), expected, rtol=0, atol=1e-5)
