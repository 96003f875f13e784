"""Steps in float64 end where the authors' loops end: two hundred of a small network, sixty of one with batch norm."""

import functools
import os

import pytest
import torch
from reference import BASES, METHODS, build_optimizer, build_reference, convnet, mlp
from reference.table import PlainSubclass

import fastsam

PROBLEMS = {"mlp": (mlp, 200), "convnet": (convnet, 60)}

CASES = (
    [(method, base, "mlp") for method in METHODS for base in ("SGD momentum", "AdamW")]
    + [
        (method, base, "mlp")
        for method in ("SAM", "F-SAM sigma=0.5 lmbda=0.9", "Eigen-SAM given v")
        for base in BASES
        if base not in ("SGD momentum", "AdamW")
    ]
    + [
        (method, base, "convnet")
        for method in ("ASAM", "F-SAM sigma=1.0 lmbda=0.9", "Eigen-SAM own v")
        for base in ("SGD momentum", "AdamW")
    ]
)


def train(optimizer, problem, eigenvector, steps):
    """Run the two-pass loop; return the weights after every tenth step, one row each."""
    if eigenvector == "given":
        generator = torch.Generator().manual_seed(3)
        v = [torch.randn(p.shape, dtype=p.dtype, generator=generator) for p in problem.params()]
        # longer than a unit vector: the authors' formula takes v as it is
        length = torch.cat([x.reshape(-1) for x in v]).norm() / 1.5
        optimizer.eigenvector = [x / length for x in v]
    rows = []
    for step in range(steps):
        problem.next_batch()
        if eigenvector == "own" and optimizer.eigenvector_due():
            torch.manual_seed(step)
            optimizer.update_eigenvector(problem.loss, problem.model)
        optimizer.zero_grad()
        problem.closure()
        optimizer.first_step()
        optimizer.zero_grad()
        problem.closure()
        optimizer.second_step()
        if step % 10 == 9:
            rows.append(problem.weights())
    return torch.stack(rows)


@functools.cache
def reference_trajectory(method, base, problem_name):
    kind, steps = PROBLEMS[problem_name]
    problem = kind()
    return train(build_reference(method, base, problem.params()), problem, METHODS[method].eigenvector, steps)


@pytest.mark.parametrize(("method", "base", "problem_name"), CASES, ids=lambda value: value.replace(" ", "-"))
def test_trajectory_equals_the_authors_loop(method, base, problem_name, backend):
    expected = reference_trajectory(method, base, problem_name)
    kind, steps = PROBLEMS[problem_name]
    problem = kind()
    start = problem.weights()
    optimizer = build_optimizer(method, base, problem.params(), backend)
    actual = train(optimizer, problem, METHODS[method].eigenvector, steps)
    assert (expected[-1] - start).abs().max() > 1e-2, "the problem does not move: it would test nothing"
    assert (actual - expected).abs().max() <= 1e-10 * expected.abs().max()


@pytest.mark.parametrize("method", ["SAM", "F-SAM sigma=1.0 lmbda=0.9", "Eigen-SAM given v"])
def test_groups_keep_their_own_hyper_parameters_but_share_one_norm(method, backend):
    def groups(problem):
        first, second, *rest = problem.params()
        return [
            {"params": [first], "rho": 0.2, "lr": 0.01},
            {"params": [second], "perturb": False, "weight_decay": 0.0},
            {"params": rest, "adaptive": True, "sigma": 0.3, "lmbda": 0.7, "alpha": 0.4, "momentum": 0.5},
        ]

    reference, problem = mlp(), mlp()
    eigenvector = METHODS[method].eigenvector
    expected = train(build_reference(method, "SGD momentum", groups(reference)), reference, eigenvector, 50)
    optimizer = build_optimizer(method, "SGD momentum", groups(problem), backend)
    actual = train(optimizer, problem, eigenvector, 50)
    assert (actual - expected).abs().max() <= 1e-10 * expected.abs().max()


def test_the_methods_differ_from_each_other():
    ends = [reference_trajectory(method, "SGD momentum", "mlp")[-1] for method in METHODS]
    for i, one in enumerate(ends):
        assert all((one - other).abs().max() > 1e-8 for other in ends[:i])


def test_update_eigenvector_runs_in_eval_mode_and_leaves_the_model_as_it_was(backend):
    problem = convnet()
    optimizer = build_optimizer("Eigen-SAM own v", "SGD momentum", problem.params(), backend)
    modes, buffers = [], {name: b.clone() for name, b in problem.model.named_buffers()}
    weights = problem.weights()

    def loss_fn():
        modes.append(problem.model.training)
        return problem.loss()

    optimizer.update_eigenvector(loss_fn, problem.model)
    assert modes and not any(modes)
    assert all(module.training for module in problem.model.modules())
    assert all(torch.equal(b, buffers[name]) for name, b in problem.model.named_buffers())
    assert torch.equal(problem.weights(), weights)
    assert all(p.grad is None for p in problem.params())
    assert abs(sum(v.square().sum() for v in optimizer.eigenvector).item() - 1) < 1e-9


def test_the_eigenvector_is_due_every_freq_steps_but_not_at_step_zero(backend):
    problem = mlp()
    optimizer = build_optimizer("Eigen-SAM own v", "SGD momentum", problem.params(), backend, freq=3)
    due = []
    for _ in range(7):
        due.append(optimizer.eigenvector_due())
        optimizer.step(problem.closure)
    assert due == [False, False, False, True, False, False, True]
    assert [optimizer.eigenvector_due(step) for step in (0, 1, 3, 4, 6)] == [False, False, True, False, True]


def test_power_iteration_finds_the_leading_eigenvector(backend):
    hessian = torch.diag(torch.tensor([1.0, -9.0, 2.0, 0.5], dtype=torch.float64))
    w = torch.nn.Parameter(torch.ones(4, dtype=torch.float64))
    optimizer = fastsam.EigenSAM([w], torch.optim.SGD, lr=0.1, backend=backend)
    torch.manual_seed(0)
    for _ in range(4):  # each call goes on from the previous vector
        optimizer.update_eigenvector(lambda: 0.5 * w @ hessian @ w)
    assert optimizer.eigenvector[0].abs().allclose(torch.eye(4, dtype=torch.float64)[1], atol=1e-8)


def test_a_subclass_of_a_base_optimizer_runs_its_own_step(backend):
    problem = mlp()
    optimizer = build_optimizer("SAM", "SGD subclass", problem.params(), backend)
    before = PlainSubclass.calls
    optimizer.step(problem.closure)
    assert PlainSubclass.calls == before + 1


def test_the_cpu_backend_is_there_where_the_build_must_have_made_it():
    if os.environ.get("FASTSAM_REQUIRE_CPU") != "1":
        pytest.skip("FASTSAM_REQUIRE_CPU is not 1: a machine without a compiler has no cpu backend")
    assert fastsam.backends()["cpu"] == "available"
