"""What the ranks do: the same small training on one process and on many, however it is spread."""

import contextlib
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import fastsam

BATCHES, BATCH_SIZE = 5, 16
METHODS = {
    "SAM": (fastsam.SAM, dict(rho=0.05)),
    "ASAM": (fastsam.SAM, dict(rho=0.5, adaptive=True)),
    "F-SAM": (fastsam.FriendlySAM, dict(rho=0.1, sigma=1.0, lmbda=0.6)),
    "Eigen-SAM": (fastsam.EigenSAM, dict(rho=0.1, alpha=0.5, freq=1000)),
}
#: One of each kind of the rest: along the momentum, with both gradients, and with one that is kept from step to step.
FAMILY = {
    "Momentum-SAM": (fastsam.MomentumSAM, dict(rho=0.3)),
    "VaSSO": (fastsam.VaSSO, dict(rho=0.1, theta=0.4)),
    "GSAM": (fastsam.GSAM, dict(rho=0.1)),
    "WSAM": (fastsam.WSAM, dict(rho=0.1, gamma=0.8)),
    "LookSAM": (fastsam.LookSAM, dict(rho=0.1, k=2)),
}
BASES = {
    "SGD": (torch.optim.SGD, dict(lr=0.05, momentum=0.9, weight_decay=1e-3)),
    "AdamW": (torch.optim.AdamW, dict(lr=0.01)),
    "RMSprop": (torch.optim.RMSprop, dict(lr=0.005)),
}


class Network(nn.Module):
    """Its widths divide by neither 2 nor 4 everywhere: some shards are uneven and some are empty."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 10)
        self.down = nn.Linear(10, 3)

    def forward(self, x):
        return self.down(torch.tanh(self.up(self.norm(x))))


@dataclass
class Training:
    """One rank's share of the problem; ``share`` of ``shares`` is its part of every batch."""

    dtype: torch.dtype = torch.float64
    share: int = 0
    shares: int = 1
    model: nn.Module = None
    losses: list = field(default_factory=list)

    def __post_init__(self):
        generator = torch.Generator().manual_seed(5)
        self.inputs = torch.randn(BATCHES, BATCH_SIZE, 8, generator=generator).to(self.dtype)
        self.targets = torch.randint(0, 3, (BATCHES, BATCH_SIZE), generator=generator)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.model = Network().to(self.dtype)
        self.step = 0

    def loss(self):
        size = BATCH_SIZE // self.shares
        mine = slice(self.share * size, (self.share + 1) * size)
        batch = self.step % BATCHES
        return nn.functional.cross_entropy(self.model(self.inputs[batch, mine]), self.targets[batch, mine])

    def closure(self):
        loss = self.loss()
        loss.backward()
        return loss

    def optimizer(self, method, base, **options):
        kind, own = {**METHODS, **FAMILY}[method]
        base_kind, base_options = BASES[base]
        return kind(self.model.parameters(), base_kind, **own, **base_options, **options)

    def run(self, optimizer, steps, **options):
        """Whole steps by closures; returns the weights afterwards as one vector."""
        for _ in range(steps):
            self.losses.append(float(optimizer.step(self.closure, **options).detach()))
            self.step += 1
        return self.weights()

    def weights(self):
        return torch.cat([whole(p.detach()).reshape(-1) for p in self.model.parameters()])


def spread(how, dtype=torch.float64, **options):
    """This rank's :class:`Training`, spread over all ranks in one of the ways of ``SPREADS``."""
    return SPREADS[how](dtype, **options)


def on_one(dtype):
    return Training(dtype)


def data_parallel(dtype, **options):
    training = Training(dtype, dist.get_rank(), dist.get_world_size())
    training.model = DistributedDataParallel(training.model, **options)
    return training


def fully_sharded(dtype, **options):
    training = Training(dtype, dist.get_rank(), dist.get_world_size())
    fully_shard(training.model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)), **options)
    return training


def fully_sharded_tensor_parallel(dtype):
    """Data over two ranks, each layer over two: a 2 x 2 mesh."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    training = Training(dtype, mesh["data"].get_local_rank(), 2)
    parallelize_module(training.model, mesh["tensor"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    fully_shard(training.model, mesh=mesh["data"])
    return training


def replicated_shards(dtype):
    """HSDP: shards over two ranks, replicas of them over two."""
    training = Training(dtype, dist.get_rank(), dist.get_world_size())
    fully_shard(training.model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    return training


SPREADS = {
    "one": on_one,
    "DDP": data_parallel,
    "FSDP2": fully_sharded,
    "FSDP2 x TP": fully_sharded_tensor_parallel,
    "HSDP": replicated_shards,
}


def whole(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def set_eigenvector(optimizer):
    """The same unit vector everywhere, given as whole tensors."""
    generator = torch.Generator().manual_seed(3)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    v = [torch.randn(p.shape, dtype=torch.float64, generator=generator).to(p.dtype) for p in params]
    length = torch.cat([x.reshape(-1) for x in v]).norm()
    optimizer.eigenvector = [x / length for x in v]


def trajectory(how, method, base, steps, dtype=torch.float64):
    """Weights after ``steps`` steps, and the mean of each step's losses over the ranks."""
    training = spread(how, dtype)
    optimizer = training.optimizer(method, base)
    if method == "Eigen-SAM":
        set_eigenvector(optimizer)
    weights = training.run(optimizer, steps)
    losses = torch.tensor(training.losses, dtype=torch.float64)
    if how != "one":
        dist.all_reduce(losses)
        losses /= dist.get_world_size()
    return weights, losses


def clipped(how, base):
    """F-SAM with the second gradient clipped to a norm that is below its own."""
    training = spread(how)
    return training.run(training.optimizer("F-SAM", base), 10, max_norm=0.05)


def trajectories(how, cases, steps, dtype):
    return {case: trajectory(how, *case, steps, dtype) for case in cases}


@contextlib.contextmanager
def counted_collectives():
    """The collectives inside, as (name, bytes)."""
    from torch.distributed._functional_collectives import AsyncCollectiveTensor  # noqa: F401  (registers the operators)
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.namespace in ("c10d", "_c10d_functional"):
                flat = torch.utils._pytree.tree_leaves(args)
                tensors = [x for x in flat if isinstance(x, torch.Tensor)]
                seen.append((function._schema.name.split("::")[1], sum(x.numel() * x.element_size() for x in tensors)))
            return function(*args, **(kwargs or {}))

    seen = []
    with Counter():
        yield seen
