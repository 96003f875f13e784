"""Resuming from other implementations' checkpoints and through torch's distributed state-dict helpers."""

import io

import pytest
import torch
from reference import METHODS, build_optimizer, build_reference, mlp
from reference.scripted import bits, noise, state_bits

import fastsam

ALL_METHODS = ["SAM", "ASAM", "F-SAM sigma=0.5 lmbda=0.9", "Eigen-SAM given v"]
BASES = ["SGD", "SGD momentum", "AdamW", "RMSprop"]


def train(optimizer, problem, steps):
    for _ in range(steps):
        problem.next_batch()
        for step in (optimizer.first_step, optimizer.second_step):
            optimizer.zero_grad()
            problem.closure()
            step()
    return problem.weights()


def trained(method, base, backend="auto", steps=4):
    problem = mlp()
    optimizer = build_optimizer(method, base, problem.params(), backend)
    if steps and METHODS[method].eigenvector == "given":
        optimizer.eigenvector = [noise(p.shape, 900 + i) * 0.1 for i, p in enumerate(problem.params())]
    train(optimizer, problem, steps)
    return problem, optimizer


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# ---- torch.distributed.checkpoint ----------------------------------------------------------------


@pytest.mark.parametrize("flat", [False, True], ids=["", "flattened"])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", ALL_METHODS)
def test_the_distributed_state_dict_helpers_round_trip(backend, method, base, flat):
    helpers = pytest.importorskip("torch.distributed.checkpoint.state_dict")
    options = helpers.StateDictOptions(flatten_optimizer_state_dict=flat, strict=base != "SGD")
    problem, optimizer = trained(method, base, backend)
    saved = helpers.get_optimizer_state_dict(problem.model, optimizer, options=options)
    saved = through_a_file(saved)
    again, resumed = trained(method, base, backend, steps=0)
    again.model.load_state_dict(problem.model.state_dict())
    weights = bits(again.params())
    helpers.set_optimizer_state_dict(again.model, resumed, saved, options=options)
    assert bits(again.params()) == weights, "loading moves no weight"
    again.batch = problem.batch
    assert torch.equal(train(resumed, again, 4), train(optimizer, problem, 4))
    assert state_bits(resumed, again.params()) == state_bits(optimizer, problem.params())


def test_asking_for_empty_state_is_no_way_around_the_closure():
    _problem, optimizer = trained("SAM", "SGD momentum", steps=1)
    optimizer.zero_grad()
    with pytest.raises(TypeError, match="closure"):
        optimizer.step()


# ---- other implementations -----------------------------------------------------------------------


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("method", ["SAM", "FriendlySAM"])
def test_a_pytorch_optimizer_checkpoint_continues(backend, method, base):
    theirs_class = getattr(pytest.importorskip("pytorch_optimizer"), method)
    options = dict(lr=0.01, weight_decay=0.01, **({"momentum": 0.9} if base is torch.optim.SGD else {}))
    reference = mlp()
    theirs = theirs_class(reference.params(), base, rho=0.05, **options)
    train(theirs, reference, 4)
    saved = through_a_file({"model": reference.model.state_dict(), "optimizer": theirs.state_dict()})
    problem = mlp()
    problem.model.load_state_dict(saved["model"])
    optimizer = getattr(fastsam, method)(problem.params(), base, rho=0.3, backend=backend, **options)
    optimizer.load_state_dict(saved["optimizer"])
    assert optimizer.param_groups[0]["rho"] == 0.05
    problem.batch = reference.batch
    if method == "FriendlySAM":
        for p, q in zip(problem.params(), reference.params(), strict=True):
            assert torch.equal(optimizer.state[p]["momentum"], theirs.state[q]["momentum"])
    torch.testing.assert_close(train(optimizer, problem, 4), train(theirs, reference, 4), rtol=1e-7, atol=1e-8)


def test_a_checkpoint_written_between_the_passes_of_davda54s_code_names_no_backup(backend):
    problem, loop = mlp(), None
    loop = build_reference("SAM", "SGD momentum", problem.params())
    train(loop, problem, 2)
    saved = loop.base_optimizer.state_dict()
    for i, p in enumerate(problem.params()):
        saved["state"][i]["old_p"] = p.detach().clone()
    optimizer = build_optimizer("SAM", "SGD momentum", problem.params(), backend)
    optimizer.load_state_dict(saved)
    assert all("old_p" not in entry for entry in optimizer.state.values())


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(("saved", "loaded"), [
    ("F-SAM sigma=0.5 lmbda=0.9", "SAM"), ("Eigen-SAM given v", "SAM"), ("SAM", "F-SAM sigma=0.5 lmbda=0.9"),
    ("Eigen-SAM given v", "F-SAM sigma=0.5 lmbda=0.9"), ("F-SAM sigma=0.5 lmbda=0.9", "Eigen-SAM given v"),
])  # fmt: skip
def test_another_methods_checkpoint_is_refused_and_nothing_is_lost(backend, saved, loaded):
    _, other = trained(saved, "SGD momentum", backend)
    problem, optimizer = trained(loaded, "SGD momentum", backend)
    before = state_bits(optimizer, problem.params()), dict(optimizer.param_groups[0])
    with pytest.raises(ValueError, match="another method"):
        optimizer.load_state_dict(other.state_dict())
    assert state_bits(optimizer, problem.params()) == before[0]
    assert {k: v for k, v in optimizer.param_groups[0].items() if k != "params"} == {
        k: v for k, v in before[1].items() if k != "params"
    }
    train(optimizer, problem, 1)


@pytest.mark.parametrize(("saved", "loaded", "error"), [
    ("SGD momentum", "AdamW", ValueError), ("RMSprop", "AdamW", ValueError), ("AdamW", "SGD momentum", ValueError),
    ("RMSprop", "SGD momentum", ValueError), ("AdamW", "SGD", ValueError),
    ("SGD momentum", "RMSprop", KeyError),  # torch's own
])  # fmt: skip
def test_another_base_optimizers_checkpoint_is_refused_and_nothing_is_lost(backend, saved, loaded, error):
    _, other = trained("SAM", saved, backend)
    problem, optimizer = trained("SAM", loaded, backend)
    before = state_bits(optimizer, problem.params()), str(optimizer.param_groups)
    with pytest.raises(error, match="another base optimizer" if error is ValueError else "step"):
        optimizer.load_state_dict(other.state_dict())
    assert (state_bits(optimizer, problem.params()), str(optimizer.param_groups)) == before
    assert optimizer.base_optimizer.state is optimizer.state
    assert optimizer.base_optimizer.param_groups is optimizer.param_groups
    train(optimizer, problem, 1)


def test_an_authors_friendly_checkpoint_does_not_load_into_sam(backend):
    problem, optimizer = trained("SAM", "SGD momentum", backend)
    saved = torch.optim.SGD(problem.params(), lr=0.1).state_dict()
    saved["state"] = {i: {"momentum": torch.zeros_like(p)} for i, p in enumerate(problem.params())}
    with pytest.raises(ValueError, match="momentum"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize("key", ["momentum", "momentum_buffer"])
def test_other_shapes_are_refused_and_nothing_is_lost(backend, key):
    problem, optimizer = trained("F-SAM sigma=0.5 lmbda=0.9", "SGD momentum", backend)
    before = state_bits(optimizer, problem.params())
    saved = optimizer.state_dict()
    saved["state"] = {i: dict(entry) for i, entry in saved["state"].items()}
    saved["state"][0][key] = torch.zeros(1)  # would broadcast
    with pytest.raises(ValueError, match=rf"{key}.*\(1,\).*\(16, 8\)"):
        optimizer.load_state_dict(saved)
    assert state_bits(optimizer, problem.params()) == before
    train(optimizer, problem, 1)
