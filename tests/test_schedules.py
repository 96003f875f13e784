"""Schedules of rho, sigma and alpha, and torch's own schedulers on wrapper or base."""

import math

import pytest
import torch
from reference import build_optimizer, mlp
from torch.optim import lr_scheduler as lrs

import fastsam
from fastsam.schedules import ConstantSchedule, CosineSchedule, LinearSchedule, ProportionalSchedule

TORCH = {
    "LambdaLR": lambda o: lrs.LambdaLR(o, lambda k: 0.9**k),
    "MultiplicativeLR": lambda o: lrs.MultiplicativeLR(o, lambda k: 0.9),
    "StepLR": lambda o: lrs.StepLR(o, 2),
    "MultiStepLR": lambda o: lrs.MultiStepLR(o, [2, 4]),
    "ConstantLR": lambda o: lrs.ConstantLR(o, 0.5, 3),
    "LinearLR": lambda o: lrs.LinearLR(o, 0.1, 1.0, 4),
    "ExponentialLR": lambda o: lrs.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: lrs.PolynomialLR(o, 10),
    "CosineAnnealingLR": lambda o: lrs.CosineAnnealingLR(o, 6),
    "CosineAnnealingWarmRestarts": lambda o: lrs.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: lrs.CyclicLR(o, 0.01, 0.1, 2),
    "OneCycleLR": lambda o: lrs.OneCycleLR(o, 0.1, total_steps=12),
    "SequentialLR": lambda o: lrs.SequentialLR(o, [lrs.ConstantLR(o, 0.1, 2), lrs.ExponentialLR(o, 0.9)], [2]),
    "ChainedScheduler": lambda o: lrs.ChainedScheduler([lrs.ConstantLR(o, 0.1, 2), lrs.ExponentialLR(o, 0.9)]),
    "ReduceLROnPlateau": lambda o: lrs.ReduceLROnPlateau(o, patience=1),
}


def sgd(problem, **options):
    return fastsam.FriendlySAM(problem.params(), torch.optim.SGD, lr=0.1, momentum=0.9, **options)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("on", ["wrapper", "base"])
@pytest.mark.parametrize("name", TORCH)
def test_every_torch_scheduler_sets_the_lr_that_sgd_would_get(name, on):
    problem, plain = mlp(), torch.optim.SGD(mlp().params(), lr=0.1, momentum=0.9)
    optimizer = sgd(problem)
    ours, theirs = TORCH[name](optimizer if on == "wrapper" else optimizer.base_optimizer), TORCH[name](plain)
    for _ in range(8):
        optimizer.step(problem.closure)
        plain.step()
        for scheduler in (ours, theirs):
            scheduler.step(1.0) if name == "ReduceLROnPlateau" else scheduler.step()
        for key in ("lr", "momentum"):
            assert optimizer.param_groups[0][key] == plain.param_groups[0][key]


@pytest.mark.parametrize(("make", "expected"), [
    (lambda o: ConstantSchedule(o, "rho", factor=0.0, steps=2), lambda k: 0.0 if k < 2 else 0.2),
    (lambda o: LinearSchedule(o, "rho", start=0.5, end=2.0, steps=4), lambda k: 0.2 * (0.5 + 1.5 * min(k, 4) / 4)),
    (lambda o: CosineSchedule(o, "rho", steps=4), lambda k: 0.1 * (1 + math.cos(math.pi * min(k, 4) / 4))),
], ids=["constant", "linear", "cosine"])  # fmt: skip
def test_the_closed_forms(make, expected):
    optimizer = sgd(mlp(), rho=0.2)
    schedule = make(optimizer)
    for k in range(7):
        assert schedule.get_last_value() == [optimizer.param_groups[0]["rho"]]
        assert optimizer.param_groups[0]["rho"] == pytest.approx(expected(k), abs=1e-15)
        schedule.step()


def test_proportional_follows_the_lr_of_each_group():
    problem = mlp()
    first, *rest = problem.params()
    optimizer = fastsam.SAM(
        [{"params": [first], "lr": 0.4, "rho": 0.3}, {"params": rest}], torch.optim.SGD, lr=0.1, rho=0.1
    )
    warmup = lrs.LinearLR(optimizer, 0.5, 1.0, 2)
    schedule = ProportionalSchedule(optimizer, "rho", minimum=0.05)
    for share in (0.5, 0.75, 1.0):
        assert schedule.get_last_value() == pytest.approx([0.05 + 0.25 * share, 0.05 + 0.05 * share])
        optimizer.step(problem.closure)
        warmup.step()
        schedule.step()


def test_the_next_step_climbs_with_the_scheduled_radius(backend):
    problem = mlp()
    optimizer = build_optimizer("SAM", "SGD", problem.params(), backend, rho=0.5)
    schedule = LinearSchedule(optimizer, steps=2)
    for expected in (0.5, 0.25, 0.0):
        start = problem.weights()
        problem.closure()
        with optimizer.perturbed():
            assert (problem.weights() - start).norm() == pytest.approx(expected)
        optimizer.zero_grad()
        schedule.step()


@pytest.mark.parametrize("name", ["rho", "sigma"])
def test_a_saved_schedule_continues_bit_for_bit(name):
    def pair():
        optimizer = sgd(mlp(), rho=0.3, sigma=0.7)
        return optimizer, CosineSchedule(optimizer, name, end=0.1, steps=9)

    (optimizer, schedule), (again, resumed) = pair(), pair()
    for _ in range(4):
        schedule.step()
    again.load_state_dict(optimizer.state_dict())
    resumed.load_state_dict(schedule.state_dict())
    for _ in range(7):
        assert again.param_groups[0][name] == optimizer.param_groups[0][name]
        schedule.step()
        resumed.step()


def test_alpha_that_the_base_optimizer_has_too_is_the_methods():
    problem = mlp()
    optimizer = fastsam.EigenSAM(problem.params(), torch.optim.RMSprop, alpha=0.2)
    smoothing = optimizer.base_optimizer.param_groups[0]["alpha"]
    schedule = LinearSchedule(optimizer, "alpha", steps=2)
    schedule.step()
    assert schedule.get_last_value() == [pytest.approx(0.1)]
    assert optimizer.base_optimizer.param_groups[0]["alpha"] == smoothing


def test_a_group_added_later_is_scheduled_too():
    optimizer = sgd(mlp(), rho=0.2)
    schedule = LinearSchedule(optimizer, steps=4)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(3))], "rho": 1.0})
    schedule.step()
    assert schedule.get_last_value() == pytest.approx([0.15, 0.75])


def test_what_cannot_be_scheduled_is_refused():
    optimizer = sgd(mlp())
    with pytest.raises(KeyError, match="alpha"):
        LinearSchedule(optimizer, "alpha", steps=3)
    for bad in (dict(steps=0), dict(steps=3, end=-1.0), dict(steps=3, start=float("nan"))):
        with pytest.raises(ValueError, match="must be"):
            LinearSchedule(optimizer, **bad)
    optimizer.param_groups[0]["lr"] = 0.0
    with pytest.raises(ValueError, match="reference_lr"):
        ProportionalSchedule(optimizer)
    schedule, other = LinearSchedule(optimizer, steps=3), LinearSchedule(optimizer, "sigma", steps=3)
    with pytest.raises(ValueError, match="sigma"):
        schedule.load_state_dict(other.state_dict())
