"""What each rank does in test_ranks.py."""

import contextlib
import os
import signal

import torch
import torch.distributed as dist
from rank_pool import Last
from rank_training import METHODS, Training, counted_collectives, data_parallel, set_eigenvector, spread, whole
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

import fastsam

# ---- two modes under DDP ---------------------------------------------------------------------------------------


def m_sharpness(method, steps, ddp_options, by_hand=False):
    training = data_parallel(torch.float64, **ddp_options)
    optimizer = training.optimizer(method, "SGD", m_sharpness=True)
    if method == "Eigen-SAM":
        set_eigenvector(optimizer)
    if not by_hand:
        return training.run(optimizer, steps, model=training.model)
    for _ in range(steps):
        with training.model.no_sync():
            training.closure()
        optimizer.first_step(zero_grad=True)
        training.closure()
        optimizer.second_step(zero_grad=True)
        training.step += 1
    return training.weights()


def simulated_ranks(method, steps, n):
    """m-sharpness on one process, by hand: each rank's own perturbation of common weights, and the mean update."""
    ranks = [Training(torch.float64, share, n) for share in range(n)]
    optimizers = [training.optimizer(method, "SGD") for training in ranks]
    for optimizer in optimizers:
        if method == "Eigen-SAM":
            set_eigenvector(optimizer)
    for _ in range(steps):
        for training, optimizer in zip(ranks, optimizers, strict=True):
            training.closure()
            optimizer.first_step(zero_grad=True)
            training.closure()
        every = [list(training.model.parameters()) for training in ranks]
        for same in zip(*every, strict=True):
            mean = torch.stack([p.grad for p in same]).mean(0)
            for p in same:
                p.grad = mean.clone()
        for training, optimizer in zip(ranks, optimizers, strict=True):
            optimizer.second_step(zero_grad=True)
            training.step += 1
    return ranks[0].weights()


def synchronised(method, ddp_options, options):
    training = data_parallel(torch.float64, **ddp_options)
    return training.run(training.optimizer(method, "SGD"), 5, model=training.model, **options)


def accumulated(m_sharp):
    """Two micro-batches of a step; the simulation's mean is over ranks and micro-batches."""
    training = data_parallel(torch.float64, gradient_as_bucket_view=True)
    optimizer = training.optimizer("SAM", "SGD", m_sharpness=m_sharp)
    for _ in range(3):
        for _ in range(2):
            optimizer.accumulate(lambda: _halved(training), model=training.model)
            training.step += 1
        optimizer.descend(zero_grad=True)
    return training.weights()


def _halved(training):
    loss = training.loss() / 2
    loss.backward()
    return loss


def accumulated_on_one(n):
    ranks = [Training(torch.float64, share, n) for share in range(n)]
    optimizers = [training.optimizer("SAM", "SGD") for training in ranks]
    for _ in range(3):
        for training, optimizer in zip(ranks, optimizers, strict=True):
            for _ in range(2):
                optimizer.accumulate(lambda training=training: _halved(training))
                training.step += 1
        for same in zip(*(training.model.parameters() for training in ranks), strict=True):
            mean = torch.stack([p.grad for p in same]).mean(0)
            for p in same:
                p.grad = mean.clone()
        for optimizer in optimizers:
            optimizer.descend(zero_grad=True)
    return ranks[0].weights()


# ---- collectives -----------------------------------------------------------------------------------------------


def collectives(how, method, options, base="SGD"):
    """Those of one step, and of its forward and backward passes alone."""
    training = spread(how)
    optimizer = training.optimizer(method, base, **options)
    if method == "Eigen-SAM":
        set_eigenvector(optimizer)
    model = training.model if how == "DDP" else None
    training.run(optimizer, 2, model=model)
    with counted_collectives() as step:
        optimizer.step(training.closure, model=model)
    with counted_collectives() as passes:
        for _ in range(2):
            training.closure()
            training.model.zero_grad()
    for seen in passes:
        step.remove(seen)
    return passes, step


def collectives_of_m_sharpness():
    """Elements of every bucket of gradients that a step reduces, and of all the parameters."""
    training = data_parallel(torch.float64)
    optimizer = training.optimizer("SAM", "SGD", m_sharpness=True)
    training.run(optimizer, 2, model=training.model)
    reduced = []

    def hook(state, bucket):
        reduced.append(bucket.buffer().numel())
        return allreduce_hook(None, bucket)

    training.model.register_comm_hook(None, hook)
    training.run(optimizer, 1, model=training.model)
    return reduced, sum(p.numel() for p in training.model.parameters())


# ---- what FSDP2 can be told ------------------------------------------------------------------------------------


def mixed_precision():
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    training = spread("FSDP2", torch.float32, mp_policy=policy)
    optimizer = training.optimizer("F-SAM", "AdamW")
    training.inputs = training.inputs.bfloat16()
    before = training.weights()
    after = training.run(optimizer, 5)
    p = next(iter(training.model.parameters()))
    return before, after, p.dtype, optimizer.state[p]["momentum"].dtype, type(optimizer.state[p]["momentum"]).__name__


def offloaded():
    training = spread("FSDP2", torch.float64, offload_policy=CPUOffloadPolicy(pin_memory=False))
    return training.run(training.optimizer("F-SAM", "SGD"), 10)


def compiled_blocks():
    training = spread("FSDP2", torch.float64)
    training.model.up.compile(backend="aot_eager")
    return training.run(training.optimizer("F-SAM", "SGD"), 5)


def sharded_state():
    """State is placed like its parameter, and its memory is the shard's."""
    training = spread("FSDP2")
    optimizer = training.optimizer("F-SAM", "SGD")
    training.run(optimizer, 1)
    p = training.model.up.weight
    m = optimizer.state[p]["momentum"]
    return m.placements == p.placements, m._local_tensor.shape == p._local_tensor.shape, m.shape == p.shape


def placements_of_one_tensor(placements, gradient_placements):
    """One step of SAM on a tensor of eight numbers over two ranks, whatever its placement and its gradient's."""
    mesh = init_device_mesh("cpu", (2,))
    weight = torch.arange(8, dtype=torch.float64) / 4
    gradients = [torch.linspace(1, 2, 8, dtype=torch.float64), torch.linspace(-1, 1, 8, dtype=torch.float64) ** 2]
    p = nn.Parameter(distribute_tensor(weight, mesh, placements))
    optimizer = fastsam.SAM([p], torch.optim.SGD, rho=0.3, lr=0.1)
    climbed = None
    for pass_, g in zip((optimizer.first_step, optimizer.second_step), gradients, strict=True):
        if gradient_placements == [Partial()]:
            part = g * (0.25 if dist.get_rank() else 0.75)
            p.grad = DTensor.from_local(part, mesh, [Partial()])
        else:
            p.grad = distribute_tensor(g, mesh, gradient_placements)
        pass_(zero_grad=True)
        climbed = whole(p.detach()).clone() if climbed is None else climbed
    return climbed, whole(p.detach())


def plain_beside_sharded():
    """A sharded parameter and, in another group, one that every rank holds whole: the norm counts it once."""
    mesh = init_device_mesh("cpu", (2,))
    sharded = nn.Parameter(distribute_tensor(torch.zeros(4, dtype=torch.float64), mesh, [Shard(0)]))
    plain = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    groups = [{"params": [sharded]}, {"params": [plain]}]
    optimizer = fastsam.SAM(groups, torch.optim.SGD, rho=1.0, lr=0.1)
    sharded.grad = distribute_tensor(torch.full((4,), 2.0, dtype=torch.float64), mesh, [Shard(0)])
    plain.grad = torch.full((3,), 1.0, dtype=torch.float64)
    with optimizer.perturbed():
        return whole(sharded.detach()).clone(), plain.detach().clone()


def pipeline():
    """Each rank holds one stage; the norm is that of the whole model."""
    p = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = fastsam.SAM([p], torch.optim.SGD, rho=1.0, lr=0.1, process_group=dist.group.WORLD)
    p.grad = torch.full((2,), float(3 + dist.get_rank()), dtype=torch.float64)
    with optimizer.perturbed():
        return p.detach().clone()


# ---- faults ----------------------------------------------------------------------------------------------------


def nan_on_one_rank(how, where, options=()):
    """Rank 1's loss is NaN in one pass of the second step: weights and state before and after it, and found_inf."""
    training = spread(how)
    optimizer = training.optimizer("F-SAM", "AdamW", **dict(options))
    passes = {"model": training.model} if how == "DDP" else {}
    training.run(optimizer, 1, **passes)
    before = training.weights(), _state(optimizer)
    calls = []

    def closure():
        calls.append(None)
        loss = training.loss()
        if len(calls) == where and dist.get_rank() == 1:
            loss = loss * float("nan")
        loss.backward()
        return loss

    optimizer.step(closure, **passes)
    after = training.weights(), _state(optimizer)
    found = float(optimizer.found_inf)
    training.run(optimizer, 1, **passes)
    return before, after, found, bool(training.weights().isfinite().all())


def nan_in_one_shard():
    """A NaN that only rank 1's shard sees, in the second gradient."""
    training = spread("FSDP2")
    optimizer = training.optimizer("SAM", "SGD")
    training.run(optimizer, 1)
    before = training.weights()
    training.closure()
    optimizer.first_step(zero_grad=True)
    training.closure()
    if dist.get_rank() == 1:
        training.model.up.weight.grad._local_tensor[0, 0] = float("nan")
    optimizer.second_step(zero_grad=True)
    return before, training.weights()


def _state(optimizer):
    return [whole(v).clone() for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]


def overflow_on_one_rank(m_sharp):
    training = data_parallel(torch.float32)
    optimizer = training.optimizer("SAM", "SGD", m_sharpness=m_sharp)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = training.weights()

    def closure():
        loss = training.loss()
        scaler.scale(loss * (3e38 if dist.get_rank() == 1 else 1)).backward()
        return loss

    optimizer.step(closure, model=training.model, grad_scaler=scaler)
    scaler.update()
    return before, training.weights(), scaler.get_scale()


def raised_on_one_rank(how):
    """Rank 1 raises in the second pass, and goes away; what the others get, and where their weights are."""
    training = spread(how)
    optimizer = training.optimizer("SAM", "SGD")
    passes = {"model": training.model} if how == "DDP" else {}
    training.run(optimizer, 1, **passes)
    before = _locals(training)
    calls = []

    def closure():
        calls.append(None)
        if len(calls) == 2 and dist.get_rank() == 1:
            raise RuntimeError("the disk is full")
        return training.closure()

    try:
        optimizer.step(closure, **passes)
        error = None
    except Exception as caught:
        error = f"{caught} " + " ".join(getattr(caught, "__notes__", []))
    same = all(bool((a == b).all()) for a, b in zip(before, _locals(training), strict=True))
    return Last((error, same)) if dist.get_rank() == 1 else (error, same)


def _locals(training):
    return [getattr(p, "_local_tensor", p).detach().clone() for p in training.model.parameters()]


def killed(how):
    """Rank 1 is killed in the second pass; whether the others raise, and where their weights are then."""
    training = spread(how)
    optimizer = training.optimizer("SAM", "SGD")
    optimizer.step(training.closure)
    before = _locals(training)
    calls = []

    def closure():
        calls.append(None)
        if len(calls) == 2 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return training.closure()

    with contextlib.suppress(RuntimeError):
        optimizer.step(closure)
        return "went on", False
    return "raised", all(bool((a == b).all()) for a, b in zip(before, _locals(training), strict=True))


# ---- bad input -------------------------------------------------------------------------------------------------


def different_rho():
    training = spread("FSDP2")
    optimizer = training.optimizer("SAM", "SGD")
    optimizer.param_groups[0]["rho"] = 0.05 + dist.get_rank()
    training.run(optimizer, 1)


def different_methods():
    training = data_parallel(torch.float64)
    optimizer = training.optimizer("SAM" if dist.get_rank() else "F-SAM", "SGD")
    training.run(optimizer, 1, model=training.model)


def different_order():
    training = data_parallel(torch.float64)
    params = list(training.model.parameters())
    if dist.get_rank() == 1:
        params[0], params[1] = params[1], params[0]  # both of shape (8,)
    kind, options = METHODS["SAM"]
    training.run(kind(params, torch.optim.SGD, lr=0.1, **options), 1, model=training.model)


def excluded_rank():
    group = dist.new_group([0])
    p = nn.Parameter(torch.zeros(2))
    optimizer = fastsam.SAM([p], torch.optim.SGD, lr=0.1, process_group=group)
    p.grad = torch.ones(2)
    optimizer.first_step()


def mixed_group():
    mesh = init_device_mesh("cpu", (2,))
    placed = nn.Parameter(distribute_tensor(torch.zeros(4), mesh, [Shard(0)]))
    fastsam.SAM([placed, nn.Parameter(torch.zeros(3))], torch.optim.SGD, lr=0.1)


def partial_parameter():
    mesh = init_device_mesh("cpu", (2,))
    fastsam.SAM([nn.Parameter(DTensor.from_local(torch.zeros(4), mesh, [Partial()]))], torch.optim.SGD, lr=0.1)


def m_sharpness_of_shards():
    spread("FSDP2").optimizer("SAM", "SGD", m_sharpness=True)


def m_sharpness_without_model():
    training = data_parallel(torch.float64)
    training.run(training.optimizer("SAM", "SGD", m_sharpness=True), 1)


def closure_under_no_sync():
    training = data_parallel(torch.float64)
    with training.model.no_sync():
        training.run(training.optimizer("SAM", "SGD"), 1, model=training.model)


def replicas_in_process_group():
    training = data_parallel(torch.float64)
    optimizer = training.optimizer("SAM", "SGD", process_group=dist.group.WORLD)
    training.run(optimizer, 1, model=training.model)


def first_fsdp():
    training = Training()
    training.model = FullyShardedDataParallel(training.model, use_orig_params=True, device_id=torch.device("cpu"))
    training.optimizer("SAM", "SGD")
