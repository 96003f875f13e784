"""Schedules of rho, sigma and alpha, and torch's own schedulers on wrapper or base."""

import math

import pytest
import torch
from reference import build_optimizer, mlp
from torch.optim import lr_scheduler as lrs

import fastsam
from fastsam.schedules import (
    ConstantSchedule,
    CosineSchedule,
    GradientNormSchedule,
    LinearSchedule,
    PeriodicSchedule,
    ProportionalSchedule,
    RandomSchedule,
)

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
    (lambda o: PeriodicSchedule(o, every=3), lambda k: 0.2 if k in (0, 3, 6) else 0.0),
    (lambda o: PeriodicSchedule(o, every=1), lambda k: 0.2),
    (lambda o: RandomSchedule(o, probability=1.0), lambda k: 0.2),
    (lambda o: RandomSchedule(o, probability=0.0), lambda k: 0.0),
], ids=["constant", "linear", "cosine", "every third", "every", "always", "never"])  # fmt: skip
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


@pytest.mark.parametrize("make", [
    lambda o: CosineSchedule(o, "rho", end=0.1, steps=9),
    lambda o: CosineSchedule(o, "sigma", end=0.1, steps=9),
    lambda o: RandomSchedule(o, probability=0.5, seed=3),
    lambda o: GradientNormSchedule(o, steps=9),
], ids=["rho", "sigma", "random", "gradient norm"])  # fmt: skip
def test_a_saved_schedule_continues_bit_for_bit(make):
    def pair():
        optimizer = sgd(mlp(), rho=0.3, sigma=0.7)
        return optimizer, make(optimizer)

    def one_step(schedule, k):
        values = [schedule.get_last_value()]
        if isinstance(schedule, GradientNormSchedule):
            schedule.decide((1.0, 4.0, 2.0, 9.0)[k % 4])
            values.append(schedule.get_last_value())
        schedule.step()
        return values

    (optimizer, schedule), (again, resumed) = pair(), pair()
    for k in range(4):
        one_step(schedule, k)
    again.load_state_dict(optimizer.state_dict())
    resumed.load_state_dict(schedule.state_dict())
    for k in range(4, 11):
        assert one_step(resumed, k) == one_step(schedule, k)


def test_random_steps_come_as_often_as_asked_and_another_seed_takes_others():
    def climbing(seed, probability):
        schedule, taken = RandomSchedule(sgd(mlp(), rho=0.2), probability=probability, seed=seed), []
        for _ in range(2000):
            taken.append(schedule.get_last_value() == [0.2])
            schedule.step()
        return taken

    for probability in (0.1, 0.5):
        bound = 4 * math.sqrt(2000 * probability * (1 - probability))
        assert abs(sum(climbing(0, probability)) - 2000 * probability) < bound
    one, other = climbing(0, 0.5), climbing(1, 0.5)
    assert one == climbing(0, 0.5)
    assert abs(sum(a == b for a, b in zip(one, other, strict=True)) - 1000) < 4 * math.sqrt(500)


@pytest.mark.parametrize(("make", "expected"), [
    (lambda o: ConstantSchedule(o, factor=0.0, steps=4), [1, 1, 1, 1, 2, 2]),
    (lambda o: PeriodicSchedule(o, every=3), [2, 1, 1, 2, 1, 1]),
    (lambda o: RandomSchedule(o, probability=0.5, seed=0), None),
], ids=["tail", "every third", "random"])  # fmt: skip
def test_a_step_without_a_radius_costs_one_evaluation(make, expected, backend):
    problem = mlp()
    optimizer = build_optimizer("SAM", "SGD momentum", problem.params(), backend)
    schedule, found = make(optimizer), []
    expected = expected or []
    for _ in range(6):
        evaluations = []
        if isinstance(schedule, RandomSchedule):
            expected.append(1 + (schedule.get_last_value() != [0.0]))
        optimizer.step(lambda seen=evaluations: seen.append(0) or problem.closure())
        found.append(len(evaluations))
        schedule.step()
    assert found == expected


def test_sam_only_where_the_gradient_is_large_is_the_loop_of_ae_sam(backend):
    """The rule of Jiang et al. 2023 written out, in float64."""
    steps, rho, plain, problem = 40, 0.05, mlp(), mlp()
    base = torch.optim.SGD(plain.params(), lr=0.1, momentum=0.9)
    mean = variance = 0.0
    expected = []
    for k in range(steps):
        plain.next_batch()
        base.zero_grad()
        plain.closure()
        gradients = [p.grad.clone() for p in plain.params()]
        n = sum(g.square().sum().item() for g in gradients)
        mean = 0.8 * mean + 0.2 * n
        variance = 0.8 * variance + 0.2 * (n - mean) ** 2
        climbs = n >= mean + (1.0 - 1.5 * k / steps) * math.sqrt(variance)
        expected.append(1 + climbs)
        if climbs:
            before = [p.detach().clone() for p in plain.params()]
            with torch.no_grad():
                for p, g in zip(plain.params(), gradients, strict=True):
                    p.add_(g, alpha=rho / math.sqrt(n))
            base.zero_grad()
            plain.closure()
            with torch.no_grad():
                for p, w in zip(plain.params(), before, strict=True):
                    p.copy_(w)
        base.step()

    optimizer = fastsam.SAM(problem.params(), torch.optim.SGD, rho=rho, lr=0.1, momentum=0.9, backend=backend)
    schedule, found = GradientNormSchedule(optimizer, steps=steps, start=1.0, end=-0.5, decay=0.8), []
    for _ in range(steps):
        problem.next_batch()
        evaluations = []
        optimizer.step(schedule.watch(lambda seen=evaluations: seen.append(0) or problem.closure()))
        found.append(len(evaluations))
        schedule.step()
    assert found == expected
    assert 0.2 < sum(found) / steps - 1 < 0.8, "one kind of step only: it would test nothing"
    assert (problem.weights() - plain.weights()).abs().max() < 1e-10


def test_the_gradients_norm_is_that_of_the_perturbed_groups_and_one_that_overflowed_teaches_nothing(backend):
    first, second = (torch.nn.Parameter(torch.zeros(4, dtype=torch.float64)) for _ in range(2))
    optimizer = fastsam.SAM(
        [{"params": [first]}, {"params": [second], "perturb": False}], torch.optim.SGD, lr=0.1, backend=backend
    )
    schedule = GradientNormSchedule(optimizer, steps=10)

    def closure(slope):
        loss = (slope * first).sum() + (100.0 * second).sum()
        loss.backward()
        return loss

    optimizer.step(schedule.watch(lambda: closure(3.0)))
    schedule.step()
    assert schedule.mean == pytest.approx(0.1 * 36.0)
    kept = schedule.mean, schedule.variance
    optimizer.step(schedule.watch(lambda: closure(math.inf)))
    schedule.step()
    assert (schedule.mean, schedule.variance) == kept


def test_a_step_that_is_repeated_is_decided_again():
    schedule = GradientNormSchedule(sgd(mlp(), rho=0.2), steps=10)
    schedule.decide(50.0)
    assert schedule.decide(1.0)
    schedule.step()
    assert schedule.mean == pytest.approx(0.1)
    assert not schedule.decide(0.0) and schedule.get_last_value() == [0.0]
    schedule.step()
    assert schedule.get_last_value() == [0.2]


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
    for make, message in (
        (lambda: PeriodicSchedule(optimizer, every=0), "every=0"),
        (lambda: PeriodicSchedule(optimizer, every=2.5), "every=2.5 must be a whole number"),
        (lambda: RandomSchedule(optimizer, probability=1.5), "probability=1.5"),
        (lambda: GradientNormSchedule(optimizer, steps=0), "steps=0"),
        (lambda: GradientNormSchedule(optimizer, steps=9, decay=1.0), "decay=1.0"),
        (lambda: GradientNormSchedule(optimizer, steps=9, start=math.nan), "start=nan"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    with pytest.raises(RuntimeError, match="watch"):
        GradientNormSchedule(optimizer, steps=9).step()
    optimizer.param_groups[0]["lr"] = 0.0
    with pytest.raises(ValueError, match="reference_lr"):
        ProportionalSchedule(optimizer)
    schedule, other = LinearSchedule(optimizer, steps=3), LinearSchedule(optimizer, "sigma", steps=3)
    with pytest.raises(ValueError, match="sigma"):
        schedule.load_state_dict(other.state_dict())
