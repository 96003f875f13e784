"""Running statistics, masks and random numbers in the second pass, and checkpoints between the passes."""

import itertools
import random

import pytest
import torch
from reference import build_optimizer
from reference.scripted import noise
from torch import nn

import fastsam
import fastsam.loop.checkpoint
from fastsam.loop.model_state import TwoPasses, guard


class CountingNorm(nn.Module):
    """A custom layer: one buffer updated in place, one replaced by a new tensor in every pass."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.mean.lerp_(x.detach().mean(0), 0.1)
            self.passes = self.passes + 1
        return x - self.mean


class ManyKinds(nn.Module):
    """Buffers of several dtypes and layouts, and one that is expanded and cannot be written to."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(1).expand(6))
        self.register_buffer("mean", torch.zeros(6, dtype=torch.float64))
        self.register_buffer("rough", torch.zeros(2, 6, dtype=torch.bfloat16).t())
        self.register_buffer("odd", torch.tensor(False))
        self.register_buffer("absent", None)

    def forward(self, x):
        self.mean.add_(x.detach().mean(0))
        self.rough.add_(x.detach().mean())
        self.odd.logical_not_()
        return x * self.scale


NORMS = {
    "momentum": lambda: nn.BatchNorm1d(6),
    "momentum zero": lambda: nn.BatchNorm1d(6, momentum=0.0),
    "cumulative": lambda: nn.BatchNorm1d(6, momentum=None),
    "no statistics": lambda: nn.BatchNorm1d(6, track_running_stats=False),
    "custom": CountingNorm,
    "many kinds": ManyKinds,
}


def a_model(norm="momentum"):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 6), NORMS[norm](), nn.Dropout(0.5), nn.Linear(6, 2))


def closure_of(model, outputs=None):
    def closure():
        out = model(noise((8, 4), 3, torch.float32))
        loss = out.square().mean()
        loss.backward()
        if outputs is not None:
            outputs.append(out.detach())
        return loss

    return closure


def buffers(model):
    return [b.clone() for b in model.buffers()]


def assert_equal(actual, expected):
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("how", ["step", "finish", "accumulate", "by hand"])
@pytest.mark.parametrize("norm", NORMS)
def test_the_second_pass_leaves_every_buffer_as_the_first_left_it(norm, how):
    model, once = a_model(norm), a_model(norm)
    optimizer = fastsam.SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    identities = None
    torch.manual_seed(2)
    closure_of(once)()
    torch.manual_seed(2)
    closure = closure_of(model)
    if how == "finish":
        closure()
        identities = list(map(id, model.buffers()))
        optimizer.finish(closure, model=model)
    elif how == "by hand":
        passes = TwoPasses(model)
        closure()
        optimizer.first_step(zero_grad=True)
        with passes.second():
            closure()
        optimizer.second_step()
    else:
        getattr(optimizer, how)(closure, model=model)
    assert_equal(buffers(model), buffers(once))
    assert identities in (None, list(map(id, model.buffers())))


def test_without_the_model_the_statistics_count_twice():
    model = a_model()
    optimizer = fastsam.SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    optimizer.step(closure_of(model))
    assert model[1].num_batches_tracked == 2


@pytest.mark.parametrize("how", ["step", "accumulate"])
def test_masks_are_shared_and_a_step_draws_as_many_numbers_as_one_pass(how):
    model, once = a_model(), a_model()
    optimizer = fastsam.SAM(model.parameters(), torch.optim.SGD, rho=1e-30, lr=0.1)
    torch.manual_seed(2)
    random.seed(2)
    closure_of(once)()
    drawn = torch.rand(()), random.random()
    torch.manual_seed(2)
    random.seed(2)
    outputs = []
    getattr(optimizer, how)(closure_of(model, outputs), model=model)
    assert torch.equal(*outputs), "w + e rounds to w: with the same masks both passes are one"
    assert (torch.rand(()), random.random()) == drawn


@pytest.mark.parametrize("how", ["step", "accumulate"])
@pytest.mark.parametrize("part", [False, True], ids=["on demand", "after a part of the batch"])
def test_masks_are_fresh_and_drawn_once(part, how):
    model, outputs = a_model(), []
    optimizer = fastsam.SAM(model.parameters(), torch.optim.SGD, rho=1e-30, lr=0.1)
    closure, first = closure_of(model, outputs), closure_of(model, outputs)
    options = dict(ascent_closure=first) if part else dict(shared_masks=False)
    for _ in range(2):
        getattr(optimizer, how)(closure, model=model, **options)
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(outputs, 2))
    assert model[1].num_batches_tracked == 2


def test_an_exception_in_the_second_pass_puts_everything_back():
    model = a_model()
    optimizer = fastsam.FriendlySAM(model.parameters(), torch.optim.SGD, lr=0.1)
    weights, calls = [p.detach().clone() for p in model.parameters()], []

    def failing():
        loss = closure_of(model)()
        calls.append(buffers(model))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return loss

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(failing, model=model)
    assert_equal(list(model.parameters()), weights)
    assert_equal(buffers(model), calls[0])
    optimizer.step(closure_of(model), model=model)


def test_a_replaced_layer_is_named_and_nothing_is_lost(backend):
    model = a_model()
    optimizer = build_optimizer("SAM", "SGD momentum", model.parameters(), backend)
    optimizer.step(closure_of(model), model=model)
    model[3] = nn.Linear(6, 5)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"\(2, 6\).*replaced.*build the optimizer again"):
        optimizer.step(closure_of(model), model=model)
    assert_equal(list(model.parameters()), before)


def test_a_frozen_part_and_parameters_beside_the_model_are_no_replaced_layers():
    model, margin = a_model(), nn.Parameter(torch.ones(2))
    optimizer = fastsam.SAM([*model.parameters(), margin], torch.optim.SGD, lr=0.1)
    model[0].requires_grad_(False)
    optimizer.step(closure_of(model), model=model)


def test_parts_of_a_model_that_nothing_can_write_to_are_left_alone():
    """Layers that were never run, weights without values or dense memory, a buffer cached by an evaluation."""

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.lazy = nn.parameter.UninitializedParameter(requires_grad=False)
            self.unused = nn.LazyBatchNorm1d(affine=False)
            self.on_meta = nn.Parameter(torch.ones(2, device="meta"), requires_grad=False)
            self.sparse = nn.Parameter(torch.eye(2).to_sparse(), requires_grad=False)
            self.register_buffer("position", None)

        def forward(self, x):
            if self.position is None:
                self.position = torch.arange(6.0)
            return x + self.position

    results = []
    for given in (False, True):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(4, 6), Odd(), nn.Linear(6, 2))
        with torch.inference_mode():
            model(torch.zeros(1, 4))
        trained = [p for module in (model[0], model[2]) for p in module.parameters()]
        optimizer = fastsam.SAM(trained, torch.optim.SGD, lr=0.1)
        for _ in range(3):
            optimizer.step(closure_of(model), **({"model": model} if given else {}))
        results.append([p.detach().clone() for p in trained])
    assert_equal(*results)


def test_a_model_that_is_none_is_refused():
    model = a_model()
    optimizer = fastsam.SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        optimizer.step(closure_of(model), model=model.parameters())


def test_a_guarded_models_state_dict_between_the_passes_is_refused(tmp_path):
    model = a_model()
    optimizer = fastsam.SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    handle = guard(model, optimizer)
    closure_of(model)()
    with optimizer.perturbed(), pytest.raises(RuntimeError, match="perturbed"):
        model.state_dict()
    model.state_dict()
    optimizer.first_step()
    with pytest.raises(RuntimeError, match="perturbed"):
        fastsam.loop.checkpoint.save(tmp_path / "a.pt", model=model)
    handle.remove()
    model.state_dict()


@pytest.mark.parametrize("norm", NORMS)
def test_an_eigenvector_that_is_due_with_the_model_given(norm):
    model, once = a_model(norm), a_model(norm)
    optimizer = fastsam.EigenSAM(model.parameters(), torch.optim.SGD, lr=0.0, freq=1)
    for _ in range(3):
        torch.manual_seed(2)
        optimizer.step(closure_of(model), model=model)
        torch.manual_seed(2)
        closure_of(once)()
    assert optimizer.eigenvector is not None
    assert_equal(buffers(model), buffers(once))
