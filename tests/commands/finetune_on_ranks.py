"""Runs ``fastsam finetune`` on processes that are forked from one, which has imported what takes long.

``python finetune_on_ranks.py FOLDER < jobs.json``: for each job ``{"name", "ranks", "arguments", "environment",
"kill_at"}`` the exit statuses go to ``FOLDER/NAME.json``, what the processes print to ``FOLDER/NAME.RANK.txt``. Each
has the environment that torchrun gives it. With ``kill_at`` the last process kills itself in that forward pass.
``{rank}`` in an argument is the process's rank.
"""

import gc
import json
import os
import signal
import sys
from pathlib import Path

import accelerate.utils.fsdp_utils  # noqa: F401
import datasets  # noqa: F401
import networks  # noqa: F401
import torch.distributed.fsdp  # noqa: F401
from free_port import free_port
from transformers import ViTForImageClassification

import fastsam.commands.finetune.job
import fastsam.commands.finetune.trainer  # noqa: F401
from fastsam.commands.cli import main


def killed_in_forward(cls, at):
    count, forward = 0, cls.forward

    def counted(*arguments, **options):
        nonlocal count
        count += 1
        if count == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return forward(*arguments, **options)

    cls.forward = counted


def become(job, rank, port, folder):
    ranks = str(job["ranks"])
    if job["ranks"] > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **job.get("environment", {})}
    file = os.open(folder / f"{job['name']}.{rank}.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    if "kill_at" in job and rank == job["ranks"] - 1:
        killed_in_forward(ViTForImageClassification, job["kill_at"])
    sys.argv[:] = ["fastsam", "finetune", *(argument.replace("{rank}", str(rank)) for argument in job["arguments"])]
    try:
        main()
    except SystemExit as end:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(end.code or 0))  # taking the forked interpreter apart would copy all its memory


def run(job, folder):
    port, processes = free_port(), []
    for rank in range(job["ranks"]):
        processes.append(os.fork())
        if processes[-1] == 0:
            become(job, rank, port, folder)
    statuses = {}
    while len(statuses) < len(processes):
        pid, status = os.wait()
        statuses[pid] = os.waitstatus_to_exitcode(status)
        if statuses[pid] == -signal.SIGKILL:  # as torchrun ends the others
            for other in set(processes) - statuses.keys():
                os.kill(other, signal.SIGKILL)
    (folder / f"{job['name']}.json").write_text(json.dumps([statuses[pid] for pid in processes]))


if __name__ == "__main__":
    gc.freeze()
    for job in json.load(sys.stdin):
        run(job, Path(sys.argv[1]))
