"""What the ranks do with narrow state and with weights that are rounded at random."""

import torch
import torch.distributed.checkpoint as dcp
from reference.scripted import noise, set_gradients
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

import fastsam

OWN = {"FriendlySAM": "momentum", "EigenSAM": "eigenvector"}


def network(dtype, sharded):
    """Rows that two ranks cannot share evenly, nor four."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 5)).to(dtype)
    return fully_shard(model) if sharded else model


def gradients(params, k):
    """Whole numbers, so that no order of summation rounds their norm another way."""
    found = [noise(p.shape, 100 * k + i).mul(3).round().to(p.dtype) for i, p in enumerate(params)]
    placed = zip(found, params, strict=True)
    return [distribute_tensor(g, p.device_mesh, p.placements) if isinstance(p, DTensor) else g for g, p in placed]


def take_steps(optimizer, params, first, count):
    for k in range(2 * first, 2 * (first + count)):
        set_gradients(params, gradients(params, k))
        (optimizer.second_step if k % 2 else optimizer.first_step)()


def whole(tensors):
    return [(t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for t in tensors]


def stochastic_weights(sharded):
    """The weights after three steps over AdamW."""
    model = network(torch.bfloat16, sharded)
    params = list(model.parameters())
    optimizer = fastsam.SAM(params, torch.optim.AdamW, lr=0.01, backend="cpu", stochastic_rounding=True)
    take_steps(optimizer, params, 0, 3)
    return whole(params)


def optimizer_of(name, params, dtype):
    optimizer = getattr(fastsam, name)(params, torch.optim.SGD, lr=0.1, momentum=0.9, state_dtype=dtype)
    if name == "EigenSAM":
        optimizer.eigenvector = [torch.ones_like(p) / 3 for p in params]
    return optimizer


def cast_by_a_checkpoint(folder, name, before, after):
    """Whether what an optimizer of another ``state_dtype`` loads is what was saved, cast, and its dtypes."""
    model = network(torch.float32, sharded=True)
    params = list(model.parameters())
    optimizer = optimizer_of(name, params, before)
    take_steps(optimizer, params, 0, 2)
    dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=folder)
    saved = whole(optimizer.state[p][OWN[name]] for p in params)
    set_gradients(params, [None] * len(params))  # torch fills the state of an optimizer without gradients alone
    resumed = optimizer_of(name, params, after)
    state = get_optimizer_state_dict(model, resumed)
    dcp.load({"optimizer": state}, checkpoint_id=folder)
    set_optimizer_state_dict(model, resumed, state)
    loaded = whole(resumed.state[p][OWN[name]] for p in params)
    same = all(torch.equal(a.to(after), b) for a, b in zip(saved, loaded, strict=True))
    take_steps(resumed, params, 2, 1)
    kept = {resumed.state[p][OWN[name]].dtype for p in params}
    return same, any(bool(v.any()) for v in loaded), kept
