"""Flattened weights are separate tensors to everybody but the kernels, whatever is done to the model."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from torch import nn

from fastsam import SAM, flatten_parameters
from fastsam.flat.runs import runs
from fastsam.flat.space import FlatSpace


def build(flattened=True):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    if flattened:
        flatten_parameters(model)
    return model


def loss_of(model):
    loss = model(torch.ones(5, 5, dtype=model[0].weight.dtype)).square().mean()
    loss.backward()
    return loss


def train(model, steps=2, **options):
    optimizer = SAM(model.parameters(), torch.optim.SGD, **{"lr": 0.1, "momentum": 0.9, "backend": "torch", **options})
    for _ in range(steps):
        optimizer.step(lambda: loss_of(model))
    return optimizer


def equal(model, other):
    return all(map(torch.equal, model.parameters(), other.parameters()))


def bytes_of(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    return file.getvalue()


# ---- whoever saves ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_each_weight_and_each_gradient_has_a_storage_of_its_own_size(dtype):
    model = build(flattened=False).to(dtype)
    flatten_parameters(model)
    train(model, backend="cpu" if dtype.itemsize == 2 else "torch")
    loss_of(model)
    for tensors in (list(model.parameters()), [p.grad for p in model.parameters()]):
        storages = [t.untyped_storage() for t in tensors]
        assert [s.nbytes() for s in storages] == [t.nbytes for t in tensors]
        assert len({s.data_ptr() for s in storages}) == len(tensors)
        assert all(t.storage_offset() == 0 for t in tensors)


@pytest.mark.parametrize(
    "part",
    [lambda m: m[0], lambda m: m[2].weight, lambda m: m.state_dict()["0.bias"], lambda m: m.state_dict()],
    ids=["layer", "parameter", "entry", "state dict"],
)
def test_what_torch_saves_is_no_larger_than_without(part):
    assert len(bytes_of(part(build()))) == len(bytes_of(part(build(flattened=False))))


def test_safetensors_saves_every_weight(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    model = build()
    safetensors.save_model(model, tmp_path / "model")
    safetensors.save_file(model.state_dict(), tmp_path / "file")
    for name in ("model", "file"):
        saved = safetensors.load_file(tmp_path / name)
        assert saved.keys() == model.state_dict().keys()
        assert all(torch.equal(saved[k], v) for k, v in model.state_dict().items())


def test_a_distributed_checkpoint_holds_every_weight_once(tmp_path):
    from torch.distributed import checkpoint

    def size(model, name):
        checkpoint.save(model.state_dict(), checkpoint_id=tmp_path / name, no_dist=True)
        return sum(file.stat().st_size for file in (tmp_path / name).glob("*.distcp"))

    model, fresh = build(), build()
    train(model)
    assert size(model, "flat") == size(build(flattened=False), "plain")
    state = fresh.state_dict()
    checkpoint.load(state, checkpoint_id=tmp_path / "flat", no_dist=True)
    assert equal(fresh, model)


# ---- whoever copies or moves -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: m.share_memory(),
        lambda m: m.double().float(),
        lambda m: m.to("cpu"),
        lambda m: m.zero_grad() or m,
    ],
    ids=["deepcopy", "pickle", "share_memory", "cast", "stays", "model.zero_grad()"],
)
@pytest.mark.parametrize("steps", [0, 2])
def test_a_model_goes_on_as_an_unflattened_one(change, steps):
    results = []
    for flattened in (True, False):
        model = build(flattened)
        train(model, steps)
        model = change(model)
        train(model)
        results.append(model)
    for p, q in zip(*(m.parameters() for m in results), strict=True):
        torch.testing.assert_close(p, q)


def test_a_copy_is_another_model():
    model = build()
    twin = copy.deepcopy(model)
    before = [p.detach().clone() for p in model.parameters()]
    train(twin)
    assert all(map(torch.equal, model.parameters(), before))


@pytest.fixture
def swapping():
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(before)


def test_swap_tensors_is_not_blocked(swapping):
    results = []
    for flattened in (True, False):
        model = build(flattened)
        optimizer = train(model)
        model.double()
        optimizer.zero_grad()
        for _ in range(2):
            optimizer.step(lambda model=model: loss_of(model))
        assert model[0].weight.dtype == torch.float64
        results.append(model)
    for p, q in zip(*(m.parameters() for m in results), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "end", [lambda m: m.clear(), lambda m: m[0].double(), copy.deepcopy], ids=["", "cast", "copied"]
)
def test_the_memory_lives_exactly_as_long_as_a_weight_in_it(end):
    gc.collect()
    gc.disable()
    try:
        model = [nn.Linear(5, 7)]
        flatten_parameters(model[0])
        (run,) = [run for run in runs() if model[0].weight.data_ptr() == run.begin]
        gradients = weakref.ref(run.gradients)
        bias = model[0].bias.detach()
        del run
        model[0].zero_grad()
        assert gradients() is not None
        end(model)
        kept = bias.clone()
        again = [torch.full_like(bias, 7.0) for _ in range(100)]  # would find the memory, were it free
        assert torch.equal(bias, kept)
        model.clear()
        assert gradients() is not None, "the bias still lies there"
        del bias
        assert gradients() is None
        del again
    finally:
        gc.enable()


# ---- whoever walks them ----------------------------------------------------------------------------------------------


def test_flattened_parameters_are_neighbours_in_their_own_order():
    model = build()  # tensors of 140, 28, 84 and 12 bytes: none is a multiple of 16
    space = FlatSpace(list(reversed(list(model.parameters()))), [0] * 4, perturbed=True)
    assert [any(p is q for q in model.parameters()) for p in space.owners] == [True] * 4
    assert all(map(lambda a, b: a is b, space.owners, model.parameters()))
    assert space.joined == [False, True, True, True]
    assert space.offsets == [0, 35, 42, 63]


def test_tensors_that_happen_to_lie_side_by_side_are_none():
    """The allocator would choose the order of summation."""
    flat = torch.zeros(8)
    parts = [torch.utils.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(part)) for part in (flat[4:], flat[:4])]
    space = FlatSpace([nn.Parameter(part) for part in parts], [0, 0], perturbed=True)
    assert space.joined == [False, False]
    assert space.weights == b"".join(part.data_ptr().to_bytes(8, "little") for part in parts)


def test_a_tensor_at_the_address_of_a_flattened_one_that_is_gone_is_nobodys_neighbour():
    model = build()
    addresses = {p.data_ptr() for p in model.parameters()}
    del model
    assert not any(set(run.addresses) & addresses for run in runs())


def test_two_parameters_that_share_memory_are_refused_and_nothing_has_changed():
    weights = torch.zeros(4)
    model = nn.ParameterList([nn.Parameter(torch.ones(2)), nn.Parameter(weights), nn.Parameter(weights[2:])])
    addresses = [p.data_ptr() for p in model]
    with pytest.raises(ValueError, match="share memory but are two Parameters"):
        flatten_parameters(model)
    assert [p.data_ptr() for p in model] == addresses
    assert all(p.grad is None for p in model)


def test_a_parameter_without_elements_stays_as_it_is():
    model = nn.ParameterList([torch.ones(3), torch.ones(0, 2), torch.ones(5)])
    flatten_parameters(model)
    assert model[1].grad is None
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, backend="torch")

    def closure():
        loss = sum(p.square().sum() for p in model)
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
    assert bool((model[0] < 1).all())


def test_a_model_that_is_flattened_under_inference_mode_trains():
    model, expected = build(flattened=False), build(flattened=False)
    with torch.inference_mode():
        flatten_parameters(model)
    for m in (model, expected):
        train(m)
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_gradients_that_are_there_stay_and_there_are_no_others():
    model = build(flattened=False)
    loss_of(model[:1])
    before = model[0].weight.grad.clone()
    for _ in range(2):
        flatten_parameters(model)
        assert torch.equal(model[0].weight.grad, before)
        assert [p.grad is None for p in model.parameters()] == [False, False, True, True]
