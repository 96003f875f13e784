"""A flattened gradient that nobody wrote to is no gradient: everything is as it is without flatten_parameters."""

from __future__ import annotations

import copy
import functools
import itertools

import pytest
import torch
from torch import nn

from fastsam import SAM, EigenSAM, FriendlySAM, flatten_parameters
from fastsam.curvature import Hessian
from fastsam.flat.flatten import drop_cleared

BASES = {
    "sgd": functools.partial(SAM, base_optimizer=torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adamw": functools.partial(FriendlySAM, base_optimizer=torch.optim.AdamW, lr=0.01, weight_decay=0.1),
    "its own step": functools.partial(SAM, base_optimizer=torch.optim.RMSprop, lr=0.01, weight_decay=0.1),
    "eigenvector": functools.partial(EigenSAM, base_optimizer=torch.optim.SGD, lr=0.1, weight_decay=0.1, freq=1),
}


class Experts(nn.Module):
    """Two experts, one of which a batch goes through; ``last`` takes part in nothing."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(5, 4), nn.Linear(4, 4)
        self.experts = nn.ModuleList(nn.Linear(4, 3) for _ in range(2))

    def forward(self, x, which):
        return self.experts[which](torch.tanh(self.first(x)))

    def loss(self, which=0):
        torch.manual_seed(which)
        loss = self(torch.randn(6, 5), which).square().mean()
        loss.backward()
        return loss


def by_step(model, optimizer, which):
    optimizer.step(lambda: model.loss(which))


def by_hand(model, optimizer, which):
    for step in (optimizer.first_step, optimizer.second_step):
        model.loss(which)
        step(zero_grad=True)


def cleared_by_the_model(model, optimizer, which, set_to_none=True):
    for step in (optimizer.first_step, optimizer.second_step):
        model.zero_grad(set_to_none)
        model.loss(which)
        step()
    model.zero_grad(set_to_none)


def clipped(model, optimizer, which):
    model.loss(which)
    optimizer.first_step(zero_grad=True)
    model.loss(which)
    nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    optimizer.second_step(zero_grad=True)


def accumulated(model, optimizer, which):
    for _ in range(2):
        optimizer.accumulate(lambda: model.loss(which))
    optimizer.descend(zero_grad=True)


def scaled(model, optimizer, which):
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in (optimizer.first_step, optimizer.second_step):
        torch.manual_seed(which)
        scaler.scale(model(torch.randn(6, 5), which).square().mean()).backward()
        scaler.unscale_(optimizer)
        step(zero_grad=True, grad_scaler=scaler)


FORMS = [
    by_step,
    by_hand,
    cleared_by_the_model,
    functools.partial(cleared_by_the_model, set_to_none=False),
    clipped,
    accumulated,
    scaled,
]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the eigenvector's estimate
@pytest.mark.parametrize("form", FORMS, ids=lambda f: getattr(f, "__name__", "zeroed_by_the_model"))
@pytest.mark.parametrize("base", BASES)
def test_what_takes_no_part_in_a_step_is_not_moved(backend, base, form):
    results = []
    for flattened in (True, False):
        model = Experts()
        if flattened:
            flatten_parameters(model)
        optimizer = BASES[base](model.parameters(), backend=backend)
        last = model.last.weight.detach().clone()
        for which in (0, 0, 1, 1, 0):
            form(model, optimizer, which)
        assert torch.equal(model.last.weight, last)
        assert set(optimizer.state[model.last.weight]) <= {"eigenvector"}
        results.append(model)
    for p, q in zip(*(m.parameters() for m in results), strict=True):
        torch.testing.assert_close(p, q)


def test_a_replaced_layer_is_told_of(backend):
    model = Experts()
    flatten_parameters(model)
    optimizer = BASES["sgd"](model.parameters(), backend=backend)
    optimizer.step(model.loss, model=model)
    model.first = nn.Linear(5, 4)
    with pytest.raises(RuntimeError, match="a layer was replaced since the optimizer was built"):
        optimizer.step(model.loss, model=model)


@pytest.mark.parametrize("method", ["step", "accumulate", "finish"])
def test_a_closure_that_leaves_no_gradients_is_told_of(backend, method):
    model = Experts()
    flatten_parameters(model)
    optimizer = BASES["sgd"](model.parameters(), backend=backend)
    optimizer.step(model.loss)
    optimizer.zero_grad()
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    model.loss()
    with pytest.raises(RuntimeError, match=r"left no gradients|found no gradients"):
        getattr(optimizer, method)(model.loss)


@pytest.mark.filterwarnings("error:no parameter has a gradient:RuntimeWarning")
def test_a_pass_without_a_backward_is_told_of(backend):
    model = Experts()
    flatten_parameters(model)
    optimizer = BASES["sgd"](model.parameters(), backend=backend)
    with pytest.raises(RuntimeWarning):
        optimizer.first_step()


def test_a_gradient_written_behind_torchs_back_counts(backend):
    """As those that collectives sum up in place, and those that are copied into ``.data``."""
    model = Experts()
    flatten_parameters(model)
    optimizer = BASES["sgd"](model.parameters(), backend=backend)
    by_hand(model, optimizer, 0)
    before = [p.detach().clone() for p in model.first.parameters()]
    for step in (optimizer.first_step, optimizer.second_step):
        for p in model.first.parameters():
            p.grad.data.fill_(0.1)
        step(zero_grad=True)
    assert not any(map(torch.equal, model.first.parameters(), before))


def test_a_gradient_that_was_set_to_zeros_is_none_only_if_it_was(backend):
    """zero_grad(set_to_none=False) makes zeros of what is there, and nothing of what is not."""
    results = []
    for flattened in (True, False):
        model = Experts()
        if flattened:
            flatten_parameters(model)
        optimizer = BASES["sgd"](model.parameters(), backend=backend)
        for which in (1, 0, 1, 0):
            for step in (optimizer.first_step, optimizer.second_step):
                optimizer.zero_grad(set_to_none=False)
                model.loss(which)
                step()
        results.append(model)
    for p, q in zip(*(m.parameters() for m in results), strict=True):
        torch.testing.assert_close(p, q)


def test_a_gradient_of_zeros_that_backward_computed_counts(backend):
    """Weight decay moves its parameter, as torch does it."""
    weight = nn.Parameter(torch.ones(3))
    flatten_parameters(nn.ParameterList([weight]))
    optimizer = SAM([weight], torch.optim.SGD, lr=0.1, weight_decay=0.1, backend=backend)
    optimizer.step(lambda: (0 * weight).sum().backward() or weight.detach().sum())
    assert bool((weight < 1).all())


def test_no_value_is_read_where_every_gradient_was_written_to(monkeypatch):
    model = nn.Linear(5, 4)
    flatten_parameters(model)
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.ones(2, 5)).sum().backward()
    monkeypatch.setattr(torch.Tensor, "any", None)
    drop_cleared(list(model.parameters()))
    assert all(p.grad is not None for p in model.parameters())


def test_gradients_lie_in_their_buffer_again_after_a_pass_that_did_without_them(backend):
    model = Experts()
    flatten_parameters(model)
    optimizer = BASES["sgd"](model.parameters(), backend=backend)
    used = [*model.first.parameters(), *model.experts[0].parameters()]
    places = []
    for others in ([], [1, 1], [1]):
        for which in [*others, 0]:
            by_hand(model, optimizer, which)
        model.loss(0)
        places.append([p.grad.data_ptr() for p in used])
        optimizer.zero_grad()
    assert places[0] == places[1] == places[2]
    apart = [b - a for a, b in itertools.pairwise(p.data_ptr() for p in used)]
    assert [b - a for a, b in itertools.pairwise(places[0])] == apart


def test_a_gradient_in_a_bucket_is_not_taken_out_of_it(backend):
    """As DistributedDataParallel's are with gradient_as_bucket_view: it would put the next one there again."""
    model = nn.ParameterList([torch.ones(4), torch.ones(4)])
    flatten_parameters(model)
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, weight_decay=0.1, backend=backend)
    bucket = torch.ones(8)
    for p, part in zip(model, bucket.split(4), strict=True):
        p.grad = part
    optimizer.zero_grad(set_to_none=False)
    assert not bucket.any()
    assert all(p.grad._base is bucket for p in model)
    optimizer.zero_grad()
    assert all(p.grad is None for p in model)


@pytest.mark.parametrize("method", ["exact", "finite-difference"])
def test_products_with_the_hessian_of_a_closure_know_of_parts_without_gradients(method):
    results = []
    for flattened in (True, False):
        model = Experts()
        if flattened:
            flatten_parameters(model)
        optimizer = BASES["sgd"](model.parameters(), backend="torch")
        by_hand(model, optimizer, 1)

        def closure(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            return model.loss()

        with Hessian(closure, model, closure=True, method=method) as hessian:
            results.append(hessian.product([torch.ones_like(p) for p in model.parameters()]))
    torch.testing.assert_close(*results)
