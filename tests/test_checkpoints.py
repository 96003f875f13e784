"""Saved after some steps and loaded into a fresh optimizer, training goes on as if nothing had happened."""

import copy
import io
import pickle

import pytest
import torch
from reference import METHODS, build_optimizer, build_reference, mlp
from reference.loops import ReferenceFriendlySAM
from reference.scripted import noise, state_bits

import fastsam

ALL_METHODS = [
    "SAM",
    "ASAM",
    "F-SAM sigma=0.5 lmbda=0.9",
    "Eigen-SAM given v",
    "F-SAM + Eigen-SAM given v",
    "Eigen-SAM own v",
]
BASES = ["SGD momentum", "AdamW", "RMSprop"]


def train(optimizer, problem, steps):
    for _ in range(steps):
        problem.next_batch()
        if hasattr(optimizer, "update_eigenvector") and optimizer.eigenvector_due():
            optimizer.update_eigenvector(problem.loss, problem.model)
        for step in (optimizer.first_step, optimizer.second_step):
            optimizer.zero_grad()
            problem.closure()
            step()
    return problem.weights()


def fresh(method, base, backend, **extra):
    """An optimizer that has not stepped. Eigen-SAM's own vector is due every third step."""
    problem = mlp()
    if METHODS[method].eigenvector == "own":
        extra = {"freq": 3, **extra}
    return problem, build_optimizer(method, base, problem.params(), backend, **extra)


def trained(method, base, backend, steps=4):
    torch.manual_seed(0)
    problem, optimizer = fresh(method, base, backend)
    if METHODS[method].eigenvector == "given":
        optimizer.eigenvector = [noise(p.shape, 900 + i, p.dtype) * 0.1 for i, p in enumerate(problem.params())]
    train(optimizer, problem, steps)
    return problem, optimizer


def save_and_load(problem, optimizer):
    """Through a file that holds tensors and plain containers alone, as torch.load has it by default."""
    file = io.BytesIO()
    torch.save({"model": problem.model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def resume(checkpoint, method, base, backend, batch, **extra):
    problem, optimizer = fresh(method, base, backend, **extra)
    problem.model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    problem.batch = batch
    return problem, optimizer


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", ALL_METHODS)
def test_training_continues_bit_for_bit(backend, method, base):
    problem, optimizer = trained(method, base, backend)
    checkpoint = save_and_load(problem, optimizer)
    # other hyper-parameters at first: those of the checkpoint must win
    again, resumed = resume(checkpoint, method, base, backend, problem.batch, rho=0.7, lr=0.5)
    assert resumed.param_groups[0]["rho"] == optimizer.param_groups[0]["rho"]
    assert resumed.param_groups is resumed.base_optimizer.param_groups
    assert resumed.state is resumed.base_optimizer.state
    assert state_bits(resumed, again.params()) == state_bits(optimizer, problem.params())
    assert torch.equal(train(resumed, again, 7), train(optimizer, problem, 7))
    assert state_bits(resumed, again.params()) == state_bits(optimizer, problem.params())


@pytest.mark.parametrize(("first", "second"), [("torch", "cpu"), ("cpu", "torch")])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", ALL_METHODS)
def test_a_checkpoint_of_one_backend_continues_on_another(cpu, method, base, first, second):
    problem, optimizer = trained(method, base, first)
    again, resumed = resume(save_and_load(problem, optimizer), method, base, second, problem.batch)
    torch.testing.assert_close(train(resumed, again, 7), train(optimizer, problem, 7), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("method", ["SAM", "F-SAM sigma=0.5 lmbda=0.9"])
def test_loading_into_an_optimizer_that_has_stepped(backend, method):
    problem, optimizer = trained(method, "SGD momentum", backend)
    checkpoint, batch = save_and_load(problem, optimizer), problem.batch
    expected = train(optimizer, problem, 5)
    problem.model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    problem.batch = batch
    assert torch.equal(train(optimizer, problem, 5), expected)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", ALL_METHODS)
def test_a_saved_state_is_no_larger_than_its_tensors(backend, method, base):
    _, optimizer = trained(method, base, backend)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    size = sum(t.numel() * t.element_size() for s in optimizer.state.values() for t in s.values())
    # a view of the flat state must not drag the whole allocation, the backup or padding along
    assert file.tell() < 3 * size + 50_000


AUTHORS_GROUP = {
    "lr": 0.05, "momentum": 0.9, "dampening": 0, "weight_decay": 5e-4, "nesterov": False, "maximize": False,
    "foreach": None, "differentiable": False, "rho": 0.05, "adaptive": False,
}  # fmt: skip


def authors_checkpoint(params, **entries):
    """What state_dict() gives for the authors' wrapper: its own state and the shared groups."""
    return {
        "state": {i: {key: noise(p.shape, seed + i) for key, seed in entries.items()} for i, p in enumerate(params)},
        "param_groups": [{**AUTHORS_GROUP, "params": list(range(len(params)))}],
    }


@pytest.mark.parametrize("momentum_buffer", [{}, {"momentum_buffer": 60}], ids=["", "with momentum_buffer"])
def test_an_authors_friendly_sam_checkpoint_loads(backend, momentum_buffer):
    """Their wrapper keeps m and old_p; its groups know neither sigma nor lmbda, which sit on the object."""
    entries = {"momentum": 20, "old_p": 40, **momentum_buffer}
    reference, problem = mlp(), mlp()
    optimizer = build_optimizer("F-SAM sigma=0.5 lmbda=0.6", "SGD momentum", problem.params(), backend)
    optimizer.load_state_dict(authors_checkpoint(problem.params(), **entries))
    assert optimizer.param_groups[0]["sigma"] == 0.5 and optimizer.param_groups[0]["lmbda"] == 0.6
    assert all("old_p" not in entry for entry in optimizer.state_dict()["state"].values())

    loop = ReferenceFriendlySAM(
        reference.params(),
        torch.optim.SGD,
        rho=0.05,
        sigma=0.5,
        lmbda=0.6,
        lr=0.05,
        momentum=0.9,
        weight_decay=5e-4,
    )
    saved = authors_checkpoint(reference.params(), **entries)["state"]
    for i, p in enumerate(reference.params()):
        loop.momentum[p] = saved[i]["momentum"]
        if momentum_buffer:
            loop.base_optimizer.state[p]["momentum_buffer"] = saved[i]["momentum_buffer"]
    torch.testing.assert_close(train(optimizer, problem, 6), train(loop, reference, 6), rtol=1e-11, atol=1e-11)


def test_a_davda54_checkpoint_loads(backend):
    reference, problem = mlp(), mlp()
    optimizer = build_optimizer("SAM", "SGD momentum", problem.params(), backend, rho=0.3)
    optimizer.load_state_dict(authors_checkpoint(problem.params(), old_p=40))
    assert optimizer.param_groups[0]["rho"] == AUTHORS_GROUP["rho"]
    assert all("old_p" not in entry for entry in optimizer.state_dict()["state"].values())
    loop = build_reference("SAM", "SGD momentum", reference.params())
    torch.testing.assert_close(train(optimizer, problem, 6), train(loop, reference, 6), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", ["SAM", "F-SAM sigma=0.5 lmbda=0.9", "Eigen-SAM given v"])
def test_a_checkpoint_of_the_plain_base_optimizer_loads(backend, method, base):
    problem = mlp()
    loop = build_reference(method, base, problem.params(), rho=0.0)
    train(loop, problem, 4)
    checkpoint = save_and_load(problem, loop.base_optimizer)
    again, optimizer = resume(checkpoint, method, base, backend, problem.batch, rho=0.0)
    assert optimizer.param_groups[0]["rho"] == 0.0
    torch.testing.assert_close(train(optimizer, again, 6), train(loop, problem, 6), rtol=1e-11, atol=1e-11)


def test_a_checkpoint_loads_into_the_plain_base_optimizer(backend):
    problem, optimizer = trained("SAM", "SGD momentum", backend)
    plain = torch.optim.SGD(mlp().params(), lr=1.0, momentum=0.1)
    plain.load_state_dict(optimizer.state_dict())
    for p, q in zip(plain.param_groups[0]["params"], problem.params(), strict=True):
        assert torch.equal(plain.state[p]["momentum_buffer"], optimizer.state[q]["momentum_buffer"])


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", ALL_METHODS)
def test_a_copied_optimizer_goes_on_alone(backend, method, base, how):
    problem, optimizer = trained(method, base, backend)
    twin_problem, twin = how((problem, optimizer))
    assert twin.param_groups is twin.base_optimizer.param_groups and twin.state is twin.base_optimizer.state
    before = problem.weights()
    torch.manual_seed(1)
    end = train(twin, twin_problem, 5)
    assert torch.equal(problem.weights(), before)
    torch.manual_seed(1)
    assert torch.equal(train(optimizer, problem, 5), end)


def loaded_into_a_fresh_one(pair, method, base, backend):
    problem, optimizer = pair
    again, resumed = fresh(method, base, backend)
    resumed.add_param_group({"params": [torch.nn.Parameter(torch.ones(3, dtype=torch.float64))]})
    again.model.load_state_dict(problem.model.state_dict())
    again.batch = problem.batch
    resumed.load_state_dict(save_and_load(problem, optimizer)["optimizer"])
    return again, resumed


@pytest.mark.parametrize("how", [
    lambda pair, *_: copy.deepcopy(pair), lambda pair, *_: pickle.loads(pickle.dumps(pair)), loaded_into_a_fresh_one
], ids=["deepcopy", "pickle", "load_state_dict"])  # fmt: skip
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", ["F-SAM sigma=0.5 lmbda=0.9", "Eigen-SAM given v"])
def test_a_parameter_that_the_base_optimizer_has_not_met_yet_comes_back(backend, method, base, how):
    problem, optimizer = trained(method, base, backend)
    beside = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer.add_param_group({"params": [beside]})
    if METHODS[method].eigenvector:
        optimizer.eigenvector = optimizer.eigenvector
    else:
        beside.grad = torch.ones_like(beside)  # in the first pass alone
        problem.closure()
        optimizer.first_step(zero_grad=True)
        problem.closure()
        optimizer.second_step(zero_grad=True)
    assert optimizer.state[beside].keys() <= {"momentum", "eigenvector"}
    twin_problem, twin = how((problem, optimizer), method, base, backend)
    assert state_bits(twin, twin.param_groups[1]["params"]) == state_bits(optimizer, [beside])
    assert torch.equal(train(twin, twin_problem, 3), train(optimizer, problem, 3))


def test_a_checkpoint_with_other_groups_is_refused_and_changes_nothing(backend):
    problem, optimizer = trained("F-SAM sigma=0.5 lmbda=0.9", "SGD momentum", backend)
    before = state_bits(optimizer, problem.params())
    other = torch.optim.SGD([{"params": problem.params()[:1]}, {"params": problem.params()[1:]}], lr=0.1)
    with pytest.raises(ValueError, match="group"):
        optimizer.load_state_dict(other.state_dict())
    assert state_bits(optimizer, problem.params()) == before
    train(optimizer, problem, 1)


def test_a_checkpoint_cannot_be_loaded_between_the_passes(backend):
    problem, optimizer = trained("SAM", "SGD momentum", backend)
    checkpoint = save_and_load(problem, optimizer)["optimizer"]
    problem.closure()
    optimizer.first_step()
    with pytest.raises(RuntimeError, match="second_step"):
        optimizer.load_state_dict(checkpoint)
    optimizer.second_step()


def test_low_precision_state_keeps_its_dtype(backend):
    params = [torch.nn.Parameter(noise((40, 3), 1, torch.bfloat16))]
    fresh_params = [torch.nn.Parameter(params[0].detach().clone())]
    optimizer, resumed = (
        fastsam.FriendlySAM(p, torch.optim.AdamW, lr=0.01, backend=backend) for p in (params, fresh_params)
    )
    for one, members in ((optimizer, params), (resumed, fresh_params)):
        if one is resumed:
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            resumed.load_state_dict(torch.load(file, weights_only=True))
            with torch.no_grad():
                members[0].copy_(params[0])
        for k in range(3):
            members[0].grad = noise((40, 3), 5 + k, torch.bfloat16)
            one.first_step()
            one.second_step()
        if one is optimizer:
            keys = {key: value.dtype for key, value in optimizer.state[params[0]].items()}
            assert keys.pop("step") == torch.float32
            assert set(keys.values()) == {torch.bfloat16}
    for k in range(3):
        params[0].grad = noise((40, 3), 5 + k, torch.bfloat16)
        optimizer.first_step()
        optimizer.second_step()
    assert torch.equal(params[0], fresh_params[0])
