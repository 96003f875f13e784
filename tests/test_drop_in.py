"""A wrapper that schedulers, hooks and training loops can treat as the base optimizer itself."""

import warnings

import pytest
import torch
from reference import build_optimizer, build_reference, mlp
from reference.scripted import bits, copies, make_scripted, noise, random_gradients, scripted_steps, set_gradients
from torch.optim import lr_scheduler

from fastsam import SAM, EigenSAM, FriendlySAM

SOME_METHODS = ["SAM", "ASAM", "F-SAM sigma=0.5 lmbda=0.9", "Eigen-SAM given v"]
SOME_BASES = ["SGD momentum", "AdamW", "RMSprop"]

SCHEDULERS = {
    "StepLR": lambda optimizer: lr_scheduler.StepLR(optimizer, 3, 0.5),
    "CosineAnnealingLR": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 12),
    "OneCycleLR": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=12),
}


def train_with_scheduler(optimizer, scheduled, scheduler, problem, by_closure):
    scheduler = SCHEDULERS[scheduler](scheduled)
    rates = []
    for _ in range(12):
        if by_closure:
            optimizer.step(problem.closure)
        else:
            for step in (optimizer.first_step, optimizer.second_step):
                optimizer.zero_grad()
                problem.closure()
                step()
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step()
    return rates


@pytest.mark.parametrize("by_closure", [True, False], ids=["step(closure)", "two steps"])
@pytest.mark.parametrize("on", ["wrapper", "base optimizer"])
@pytest.mark.parametrize("base", SOME_BASES)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_schedulers_drive_the_step_without_a_warning(backend, scheduler, base, on, by_closure):
    reference, problem = mlp(), mlp()
    loop = build_reference("SAM", base, reference.params())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = build_optimizer("SAM", base, problem.params(), backend)
        expected = train_with_scheduler(loop, loop.base_optimizer, scheduler, reference, by_closure=False)
        scheduled = optimizer if on == "wrapper" else optimizer.base_optimizer
        actual = train_with_scheduler(optimizer, scheduled, scheduler, problem, by_closure)
    assert actual == expected and len(set(actual)) > 1
    torch.testing.assert_close(problem.weights(), reference.weights(), rtol=1e-11, atol=1e-11)


class HeavyBall(torch.optim.Optimizer):
    """An optimizer whose state has the name of F-SAM's average."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
            p.sub_(momentum.mul_(0.9).add_(p.grad), alpha=self.param_groups[0]["lr"])


def test_a_base_optimizer_may_call_its_state_as_the_method_does(backend):
    plain, perturbed = mlp(), mlp()
    base = HeavyBall(plain.params(), lr=0.05)
    optimizer = FriendlySAM(perturbed.params(), HeavyBall, rho=0.0, lr=0.05, backend=backend)
    for k in range(6):
        base.zero_grad()
        plain.closure()
        base.step()
        optimizer.step(perturbed.closure)
        if k == 2:
            saved = optimizer.state_dict()
            optimizer = FriendlySAM(perturbed.params(), HeavyBall, rho=0.0, lr=0.05, backend=backend)
            optimizer.load_state_dict(saved)
    torch.testing.assert_close(perturbed.weights(), plain.weights(), rtol=1e-13, atol=1e-13)
    p = perturbed.params()[0]
    assert not torch.equal(optimizer.state[p]["momentum"], optimizer.state[p]["base_momentum"])


class Centered(torch.optim.RMSprop):
    def __init__(self, params, **kwargs):
        super().__init__(params, centered=True, **kwargs)


@pytest.mark.parametrize("base", [torch.optim.RMSprop, Centered])
def test_a_hyper_parameter_that_base_and_method_name_alike_is_two(base):
    optimizer = EigenSAM(mlp().params(), base, alpha=0.3, lr=0.1)
    (group,) = optimizer.param_groups
    assert (group["alpha"], group["sam_alpha"]) == (0.99, 0.3)


class Decaying(torch.optim.SGD):
    """An optimizer that counts its steps beside the parameters' state."""

    def step(self, closure=None):
        self.state["steps"] = self.state.get("steps", 0) + 1
        return super().step(closure)


@pytest.mark.parametrize("method", ["SAM", "F-SAM sigma=0.5 lmbda=0.9"])
def test_a_base_optimizer_may_keep_state_beside_the_parameters(backend, method):
    problem = mlp()
    optimizer = {"SAM": SAM}.get(method, FriendlySAM)(problem.params(), Decaying, lr=0.05, backend=backend)
    for k in range(1, 4):
        optimizer.step(problem.closure)
        optimizer.load_state_dict(optimizer.state_dict())
        assert optimizer.state["steps"] == k


@pytest.mark.parametrize("base", SOME_BASES)
def test_groups_and_state_are_shared_with_the_base_optimizer(backend, base):
    params, optimizer = make_scripted("F-SAM sigma=0.5 lmbda=0.9", base, backend)
    scripted_steps(optimizer, params, [random_gradients(params, k) for k in range(2)])
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert isinstance(optimizer.base_optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups is optimizer.base_optimizer.param_groups
    assert optimizer.state is optimizer.base_optimizer.state
    group = optimizer.param_groups[0]
    assert group["rho"] == 0.05 and group["sigma"] == 0.5 and group["lmbda"] == 0.9 and group["lr"] > 0
    for p in params:
        assert optimizer.state[p]["momentum"].shape == p.shape
        assert optimizer.state[p]["momentum"].dtype == p.dtype


@pytest.mark.parametrize("base", SOME_BASES)
def test_step_hooks_of_both_optimizers_run_once_a_step(backend, base):
    params, optimizer = make_scripted("SAM", base, backend)
    calls = []
    for name, target in (("wrapper", optimizer), ("base", optimizer.base_optimizer)):
        target.register_step_pre_hook(lambda *_, name=name: calls.append(f"{name} before"))
        target.register_step_post_hook(lambda *_, name=name: calls.append(f"{name} after"))
    gradients = random_gradients(params, 0)

    def closure():
        set_gradients(params, copies(gradients))
        return torch.zeros(())

    optimizer.step(closure)
    assert sorted(calls) == ["base after", "base before", "wrapper after", "wrapper before"]


def test_hyper_parameters_can_change_between_steps(backend):
    records = []
    for build, extra in ((build_optimizer, (backend,)), (build_reference, ())):
        params = [torch.nn.Parameter(noise((6, 5), 1))]
        optimizer = build("F-SAM sigma=0.5 lmbda=0.9", "SGD momentum", params, *extra)
        group, seen = optimizer.param_groups[0], []
        changes = ({}, {"rho": 0.5, "sigma": 0.9}, {"lmbda": 0.2, "lr": 1.0}, {"momentum": 0.1})
        for k, change in enumerate(changes):
            group.update(change)
            seen += scripted_steps(optimizer, params, [random_gradients(params, 10 * k + j) for j in (0, 1)])
        records.append(seen)
    for one, other in zip(*records, strict=True):
        torch.testing.assert_close(one[0], other[0], rtol=1e-12, atol=1e-12)


def test_gradients_are_read_but_not_written(backend):
    for method in SOME_METHODS:
        params, optimizer = make_scripted(method, "SGD momentum", backend)
        for step in (optimizer.first_step, optimizer.second_step):
            gradients = random_gradients(params, 3)
            set_gradients(params, copies(gradients))
            step()
            assert bits([p.grad for p in params]) == bits(gradients)


def test_param_data_is_never_bound_anew(backend):
    params, optimizer = make_scripted("F-SAM sigma=0.5 lmbda=0.9", "RMSprop", backend)
    addresses = [p.data_ptr() for p in params]
    for step in (optimizer.first_step, optimizer.second_step) * 2:
        set_gradients(params, random_gradients(params, 3))
        step()
        assert [p.data_ptr() for p in params] == addresses


def test_zero_grad_argument_clears_the_gradients(backend):
    params, optimizer = make_scripted("SAM", "SGD", backend)
    for step in (optimizer.first_step, optimizer.second_step):
        set_gradients(params, random_gradients(params, 3))
        step(zero_grad=True)
        assert all(p.grad is None or not p.grad.any() for p in params)


def test_two_optimizers_side_by_side_do_not_disturb_each_other(backend):
    alone = [make_scripted("F-SAM sigma=0.5 lmbda=0.9", "SGD momentum", backend) for _ in range(2)]
    params, optimizer = make_scripted("F-SAM sigma=0.5 lmbda=0.9", "SGD momentum", backend)
    passes = [random_gradients(params, k) for k in range(4)]
    expected = bits(scripted_steps(optimizer, params, passes)[-1])
    for first, second in zip(passes[::2], passes[1::2], strict=True):
        for gradients, name in ((first, "first_step"), (second, "second_step")):
            for one_params, one in alone:
                set_gradients(one_params, copies(gradients))
                getattr(one, name)()
    assert bits(alone[0][0]) == bits(alone[1][0]) == expected


@pytest.mark.parametrize("passes", [1, 2], ids=["within a step", "after it"])
def test_backward_through_a_graph_from_before_a_pass_is_torchs_error(backend, passes):
    problem = mlp()
    optimizer = build_optimizer("SAM", "SGD momentum", problem.params(), backend)
    loss = problem.loss()
    for step in (optimizer.first_step, optimizer.second_step)[:passes]:
        problem.closure()
        step(zero_grad=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("method", ["SAM", "Eigen-SAM own v"])
@pytest.mark.parametrize("base", ["SGD momentum", "AdamW"])
def test_torchs_default_device_is_not_asked(backend, method, base):
    problem, expected = mlp(), mlp()
    for each in (problem, expected):
        optimizer = build_optimizer(method, base, each.params(), backend, **({} if method == "SAM" else {"freq": 2}))
        torch.manual_seed(0)
        with torch.device("meta" if each is problem else "cpu"):  # a GPU would be found where it is not looked for
            for _ in range(3):
                optimizer.step(each.closure)
        assert optimizer.found_inf.device.type == "cpu"
    assert torch.equal(problem.weights(), expected.weights())
