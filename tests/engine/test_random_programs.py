"""Random programs on an optimizer and on a slow model of it: weights, gradients, state and errors have to agree.

The model is a plain loop of tests/reference around torch's own base optimizer, in float64, made a transaction.
"""

import functools
import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference.loops import ReferenceEigenSAM, ReferenceFriendlySAM, ReferenceSAM
from reference.scripted import bits, copies, noise

import fastsam
from fastsam.flat.flatten import is_cleared

METHODS = {
    "SAM": (fastsam.SAM, ReferenceSAM, {}),
    "F-SAM": (fastsam.FriendlySAM, ReferenceFriendlySAM, {"sigma": [0.5, 1.0], "lmbda": [0.0, 0.9]}),
    "Eigen-SAM": (fastsam.EigenSAM, ReferenceEigenSAM, {"alpha": [0.0, 0.2]}),
}
BASES = {
    torch.optim.SGD: {"momentum": [0.0, 0.9], "dampening": [0.0, 0.3], "weight_decay": [0.0, 0.1]},
    torch.optim.AdamW: {"betas": [(0.9, 0.99), (0.0, 0.5)], "eps": [1e-3], "weight_decay": [0.0, 0.1]},
    torch.optim.RMSprop: {"eps": [1e-3], "weight_decay": [0.0, 0.1]},
}
SHAPES = [(), (0,), (3,), (8,), (4, 4), (2, 3, 2, 2), (700,)]
OPERATIONS = """zero_grad backward first_step zero_grad backward second_step zero_grad step accumulate accumulate
                descend restore change_settings between_steps between_steps move""".split()


def add(params, gradients):
    for p, g in zip(params, gradients, strict=True):
        if g is not None:
            p.grad = g.clone() if p.grad is None else p.grad.add_(g)


class Model:
    """A loop that never leaves a step half done: what a fastsam optimizer promises."""

    def __init__(self, loop, params):
        self.loop, self.params, self.average = loop, params, {}
        self.perturbed, self.finite, self.so_far, self.flat, self.left = False, True, None, False, []

    def zero_grad(self):
        self.so_far = None
        for p in self.params:
            p.grad = None

    def require(self, right):
        if not right:
            raise RuntimeError

    def cleared(self):
        return not any(p.grad is not None and p.grad.any() and not self.is_left(p) for p in self.params)

    def is_left(self, p):
        """Whether a finished step left this gradient, and nobody added to it since."""
        return any(g is p.grad and version == g._version for g, version in self.left)

    def climb(self, average):
        climbing = [p for group in self.loop.param_groups if group["perturb"] for p in group["params"]]
        self.finite = all(p.grad.isfinite().all() for p in climbing if p.grad is not None)
        self.perturbed, self.loop.momentum = True, dict(average)
        if self.finite:
            self.loop.first_step()

    def restore(self):
        for p, weight in self.loop.backup.items():
            p.copy_(weight)
        self.loop.backup.clear()
        self.perturbed = False

    def update(self, finite, average):
        self.restore()
        if finite and all(p.grad.isfinite().all() for p in self.params if p.grad is not None):
            self.loop.base_optimizer.step()
            self.average = average
        self.so_far = None

    def first_step(self):
        self.require(not self.perturbed and not self.so_far)
        self.climb(self.average)

    def second_step(self):
        if not self.perturbed:
            self.require(self.stands_still() and not self.so_far)
            self.climb(self.average)
        self.update(self.finite, self.loop.momentum)

    def descend(self):
        self.require(not self.perturbed and self.so_far)
        self.update(*self.so_far)

    def stands_still(self):
        return all(group["rho"] == 0 for group in self.loop.param_groups if group["perturb"])

    def both_passes(self, closure, average):
        for climbs in [True] if self.stands_still() else [True, False]:
            self.zero_grad()
            closure()
            self.require(any(p.grad is not None for p in self.params))
            if climbs:
                self.climb(average)

    def step(self, closure):
        self.require(not self.perturbed and self.cleared())
        try:
            self.both_passes(closure, self.average)
            self.update(self.finite, self.loop.momentum)
            self.left = [(p.grad, p.grad._version) for p in self.params if p.grad is not None]
        except BaseException:
            self.restore()
            self.zero_grad()
            raise

    def accumulate(self, closure):
        so_far = self.so_far if any(p.grad is not None for p in self.params) else None
        self.require(not self.perturbed and (so_far or self.cleared()))
        if not so_far:
            for p in filter(self.is_left, self.params):
                p.grad = None
        (met, average), gradients = so_far or (True, self.average), [p.grad for p in self.params]
        try:
            self.both_passes(closure, average)
            add(self.params, gradients)
            gradients, so_far = [p.grad for p in self.params], (met and self.finite, self.loop.momentum)
        finally:
            self.restore()
            self.so_far = so_far
            for p, g in zip(self.params, gradients, strict=True):
                p.grad = g


class Program:
    """The same operations on an optimizer and on its model, which are compared after each."""

    def __init__(self, method, base, backend, seed):
        self.random, self.backend = random.Random(seed), backend
        make, loop, own = METHODS[method]
        self.own = {"rho": [0, 0.05, 0.5], "adaptive": [False, True], **own}
        fixed = {"lr": 0.01, **self.some_of(BASES[base])}
        weights = [noise(self.random.choice(SHAPES), seed + i) for i in range(self.random.randint(2, 5))]
        self.vector = [noise(w.shape, seed + 20 + i) for i, w in enumerate(weights)]
        self.params, twins = ([torch.nn.Parameter(w.clone()) for w in weights] for _ in range(2))
        groups = [{"perturb": self.random.random() < 0.8, **self.some_of(self.own)} for _ in range(2)]

        def in_groups(params):
            return [{"params": part, **group} for part, group in zip((params[:1], params[1:]), groups, strict=True)]

        self.build = lambda backend: make(in_groups(self.params), base, backend=backend, **fixed)
        self.optimizer, self.model = self.build(backend), Model(loop(in_groups(twins), base, **fixed), twins)
        self.give_vector()

    def give_vector(self):
        if isinstance(self.optimizer, fastsam.EigenSAM):
            self.optimizer.eigenvector = self.model.loop.eigenvector = self.vector

    def some_of(self, values):
        return {name: self.random.choice(choices) for name, choices in values.items()}

    def gradients(self):
        found = [noise(p.shape, self.random.randrange(10**6)) for p in self.params]
        for g in found:
            if g.numel() and self.random.random() < 0.06:
                g.view(-1)[-1] = self.random.choice([torch.nan, -torch.inf])
        return [g if self.random.random() < 0.8 else None for g in found]

    @torch.no_grad()
    def both(self, name, *closures):
        raised = []
        for side, target in enumerate((self.optimizer, self.model)):
            try:
                getattr(target, name)(*closures[side : side + 1])
                raised.append(None)
            except (ZeroDivisionError, RuntimeError) as error:
                raised.append(type(error))
        assert raised[0] is raised[1]

    def with_closures(self, name):
        passes, fails = [self.gradients(), self.gradients()], self.random.choice([*[None] * 6, 0, 1])

        def closure(params, seen):
            seen.append(copies(params))
            if fails == len(seen) - 1:
                raise ZeroDivisionError
            add(params, passes[len(seen) - 1])
            return torch.zeros(())

        seen, expected, (counts, _) = [], [], self.model.so_far or (True, {})
        self.both(name, lambda: closure(self.params, seen), lambda: closure(self.model.params, expected))
        if counts:  # a step that is lost already may climb along anything
            torch.testing.assert_close(seen, expected, rtol=1e-9, atol=1e-9)

    def backward(self):
        gradients = self.gradients()
        add(self.params, gradients)
        add(self.model.params, gradients)

    def change_settings(self):
        group, changed = self.random.randrange(2), self.some_of({**self.own, "lr": [0.0, 0.05]})
        for target in (self.optimizer, self.model.loop):
            target.param_groups[group].update(changed)

    def between_steps(self):
        if not (self.model.perturbed or self.model.so_far):
            self.random.choice([self.clear_state, self.toggle_perturb, self.save_and_load, self.flatten])()
            self.give_vector()

    def clear_state(self):
        i = self.random.randrange(len(self.params))
        self.optimizer.state.pop(self.params[i], None)
        self.model.average.pop(self.model.params[i], None)
        self.model.loop.base_optimizer.state.pop(self.model.params[i], None)

    def toggle_perturb(self):
        for target in (self.optimizer, self.model.loop):
            target.param_groups[1]["perturb"] ^= True

    def save_and_load(self):
        state = self.optimizer.state_dict()
        self.optimizer = self.build(self.random.choice(["torch", self.backend]))
        self.optimizer.load_state_dict(state)

    def flatten(self):
        fastsam.flatten_parameters(torch.nn.ParameterList(self.params))
        self.model.flat = True

    def move(self):
        p = self.random.choice(self.params)
        p.data = p.data if self.model.flat else p.data.clone()

    def look(self):
        return [
            [(p.detach().clone(), None if is_cleared(p) else p.grad) for p in params]
            for params in (self.params, self.model.params)
        ]

    def run(self, operations):
        for name in operations:
            before = self.look()
            call = self.with_closures if name in ("step", "accumulate") else self.both
            getattr(self, name, functools.partial(call, name))()
            now = self.look()
            torch.testing.assert_close(*now, rtol=1e-9, atol=1e-9, equal_nan=True)
            for (was, _), (had, _), (mine, _), (theirs, _) in zip(*before, *now, strict=True):
                assert bits([mine]) == bits([was]) or bits([theirs]) != bits([had]), "a weight was to stay as it is"
        self.optimizer.restore()
        for i, p in enumerate(self.model.params):
            entry = self.optimizer.state_dict()["state"].get(i, {})
            expected = self.model.loop.base_optimizer.state.get(p, {})
            expected |= {"momentum": self.model.average[p]} if p in self.model.average else {}
            of_adam = {"step", "exp_avg", "exp_avg_sq"} if entry.get("step") == 0 else set()  # as good as none
            kept = {k: entry[k] for k in entry.keys() - of_adam - {"eigenvector"} if entry[k] is not None}
            torch.testing.assert_close(kept, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:no parameter has a gradient")
@pytest.mark.parametrize("base", BASES, ids=lambda base: base.__name__)
@pytest.mark.parametrize("method", METHODS)
@given(seed=st.integers(0, 10**6), operations=st.lists(st.sampled_from(OPERATIONS), min_size=10, max_size=40))
@settings(max_examples=25, suppress_health_check=list(HealthCheck))
def test_a_program_does_what_the_model_does(backend, method, base, seed, operations):
    Program(method, base, backend, seed).run(operations)
