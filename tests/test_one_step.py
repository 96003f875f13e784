"""Whoever holds the optimizer holds the same step: groups, state and flags are one, whatever anybody does to either."""

import collections
import copy
import warnings

import pytest
import torch
from reference import mlp
from reference.scripted import state_bits
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import fastsam
from fastsam.loop.frozen import Frozen

BASES = {"SGD": dict(lr=0.1, momentum=0.9), "AdamW": dict(lr=0.01), "RMSprop": dict(lr=0.01)}


@pytest.fixture(params=BASES)
def base(request):
    return request.param


def build(problem, base="SGD", cls=fastsam.SAM, backend="auto", **changes):
    return cls(problem.params(), getattr(torch.optim, base), **{**BASES[base], "backend": backend, **changes})


# ---- groups and state ----------------------------------------------------------------------------------------


def moved_by_a_step(problem, optimizer):
    before = problem.weights()
    optimizer.step(problem.closure)
    return not torch.equal(problem.weights(), before)


@pytest.mark.parametrize("holder", ["wrapper", "base"])
def test_groups_assigned_to_either_are_the_groups_of_both(backend, base, holder):
    problem = mlp()
    optimizer = build(problem, base, backend=backend)
    assert moved_by_a_step(problem, optimizer)
    target = optimizer if holder == "wrapper" else optimizer.base_optimizer
    target.param_groups = [{**optimizer.param_groups[0], "lr": 0.0}]
    assert optimizer.param_groups is optimizer.base_optimizer.param_groups
    assert not moved_by_a_step(problem, optimizer)


def test_assigned_groups_without_the_methods_hyper_parameters_get_the_defaults(backend):
    problem = mlp()
    optimizer = build(problem, cls=fastsam.FriendlySAM, backend=backend, rho=0.3, sigma=0.7)
    plain = torch.optim.SGD(problem.params(), lr=0.1, momentum=0.9).param_groups
    optimizer.param_groups = plain
    assert moved_by_a_step(problem, optimizer)
    assert {k: optimizer.param_groups[0][k] for k in ("rho", "sigma", "lmbda", "perturb")} == {
        "rho": 0.3,
        "sigma": 0.7,
        "lmbda": 0.9,
        "perturb": True,
    }


@pytest.mark.parametrize("holder", ["wrapper", "base"])
def test_a_state_that_is_reset_on_either_is_reset_for_both(backend, base, holder):
    problem = mlp()
    optimizer = build(problem, base, backend=backend)
    for _ in range(3):
        optimizer.step(problem.closure)
    fresh = copy.deepcopy(problem)
    (optimizer if holder == "wrapper" else optimizer.base_optimizer).state = {}
    optimizer.step(problem.closure)
    other = build(fresh, base, backend=backend)
    other.step(fresh.closure)
    assert torch.equal(problem.weights(), fresh.weights())
    assert state_bits(optimizer, problem.params()) == state_bits(other, fresh.params())


def test_a_state_dict_loaded_into_the_base_holds_for_the_wrapper(backend):
    trained, problem = mlp(), mlp()
    donor = torch.optim.SGD(trained.params(), lr=0.0, momentum=0.9)
    trained.closure()
    donor.step()
    optimizer = build(problem, backend=backend, rho=0.3)
    optimizer.base_optimizer.load_state_dict(donor.state_dict())
    assert len(optimizer.state) == len(problem.params()) and optimizer.param_groups[0]["rho"] == 0.3
    assert not moved_by_a_step(problem, optimizer)


def test_a_group_added_to_the_base_is_climbed_with_the_defaults(backend):
    problem, extra = mlp(), nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = build(problem, backend=backend, rho=0.3)
    optimizer.base_optimizer.add_param_group({"params": [extra]})
    seen = []

    def closure():
        seen.append(extra.detach().clone())
        loss = problem.loss() + extra.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert optimizer.param_groups[1]["rho"] == 0.3 and not torch.equal(*seen)


def test_torchs_own_setstate_sets_both(backend):
    problem = mlp()
    optimizer = build(problem, backend=backend)
    optimizer.__setstate__({"state": collections.defaultdict(dict), "param_groups": optimizer.param_groups})
    assert moved_by_a_step(problem, optimizer) and optimizer.state is optimizer.base_optimizer.state


@pytest.mark.parametrize(
    ("assign", "error", "message"),
    [
        (lambda o: setattr(o, "param_groups", {"params": []}), TypeError, "list of dicts"),
        (lambda o: setattr(o, "param_groups", [{"lr": 0.1}]), TypeError, "group 0.*'params'"),
        (lambda o: setattr(o, "param_groups", [{"params": ["weight"]}]), TypeError, "group 0.*'params'"),
        (lambda o: setattr(o, "param_groups", o.param_groups * 2), ValueError, "twice"),
        (lambda o: setattr(o, "state", {nn.Parameter(torch.ones(7)): {}}), ValueError, r"\(7,\).*another optimizer's"),
        (lambda o: setattr(o, "state", [1]), TypeError, "state=list"),
    ],
)
def test_what_cannot_be_groups_or_a_state_is_refused_before_a_weight_changes(assign, error, message):
    problem = mlp()
    optimizer = build(problem)
    optimizer.step(problem.closure)
    before = problem.weights(), state_bits(optimizer, problem.params())
    with pytest.raises(error, match=message):
        assign(optimizer)
    assert torch.equal(problem.weights(), before[0]) and state_bits(optimizer, problem.params()) == before[1]


def test_bases_that_cannot_be_wrapped_are_refused():
    params = mlp().params()
    with pytest.raises(TypeError, match="SAM takes two passes itself"):
        fastsam.SAM(params, fastsam.SAM, lr=0.1)
    with pytest.raises(TypeError, match=r"made a list.*torch.optim.Optimizer"):
        fastsam.SAM(params, lambda groups: list(groups))


def test_copied_attributes_are_another_handle_of_the_same_step(backend):
    """As frameworks do: a class of their own that takes over the optimizer's attributes."""
    problem = mlp()
    optimizer = build(problem, backend=backend, lr=0.0)
    handle = object.__new__(type("Handle", (fastsam.SAM,), {}))
    handle.__dict__ = {k: v for k, v in optimizer.__dict__.items() if k != "step"}
    before = problem.weights()
    problem.closure()
    handle.first_step(zero_grad=True)
    for each in (optimizer, handle):
        with pytest.raises(RuntimeError, match="perturbed"):
            each.state_dict()
    problem.closure()
    optimizer.second_step(zero_grad=True)
    assert torch.equal(problem.weights(), before)
    handle.state_dict()
    handle.param_groups[0]["lr"] = 0.1
    assert optimizer.param_groups[0]["lr"] == 0.1


# ---- hooks ---------------------------------------------------------------------------------------------------


def by_closure(problem, optimizer):
    optimizer.step(problem.closure)


def by_hand(problem, optimizer):
    for half in (optimizer.first_step, optimizer.second_step):
        optimizer.zero_grad()
        problem.closure()
        half()


def by_finish(problem, optimizer):
    optimizer.zero_grad()
    problem.closure()
    optimizer.finish(problem.closure)


def by_micro_batches(problem, optimizer):
    optimizer.zero_grad()
    optimizer.accumulate(problem.closure)
    optimizer.accumulate(problem.closure)
    optimizer.descend()


FORMS = [by_closure, by_hand, by_finish, by_micro_batches]


@pytest.mark.parametrize("form", FORMS)
def test_every_hook_runs_once_a_step_in_every_form(backend, base, form):
    problem, plain = mlp(), mlp()
    optimizer, other = build(problem, base, backend=backend), build(plain, base, backend=backend)
    calls = []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: calls.append("global before")),
        register_optimizer_step_post_hook(lambda *_: calls.append("global after")),
    ]
    for name, target in (("wrapper", optimizer), ("base", optimizer.base_optimizer)):
        handles.append(target.register_step_pre_hook(lambda *_, name=name: calls.append(f"{name} before")))
        handles.append(target.register_step_post_hook(lambda *_, name=name: calls.append(f"{name} after")))
    form(problem, optimizer)
    for handle in handles:
        handle.remove()
    expected = [f"{name} {when}" for name in ("base", "global", "wrapper") for when in ("after", "before")]
    assert sorted(calls) == expected
    form(plain, other)
    torch.testing.assert_close(problem.weights(), plain.weights(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_a_hook_before_the_step_sees_the_weights_that_are_updated(backend, form):
    problem = mlp()
    optimizer = build(problem, backend=backend)
    before, seen = problem.weights(), []
    optimizer.register_step_pre_hook(lambda *_: seen.append((problem.weights(), problem.params()[0].grad is not None)))
    form(problem, optimizer)
    assert torch.equal(seen[0][0], before) and seen[0][1]


def test_a_hook_that_raises_before_the_step_changes_nothing(backend):
    problem = mlp()
    optimizer = build(problem, backend=backend)
    before = problem.weights()

    def hook(*_):
        raise KeyError("from a hook")

    optimizer.register_step_pre_hook(hook)
    with pytest.raises(KeyError):
        optimizer.step(problem.closure)
    assert torch.equal(problem.weights(), before) and not optimizer.state
    optimizer.restore()  # a no-op


# ---- what else users do --------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [fastsam.SAM, fastsam.FriendlySAM, fastsam.EigenSAM])
@pytest.mark.parametrize("adaptive", [False, True])
def test_maximising_climbs_the_other_way(backend, base, cls, adaptive):
    problems = [mlp(), mlp()]
    plain, turned = (
        build(p, base, cls, backend, adaptive=adaptive, rho=0.5, maximize=m)
        for p, m in zip(problems, (False, True), strict=True)
    )
    if cls is fastsam.EigenSAM:
        plain.eigenvector = [torch.ones_like(p) for p in problems[0].params()]
        turned.eigenvector = plain.eigenvector

    def minus():
        loss = -problems[1].loss()
        loss.backward()
        return loss

    for _ in range(4):
        plain.step(problems[0].closure)
        turned.step(minus)
        torch.testing.assert_close(problems[0].weights(), problems[1].weights(), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("how", ["replaced", "removed", "added"])
def test_surgery_between_the_passes_is_refused_and_the_weights_are_back(backend, how):
    p = nn.Parameter(torch.randn(4, 3, dtype=torch.float64))
    q = nn.Parameter(torch.randn(2, dtype=torch.float64))
    optimizer = fastsam.SAM([p, q], torch.optim.SGD, rho=0.5, lr=0.1, backend=backend)
    before = p.detach().clone(), q.detach().clone()

    def backward():
        optimizer.zero_grad()
        (p.square().sum() + q.square().sum()).backward()

    backward()
    optimizer.first_step()
    backward()
    params, new = optimizer.param_groups[0]["params"], nn.Parameter(torch.cat([p.detach(), p.detach()]))
    new.grad = torch.ones_like(new)
    {"replaced": lambda: params.__setitem__(0, new), "removed": params.pop, "added": lambda: params.append(new)}[how]()
    with pytest.raises(RuntimeError, match="changed between first_step"):
        optimizer.second_step()
    assert torch.equal(p, before[0]) and torch.equal(q, before[1]) and not optimizer.state


def test_buffers_made_in_inference_mode_serve_training(backend):
    problem, plain = mlp(), mlp()
    optimizer, other = build(problem, backend=backend), build(plain, backend=backend)
    problem.closure()
    before = problem.weights()
    with torch.inference_mode(), optimizer.perturbed():
        assert not torch.equal(problem.weights(), before)
    assert torch.equal(problem.weights(), before)
    optimizer.zero_grad()
    for _ in range(3):
        optimizer.step(problem.closure)
        other.step(plain.closure)
    assert torch.equal(problem.weights(), plain.weights())


def test_the_last_gradients_are_left_and_known_again_in_the_next_step(backend, base):
    problem = mlp()
    optimizer = build(problem, base, backend=backend)
    second = []

    def closure():
        loss = problem.closure()
        second[:] = [p.grad.clone() for p in problem.params()]
        return loss

    for _ in range(3):
        optimizer.step(closure)
        assert all(torch.equal(p.grad, g) for p, g in zip(problem.params(), second, strict=True))
    build(problem, base, backend=backend).step(problem.closure)  # another optimizer knows them, too
    problem.closure()  # but what is added to them is the caller's
    with pytest.raises(RuntimeError, match="gradients that it did not compute"):
        optimizer.step(problem.closure)


def test_micro_batches_begin_without_the_gradients_that_a_step_left(backend):
    problem, plain = mlp(), mlp()
    optimizer, other = build(problem, backend=backend), build(plain, backend=backend)
    for each, p in ((optimizer, problem), (other, plain)):
        each.step(p.closure)
    other.zero_grad()
    for each, p in ((optimizer, problem), (other, plain)):
        each.accumulate(p.closure)
        each.descend()
    assert torch.equal(problem.weights(), plain.weights())


@pytest.mark.parametrize("again", [True, False])
def test_a_second_backward_through_the_first_graph_is_told(backend, again):
    layer, x, y = nn.Linear(5, 3), torch.randn(8, 5), torch.randint(0, 3, (8,))
    optimizer = fastsam.SAM(layer.parameters(), torch.optim.SGD, lr=0.1, backend=backend)
    loss = nn.functional.cross_entropy(layer(x), y)
    loss.backward(retain_graph=again)
    optimizer.first_step(zero_grad=True)
    (loss if again else nn.functional.cross_entropy(layer(x), y)).backward()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        optimizer.second_step()
    assert any("the second gradient is the first one" in str(w.message) for w in told) == again


class MomentumEncoder(nn.Module):
    """A frozen copy of a layer, which every forward pass moves towards it."""

    def __init__(self, by_new_memory):
        super().__init__()
        self.query, self.key = nn.Linear(4, 4), nn.Linear(4, 4).requires_grad_(False)
        self.by_new_memory = by_new_memory

    def forward(self, x):
        with torch.no_grad():
            for k, q in zip(self.key.parameters(), self.query.parameters(), strict=True):
                if self.by_new_memory:
                    k.data = k.data * 0.9 + q.data * 0.1
                else:
                    k.mul_(0.9).add_(q, alpha=0.1)
        return (self.query(x) - self.key(x)).square().mean()


@pytest.mark.parametrize("by_new_memory", [False, True])
def test_what_forward_makes_of_frozen_weights_counts_once_a_step(backend, by_new_memory):
    model, x = MomentumEncoder(by_new_memory), torch.randn(8, 4)
    optimizer = fastsam.SAM(model.query.parameters(), torch.optim.SGD, rho=0.5, lr=0.1, backend=backend)
    expected = model.key.weight * 0.9 + model.query.weight.detach() * 0.1

    def closure():
        loss = model(x)
        loss.backward()
        return loss

    optimizer.step(closure, model=model)
    torch.testing.assert_close(model.key.weight, expected)


@pytest.mark.parametrize("by_new_memory", [False, True])
def test_an_estimate_puts_back_what_forward_makes_of_frozen_weights(by_new_memory):
    model, x = MomentumEncoder(by_new_memory), torch.randn(8, 4)
    optimizer = fastsam.EigenSAM(model.query.parameters(), torch.optim.SGD, lr=0.1)
    before = model.key.weight.detach().clone()
    with Frozen(model.query.parameters(), model):
        model(x)
    assert torch.equal(model.key.weight, before)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer.update_eigenvector(lambda: model(x))
    assert torch.equal(model.key.weight, before)
