"""What flattened parameters and a state changed by others must not confuse."""

from __future__ import annotations

import pytest
import torch

from fastsam import SAM, FriendlySAM, flatten_parameters
from fastsam.flat import FlatSpace


def _model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))


def _steps(model, optimizer, n, frozen=()):
    torch.manual_seed(1)
    for _ in range(n):
        inputs = torch.randn(5, 4)
        for step in (optimizer.first_step, optimizer.second_step):
            model(inputs).square().mean().backward()
            for p in frozen:
                p.grad.zero_()
                p.grad = None
            step(zero_grad=True)


def test_neighbours_in_a_flattened_model_keep_their_own_step_counts(backend):
    expected, flat = _model(), _model()
    flatten_parameters(flat)
    for model in (expected, flat):
        optimizer = SAM(model.parameters(), torch.optim.AdamW, lr=0.01, backend=backend)
        _steps(model, optimizer, 3, frozen=[model[0].bias])  # joins in three steps after its neighbours
        _steps(model, optimizer, 3)
        assert optimizer.state[model[0].bias]["step"] == 3
        assert optimizer.state[model[0].weight]["step"] == 6
    for p, q in zip(expected.parameters(), flat.parameters(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("method", [SAM, FriendlySAM])
@pytest.mark.parametrize("steps", [1, 3])
def test_a_cleared_state_starts_again(backend, base, method, steps):
    options = dict(lr=0.01, momentum=0.9, dampening=0.1) if base is torch.optim.SGD else dict(lr=0.01)
    model = _model()
    optimizer = method(model.parameters(), base, backend=backend, **options)
    _steps(model, optimizer, steps)
    optimizer.state.clear()
    fresh = _model()
    fresh.load_state_dict(model.state_dict())
    of_fresh = method(fresh.parameters(), base, backend=backend, **options)
    _steps(model, optimizer, 2)
    _steps(fresh, of_fresh, 2)
    for p, q in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("moved", [False, True], ids=["with gradients", "without"])
def test_gradients_of_a_flattened_model_that_was_cast_are_cleared(backend, moved):
    expected, flat = _model().double(), _model()
    flatten_parameters(flat)
    if moved:
        flat.zero_grad()
    flat.double()
    for model in (expected, flat):
        optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.01, backend=backend)
        for _ in range(3):
            optimizer.step(lambda model=model: _loss(model))
    for p, q in zip(expected.parameters(), flat.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_a_flattened_parameter_that_is_frozen_stays(backend):
    model = _model()
    flatten_parameters(model)
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.01, momentum=0.9, weight_decay=0.1, backend=backend)
    optimizer.step(lambda: _loss(model))
    before = model[0].weight.requires_grad_(False).clone()
    for _ in range(2):
        optimizer.step(lambda: _loss(model))
    assert torch.equal(model[0].weight, before)
    model[0].weight.requires_grad_(True)
    optimizer.step(lambda: _loss(model))
    assert not torch.equal(model[0].weight, before)


def _loss(model):
    loss = model(torch.ones(5, 4, dtype=model[0].weight.dtype)).square().mean()
    loss.backward()
    return loss


def test_gradients_are_read_in_one_call_whatever_the_stride_of_a_single_element(cpu):
    """As cuDNN gives them to 1x1 convolutions with channels last."""
    if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        pytest.skip("this torch's gradients are read tensor by tensor")
    weight = torch.nn.Parameter(torch.ones(8, 4, 1, 1))
    weight.grad = torch.empty_strided(weight.shape, (4, 1, 4, 4)).fill_(2.0)
    space = FlatSpace([weight], [0], perturbed=True)
    assert space._scanner.gradients() == ([weight.grad], [weight.grad.data_ptr()])
    weight.grad = torch.ones(4, 8, 1, 1).transpose(0, 1)
    assert space._scanner.gradients() is None, "that one has to be copied"
