"""Two ranks of a training, of which the second stops between the passes of a step and lives on."""

import datetime
import os
import signal

import torch
import torch.distributed as dist
from rank_training import spread

TIMEOUT = datetime.timedelta(seconds=5)
#: Until both have taken a step; one may have been kept from starting for a while.
PATIENCE = datetime.timedelta(seconds=120)


def train(rank, how, address, connection):
    """Rank 1 is stopped (SIGSTOP) before its fourth backward pass; rank 0 tells what became of it."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2, timeout=PATIENCE)
    training = spread(how)
    optimizer = training.optimizer("F-SAM", "SGD")
    local = [getattr(p, "_local_tensor", p) for p in training.model.parameters()]
    passes = []

    def closure():
        passes.append(None)
        if rank == 1 and len(passes) == 4:
            os.kill(os.getpid(), signal.SIGSTOP)
        return training.closure()

    optimizer.step(closure, model=training.model)
    dist.distributed_c10d._set_pg_timeout(TIMEOUT)
    before = [p.detach().clone() for p in local]
    try:
        optimizer.step(closure, model=training.model)
    except Exception as error:
        restored = all(map(torch.equal, local, before))
        connection.send((str(error), restored, len(passes)))
    os._exit(0)  # a process group that has lost a rank is not destroyed in good order
