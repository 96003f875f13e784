"""What the ranks count for the cost model: bytes that an optimizer keeps, and what a step sends."""

import functools
import gc

import torch
import torch.distributed as dist
from rank_training import counted_collectives
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastsam

METHODS = {
    "SAM": fastsam.SAM,
    "F-SAM": fastsam.FriendlySAM,
    "Eigen-SAM": fastsam.EigenSAM,
    "F-SAM, m in bfloat16": functools.partial(fastsam.FriendlySAM, state_dtype=torch.bfloat16),
    "Eigen-SAM, v in bfloat16": functools.partial(fastsam.EigenSAM, state_dtype=torch.bfloat16),
    "MomentumSAM": fastsam.MomentumSAM,
    "AdamW": None,
}
WIDTH, LAYERS = 64, 3
PARAMETERS = LAYERS * (WIDTH * WIDTH + WIDTH)


def network(layout):
    """Layers, each gathered by itself, in bfloat16; gradients are reduced in float32."""
    layers = [nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)]
    if layout.startswith("DDP"):
        return DistributedDataParallel(nn.Sequential(*layers))
    ranks = dist.get_world_size()
    shape, names = ((ranks,), ("shard",)) if layout == "FSDP2" else ((2, ranks // 2), ("replicate", "shard"))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    return nn.Sequential(*layers)


def live_bytes():
    """Of every tensor there is, each storage once."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if isinstance(x, torch.Tensor)]
    tensors = [getattr(x, "_local_tensor", x) for x in tensors]
    return sum({x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}.values())


def measure(layout, method):
    """(bytes of state, collectives of a step as (name, bytes), bytes of each bucket that DDP reduced)."""
    torch.manual_seed(0)
    model = network(layout)
    x = torch.randn(4, WIDTH)

    def closure():
        loss = model(x).float().square().mean()
        loss.backward()
        return loss

    closure()
    model.zero_grad()
    before = live_bytes()
    kind, more = METHODS[method], {"model": model}
    if kind is None:
        optimizer, more = torch.optim.AdamW(model.parameters(), foreach=False), {}
    else:
        optimizer = kind(model.parameters(), torch.optim.AdamW, m_sharpness=layout.endswith("m-sharpness"))
    if method.startswith("Eigen-SAM"):
        optimizer.eigenvector = [torch.ones_like(p) for p in model.parameters()]
    optimizer.step(closure, **more)  # what is done once is done
    model.zero_grad()
    state = live_bytes() - before
    reduced = []

    def hook(group, bucket):
        reduced.append(bucket.buffer().numel() * bucket.buffer().element_size())
        return allreduce_hook(group, bucket)

    if layout.startswith("DDP"):
        model.register_comm_hook(None, hook)
    with counted_collectives() as seen:
        optimizer.step(closure, **more)
    return state, seen, reduced


def measure_all(layout, methods):
    return {method: measure(layout, method) for method in methods}
