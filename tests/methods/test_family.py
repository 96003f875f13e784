"""The methods beside SAM, F-SAM and Eigen-SAM: their formulas, what a step costs, and what they must not touch."""

import copy
import math

import pytest
import torch
from reference import ReferenceSAM, mlp, take_step
from reference.family import FAMILY
from reference.scripted import state_bits

import fastsam

BASES = {
    "SGD": dict(lr=0.05, momentum=0.9, weight_decay=1e-3),
    "AdamW": dict(lr=3e-3, weight_decay=0.01),
    "RMSprop": dict(lr=1e-3, momentum=0.5),
}
ONE_OF_EACH = ["Momentum-SAM", "VaSSO", "GSAM", "Stable SAM", "WSAM", "LookSAM k=3"]
TWO_SIDED = ["GSAM", "Stable SAM", "WSAM", "WSAM coupled", "LookSAM k=3"]


def build(name, problem, base="SGD", backend="torch", **changes):
    method = FAMILY[name]
    settings = {**method.kwargs, **BASES[base], **changes}
    return getattr(fastsam, method.name)(problem.params(), getattr(torch.optim, base), backend=backend, **settings)


def build_loop(name, problem, base="SGD", **changes):
    method = FAMILY[name]
    return method.reference(problem.params(), getattr(torch.optim, base), **{**method.kwargs, **BASES[base], **changes})


def follow(loop, reference, optimizer, problem, steps=12, part=None, **options):
    """Both train side by side; ``part(problem)`` makes the closure of a part of the batch."""
    for _ in range(steps):
        expected = take_step(loop, reference.closure, part and part(reference))
        loss = optimizer.step(problem.closure, ascent_closure=part and part(problem), **options)
        torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(problem.weights(), reference.weights(), rtol=1e-10, atol=1e-11)
        problem.next_batch()
        reference.next_batch()


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", FAMILY)
def test_the_trajectory_is_the_formulas(backend, name, base):
    reference, problem = mlp(), mlp()
    follow(build_loop(name, reference, base), reference, build(name, problem, base, backend), problem)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_maximised_objective(backend, name):
    """Maximising minus the loss is minimising the loss."""
    problems = [mlp(), mlp()]
    plain = build(name, problems[0], backend=backend)
    turned = build(name, problems[1], backend=backend, maximize=True)

    def minus():
        loss = -problems[1].loss()
        loss.backward()
        return loss

    for _ in range(7):
        plain.step(problems[0].closure)
        turned.step(minus)
        torch.testing.assert_close(problems[0].weights(), problems[1].weights(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_step_evaluates_its_closure_as_often_as_it_says(backend, name):
    problem = mlp()
    optimizer = build(name, problem, backend=backend)
    calls = []

    def closure():
        calls.append(problem.weights())
        return problem.closure()

    for k in range(7):
        calls.clear()
        start, expected = problem.weights(), optimizer.evaluations
        optimizer.step(closure)
        assert len(calls) == expected
        every = {"Momentum-SAM": 1, "LookSAM k=3": 2 if k % 3 == 0 else 1}
        assert expected == every.get(name, 2)
        at_start = name != "Momentum-SAM" or k == 0  # there is no momentum yet
        assert torch.equal(calls[0], start) == at_start


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_loop_by_hand_takes_the_same_steps(backend, name):
    """With and without a radius, whether LookSAM climbs in that step or not."""
    whole, by_hand = mlp(), mlp()
    optimizers = build(name, whole, backend=backend), build(name, by_hand, backend=backend)
    radius = optimizers[0].param_groups[0]["rho"]
    for k in range(11):
        for optimizer in optimizers:
            optimizer.param_groups[0]["rho"] = 0.0 if k in (3, 4, 5, 7, 9) else radius
        optimizers[0].step(whole.closure)
        optimizer = optimizers[1]
        optimizer.zero_grad()
        if optimizer.evaluations == 2:
            by_hand.closure()
        if optimizer.evaluations == 2 or name == "Momentum-SAM":
            optimizer.first_step(zero_grad=True)
        by_hand.closure()
        optimizer.second_step()
        assert torch.equal(whole.weights(), by_hand.weights())
    states = [
        state_bits(optimizer, problem.params()) for optimizer, problem in zip(optimizers, (whole, by_hand), strict=True)
    ]
    assert states[0] == states[1]


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_without_a_radius_it_is_the_base_optimizer(backend, name):
    plain, problem = mlp(), mlp()
    base = torch.optim.SGD(plain.params(), **BASES["SGD"])
    optimizer = build(name, problem, backend=backend, rho=0.0)
    for _ in range(7):
        base.zero_grad()
        plain.closure()
        base.step()
        optimizer.step(problem.closure)
        torch.testing.assert_close(problem.weights(), plain.weights(), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("bad", [0, 1])
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_nan_in_either_pass_changes_nothing(backend, name, bad):
    problem = mlp()
    optimizer = build(name, problem, backend=backend)
    for _ in range(3):  # so that LookSAM's next step climbs
        optimizer.step(problem.closure)
    before, state, passes = problem.weights(), state_bits(optimizer, problem.params()), 0

    def closure():
        nonlocal passes
        loss = problem.closure()
        if passes == min(bad, optimizer.evaluations - 1):
            problem.params()[0].grad[0] = math.nan
        passes += 1
        return loss

    optimizer.step(closure)
    assert optimizer.found_inf == 1
    assert torch.equal(problem.weights(), before) and state_bits(optimizer, problem.params()) == state
    optimizer.step(problem.closure)
    assert optimizer.found_inf == 0 and not torch.equal(problem.weights(), before)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_resumed_run_goes_on_bit_for_bit(backend, name, tmp_path):
    problem, resumed = mlp(), mlp()
    optimizer = build(name, problem, backend=backend)
    for _ in range(4):
        optimizer.step(problem.closure)
    torch.save(optimizer.state_dict(), tmp_path / "checkpoint.pt")
    with torch.no_grad():
        for p, q in zip(resumed.params(), problem.params(), strict=True):
            p.copy_(q)
    other = build(name, resumed, backend=backend)
    other.load_state_dict(torch.load(tmp_path / "checkpoint.pt"))
    for _ in range(4):
        optimizer.step(problem.closure)
        other.step(resumed.closure)
        assert torch.equal(problem.weights(), resumed.weights())


@pytest.mark.parametrize("base", ["SGD", "RMSprop"])
@pytest.mark.parametrize("name", TWO_SIDED)
def test_max_norm_clips_what_the_update_is_made_with(backend, name, base):
    """The loop clips h itself: its base optimizer finds it in .grad."""
    reference, problem = mlp(), mlp()
    loop, optimizer = build_loop(name, reference, base), build(name, problem, base, backend)
    step, norms = loop.base_optimizer.step, []

    def clipped_step():
        norms.append(float(torch.nn.utils.clip_grad_norm_(reference.params(), 0.05)))
        step()

    loop.base_optimizer.step = clipped_step
    follow(loop, reference, optimizer, problem, steps=8, max_norm=0.05)
    assert max(norms) > 0.05


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_one_micro_batch_is_a_step(backend, name):
    whole, accumulated = mlp(), mlp()
    optimizers = build(name, whole, backend=backend), build(name, accumulated, backend=backend)
    for _ in range(7):
        optimizers[0].step(whole.closure)
        optimizers[1].accumulate(accumulated.closure)
        optimizers[1].descend(zero_grad=True)
        torch.testing.assert_close(whole.weights(), accumulated.weights(), rtol=1e-12, atol=1e-13)
        for p, q in zip(whole.params(), accumulated.params(), strict=True):
            assert optimizers[0].state[p].keys() == optimizers[1].state[q].keys()


@pytest.mark.parametrize("name", ["SAM", *ONE_OF_EACH])
def test_the_first_pass_may_be_on_a_part_of_the_batch(backend, name):
    reference, problem = mlp(), mlp()
    if name == "SAM":
        settings = {"rho": 0.05, **BASES["SGD"]}
        loop = ReferenceSAM(reference.params(), torch.optim.SGD, **settings)
        optimizer = fastsam.SAM(problem.params(), torch.optim.SGD, backend=backend, **settings)
    else:
        loop, optimizer = build_loop(name, reference), build(name, problem, backend=backend)
    follow(loop, reference, optimizer, problem, part=part_of)


def part_of(problem):
    def closure():
        x, y = problem.inputs[problem.batch][:3], problem.targets[problem.batch][:3]
        loss = torch.nn.functional.cross_entropy(problem.model(x), y)
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("form", ["step", "accumulate"])
def test_a_policy_that_decides_on_a_part_leaves_the_update_to_the_whole_batch(backend, form):
    problem, plain = mlp(), mlp()
    optimizer = fastsam.SAM(problem.params(), torch.optim.SGD, rho=0.05, lr=0.1, backend=backend)
    base = torch.optim.SGD(plain.params(), lr=0.1)

    def decided():
        loss = part_of(problem)()
        optimizer.param_groups[0]["rho"] = 0.0
        return loss

    getattr(optimizer, form)(problem.closure, ascent_closure=decided)
    if form == "accumulate":
        optimizer.descend()
    plain.closure()
    base.step()
    torch.testing.assert_close(problem.weights(), plain.weights(), rtol=1e-12, atol=1e-13)


def test_a_part_without_a_gradient_is_an_error_before_a_weight_changes(backend):
    problem = mlp()
    optimizer = build("GSAM", problem, backend=backend)
    before = problem.weights()
    with pytest.raises(RuntimeError, match="the ascent_closure left no gradients"):
        optimizer.step(problem.closure, ascent_closure=lambda: torch.zeros(()))
    with pytest.raises(TypeError, match="the ascent_closure returned None"):
        optimizer.step(problem.closure, ascent_closure=lambda: problem.closure() and None)
    assert torch.equal(problem.weights(), before)


@pytest.mark.parametrize("name", TWO_SIDED)
def test_groups_that_are_not_perturbed_follow_the_base_optimizer(backend, name):
    reference, problem = mlp(), mlp()
    optimizers = []
    for make, which in ((build_loop, reference), (build, problem)):
        params = which.params()
        groups = [{"params": params[:2]}, {"params": params[2:], "perturb": False}]
        which.params, everything = (lambda groups=groups: groups), which.params
        optimizers.append(make(name, which) if make is build_loop else make(name, which, backend=backend))
        which.params = everything
    follow(optimizers[0], reference, optimizers[1], problem, steps=6)


BAD = [
    ("GSAM", dict(alpha=-0.1), "alpha=-0.1"),
    ("WSAM", dict(gamma=1.0), r"gamma=1.0 must be in \[0, 1\)"),
    ("WSAM", dict(gamma=-0.5), "gamma=-0.5"),
    ("WSAM", dict(decouple="yes"), "decouple='yes'"),
    ("LookSAM", dict(k=0), "k=0"),
    ("LookSAM", dict(k=2.5), "k=2.5"),
    ("LookSAM", dict(alpha=-1), "alpha=-1"),
    ("VaSSO", dict(theta=0), "theta=0"),
    ("VaSSO", dict(theta=1.5), "theta=1.5"),
    ("MomentumSAM", dict(momentum=0), "momentum=0.*momentum=0.9"),
    ("StableSAM", dict(rho=-1), "rho=-1"),
]


@pytest.mark.parametrize(("method", "setting", "message"), BAD, ids=[f"{m} {s}" for m, s, _ in BAD])
def test_settings_out_of_range_are_refused(method, setting, message):
    with pytest.raises(ValueError, match=message):
        getattr(fastsam, method)(mlp().params(), torch.optim.SGD, **{"lr": 0.1, "momentum": 0.9, **setting})


def test_a_base_optimizer_without_momentum_is_refused_by_momentum_sam(backend):
    problem = mlp()
    with pytest.raises(ValueError, match=r"neither momentum nor betas.*SGD"):
        fastsam.MomentumSAM(problem.params(), torch.optim.Adagrad, lr=0.1, backend=backend)


def test_looksam_refuses_a_climb_that_is_not_due(backend):
    problem = mlp()
    optimizer = build("LookSAM k=3", problem, backend=backend)
    optimizer.step(problem.closure)
    before = problem.weights()
    problem.closure()
    with pytest.raises(RuntimeError, match=r"LookSAM takes no second gradient.*evaluations"):
        optimizer.first_step()
    assert torch.equal(problem.weights(), before)


def test_momentum_sam_refuses_a_first_gradient(backend):
    problem = mlp()
    optimizer = build("Momentum-SAM", problem, backend=backend)
    problem.closure()
    with pytest.raises(RuntimeError, match=r"call optimizer.step\(closure\)"):
        optimizer.finish(problem.closure)


def test_copies_go_on_alike(backend):
    problem = mlp()
    optimizer = build("LookSAM k=3", problem, backend=backend)
    optimizer.step(problem.closure)
    other = copy.deepcopy(optimizer)
    assert other.evaluations == optimizer.evaluations == 1
    assert other.state_dict()["state"].keys() == optimizer.state_dict()["state"].keys()
