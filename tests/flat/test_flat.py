"""What flattened parameters and a state changed by others must not confuse."""

from __future__ import annotations

import pytest
import torch

from fastsam import SAM, FriendlySAM, flatten_parameters
from fastsam.flat.flatten import is_cleared
from fastsam.flat.space import FlatSpace, packed


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
    assert space._scanner.gradients() == ([weight.grad], packed([weight.grad.data_ptr()]))
    weight.grad = torch.ones(4, 8, 1, 1).transpose(0, 1)
    assert space._scanner.gradients() is None, "that one has to be copied"


def test_a_flattened_gradient_of_another_optimizers_parameter_is_not_cleared(backend):
    model = _model()
    flatten_parameters(model)
    body = SAM(model[0].parameters(), torch.optim.SGD, lr=0.01, backend=backend)
    head = SAM(model[2].parameters(), torch.optim.SGD, lr=0.01, backend=backend)
    _loss(model)
    expected = [p.grad.clone() for p in model[2].parameters()]
    body.zero_grad()
    assert not any(p.grad.any() for p in model[0].parameters())
    assert all(torch.equal(p.grad, g) for p, g in zip(model[2].parameters(), expected, strict=True))
    assert [is_cleared(p) for p in model.parameters()] == [True, True, False, False]
    head.zero_grad()
    assert not any(p.grad.any() for p in model.parameters())


def test_gradients_that_are_views_are_zeroed_where_they_are(backend):
    """As DistributedDataParallel's are with gradient_as_bucket_view."""
    bucket = torch.ones(6)
    weight = torch.nn.Parameter(torch.ones(4))
    weight.grad = bucket[2:]
    SAM([weight], torch.optim.SGD, lr=0.01, backend=backend).zero_grad(set_to_none=False)
    assert bucket.tolist() == [1, 1, 0, 0, 0, 0]


@pytest.mark.parametrize("method", [SAM, FriendlySAM])
def test_a_model_that_is_flattened_into_another_order_after_a_step_goes_on(backend, method):
    """Tensors of 12 and of 32 bytes: flattened, the second comes first."""
    results = []
    for flattened in (False, True):
        model = torch.nn.ParameterList([torch.arange(1.0, 4.0), torch.arange(1.0, 9.0)])
        optimizer = method(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, backend=backend)
        for step in range(3):
            if flattened and step == 1:
                flatten_parameters(model)
            optimizer.step(lambda model=model: _sum_of_squares(*model))
        results.append(torch.cat([p.detach() for p in model]))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("change", [lambda w: w[:4], lambda w: w.view(torch.bfloat16)[:8]], ids=["shorter", "narrower"])
def test_a_weight_that_shrinks_where_it_lies_is_noticed(backend, change):
    """The kernels would read its gradient beyond the end."""
    weight = torch.nn.Parameter(torch.ones(8))
    optimizer = SAM([weight], torch.optim.SGD, lr=0.0, rho=1.0, backend=backend)
    optimizer.step(lambda: _sum_of_squares(weight))
    weight.data = change(torch.zeros(8).set_(weight.data)).fill_(1.0)
    weight.grad = torch.ones(8, dtype=weight.dtype)[: len(weight)]
    with optimizer.perturbed():
        torch.testing.assert_close(weight.detach(), 1 + torch.full_like(weight, len(weight) ** -0.5))
    assert bool((weight == 1).all())


@pytest.mark.parametrize("compiled", [True, False])
def test_a_weight_that_is_transposed_where_it_lies_is_noticed(backend, monkeypatch, compiled):
    """Walked as before, each element would be moved along another's gradient."""
    if not compiled:  # as with torch before 2.10
        monkeypatch.delattr(torch.Tensor, "__dlpack_c_exchange_api__", raising=False)
    weight = torch.nn.Parameter(torch.zeros(3, 3))
    optimizer = SAM([weight], torch.optim.SGD, lr=0.0, rho=1.0, backend=backend)
    weight.grad = torch.ones(3, 3)
    optimizer.first_step()
    optimizer.second_step()
    weight.data = weight.data.t()
    weight.grad = torch.arange(9.0).view(3, 3)
    with optimizer.perturbed():
        torch.testing.assert_close(weight.detach(), torch.arange(9.0).view(3, 3) / torch.arange(9.0).norm())
    assert not weight.any()


def test_averages_that_changed_places_are_both_taken_over(backend):
    one, other = weights = [torch.nn.Parameter(torch.full((3,), x)) for x in (1.0, 2.0)]
    optimizer = FriendlySAM(weights, torch.optim.SGD, lr=0.0, lmbda=0.5, backend=backend)
    optimizer.step(lambda: _sum_of_squares(*weights))
    average = {p: optimizer.state[p]["momentum"].clone() for p in weights}
    optimizer.state[one], optimizer.state[other] = optimizer.state[other], optimizer.state[one]
    gradients = {p: 2 * p.detach() for p in weights}
    optimizer.step(lambda: _sum_of_squares(*weights))
    torch.testing.assert_close(optimizer.state[one]["momentum"], (average[other] + gradients[one]) / 2)
    torch.testing.assert_close(optimizer.state[other]["momentum"], (average[one] + gradients[other]) / 2)


def _sum_of_squares(*weights):
    loss = sum(w.square().sum() for w in weights)
    loss.backward()
    return loss


def test_weights_that_move_between_the_passes_are_followed(backend):
    """Also those without elements, which have no place that they could leave."""
    weights = [torch.nn.Parameter(w) for w in (torch.ones(2), torch.ones(3)[3:], torch.ones(4), torch.ones(0))]
    optimizer = SAM(weights, torch.optim.SGD, lr=0.0, rho=1.0, backend=backend)
    _sum_of_squares(*weights)
    with optimizer.perturbed():
        for w in weights:
            w.data = w.data.clone()
        assert not torch.equal(weights[2], torch.ones(4))
    assert all(bool((w == 1).all()) for w in weights)


def test_a_group_that_gains_momentum_later_meets_its_buffer_first(backend):
    """torch's SGD keeps no buffer for it until then, whatever another group has."""
    expected, weights = ([torch.nn.Parameter(torch.ones(3)) for _ in range(2)] for _ in range(2))
    groups = [[{"params": p[:1]}, {"params": p[1:], "momentum": 0.0}] for p in (expected, weights)]
    settings = dict(lr=0.1, momentum=0.9, dampening=0.5)
    plain = torch.optim.SGD(groups[0], **settings)
    optimizer = SAM(groups[1], torch.optim.SGD, rho=0.0, backend=backend, **settings)
    for _ in range(3):
        plain.zero_grad()
        _sum_of_squares(*expected)
        plain.step()
        optimizer.step(lambda: _sum_of_squares(*weights))
        assert [optimizer.state[p].keys() for p in weights] == [plain.state[p].keys() for p in expected]
        plain.param_groups[1]["momentum"] = optimizer.param_groups[1]["momentum"] = 0.9
    torch.testing.assert_close(weights, expected)


@pytest.mark.parametrize(
    "change",
    [torch.Tensor.clone, torch.Tensor.double, torch.Tensor.bfloat16, lambda w: w.t().contiguous().t()],
    ids=["address", "float64", "bfloat16", "strides"],
)
def test_weights_come_back_wherever_the_model_was_moved_between_the_passes(backend, change):
    model = _model()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=0.5, backend=backend)
    before = [change(p.detach()) for p in model.parameters() if p.dim() == 2]
    _loss(model)
    with optimizer.perturbed():
        for p in model.parameters():
            p.data = change(p.data) if p.dim() == 2 else p.data.clone()
    assert all(map(torch.equal, (p for p in model.parameters() if p.dim() == 2), before))


def test_a_step_on_a_model_that_was_cast_between_the_passes_is_refused_and_the_weights_are_back(backend):
    model = _model()
    before = [p.detach().double() for p in model.parameters()]
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=0.5, backend=backend)
    _loss(model)
    optimizer.first_step(zero_grad=True)
    model.double()
    _loss(model)
    with pytest.raises(RuntimeError, match="change the model between steps"):
        optimizer.second_step(zero_grad=True)
    assert all(map(torch.equal, model.parameters(), before))
    optimizer.zero_grad()
    optimizer.step(lambda: _loss(model))
    assert not any(map(torch.equal, model.parameters(), before))


def test_all_but_a_weight_of_another_shape_come_back_and_that_one_when_its_shape_does(backend):
    model = _model()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=0.5, backend=backend)
    _loss(model)
    optimizer.first_step(zero_grad=True)
    whole = model[0].weight.data
    model[0].weight.data = whole[:2]
    with pytest.raises(RuntimeError, match=r"shape \(2, 4\) was given that shape between"):
        optimizer.restore()
    assert all(map(torch.equal, list(model.parameters())[1:], before[1:]))
    model[0].weight.data = whole
    optimizer.restore()
    assert torch.equal(model[0].weight, before[0])


def test_gradients_may_have_another_dtype_in_one_pass_and_the_weights_in_the_next(backend):
    """As those of a hook that hands over bfloat16 for a while."""
    if not hasattr(torch.Tensor, "grad_dtype"):
        pytest.skip("this torch gives no parameter a gradient of another dtype")
    mixed, plain = _model(), _model()
    for p in mixed.parameters():
        p.grad_dtype = None
    optimizers = [SAM(m.parameters(), torch.optim.SGD, lr=0.1, rho=0.5, backend=backend) for m in (mixed, plain)]
    for dtype in (torch.bfloat16, torch.float32, torch.bfloat16):
        for p, q in zip(mixed.parameters(), plain.parameters(), strict=True):
            p.grad = torch.randn(p.shape).to(dtype)
            q.grad = p.grad.float()
        for optimizer in optimizers:
            optimizer.first_step()
            optimizer.second_step()
        assert all(map(torch.equal, mixed.parameters(), plain.parameters()))


def test_state_cleared_between_the_passes_begins_anew_in_the_second(backend):
    model, twin = _model(), _model()
    optimizers = [SAM(m.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, backend=backend) for m in (model, twin)]
    for m, optimizer in zip((model, twin), optimizers, strict=True):
        _steps(m, optimizer, 2)
    optimizers[1].state.clear()  # before the step, where nothing else can be meant
    for m, optimizer in zip((model, twin), optimizers, strict=True):
        _loss(m)
        optimizer.first_step(zero_grad=True)
        if m is model:
            optimizer.state.clear()
        _loss(m)
        optimizer.second_step(zero_grad=True)
    assert all(map(torch.equal, model.parameters(), twin.parameters()))
    saved = [optimizer.state_dict()["state"] for optimizer in optimizers]
    assert all(torch.equal(saved[0][i]["momentum_buffer"], saved[1][i]["momentum_buffer"]) for i in range(4))
