"""A vision transformer on many processes, sharded or not, that goes on after a crash.

    torchrun --nproc-per-node 2 examples/distributed_vit.py --parallel fsdp2 --method friendly
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --nnodes 2 --nproc-per-node 8 --max-restarts 3 \\
        --rdzv-backend c10d --rdzv-endpoint host:29400 \\
        examples/distributed_vit.py --model google/vit-base-patch16-224-in21k --folder /shared/run

gloo on CPUs, nccl on GPUs; without torchrun one process. Everything random follows from the seed and the step, so a run
started again has the losses of one that was not disturbed (docs/distributed.md says what the variable is for).
"""

import json
import os
import shutil
from enum import Enum
from pathlib import Path
from tempfile import mkdtemp

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import typer
from rich.progress import Progress
from sklearn.datasets import load_digits
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy, interpolate
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification

from fastsam import SAM, EigenSAM, FriendlySAM
from fastsam.integrations.rank_state import average_momentum

METHODS = {"sam": SAM, "friendly": FriendlySAM, "eigen": EigenSAM}
Method = Enum("Method", {name: name for name in METHODS})
Parallel = Enum("Parallel", {name: name for name in ("ddp", "fsdp2")})
SIZES = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
SMALL = ViTConfig(image_size=8, patch_size=2, num_channels=1, num_labels=10, **SIZES)
TEST_SIZE = 360


class Run:
    """What a checkpoint holds: a ``Stateful`` of torch.distributed.checkpoint."""

    def __init__(self, network, optimizer):
        self.network, self.optimizer, self.step = network, optimizer, 0

    def state_dict(self):
        network, optimizer = get_state_dict(self.network, self.optimizer)
        return {"network": network, "optimizer": optimizer, "step": self.step}

    def load_state_dict(self, state):
        network, optimizer, self.step = state["network"], state["optimizer"], state["step"]
        set_state_dict(self.network, self.optimizer, model_state_dict=network, optim_state_dict=optimizer)


def main(
    parallel: Parallel = Parallel.ddp,
    method: Method = Method.friendly,
    m_sharpness: bool = False,
    model: str = "",
    steps: int = 300,
    batch_size: int = 64,
    folder: Path | None = None,
    save_every: int = 50,
    seed: int = 0,
):
    """Fine-tunes ``model`` (default: a small one with random weights) on scikit-learn's digits."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    alone = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", **alone)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if batch_size % ranks:
        raise typer.BadParameter(f"--batch-size {batch_size}: {ranks} processes cannot share it evenly")
    torch.manual_seed(seed)
    network = ViTForImageClassification(SMALL)
    if model:
        network = AutoModelForImageClassification.from_pretrained(model, num_labels=10, ignore_mismatched_sizes=True)
    images, labels = data(network.to(device).config, device)
    if parallel is Parallel.ddp:
        network = DistributedDataParallel(network)
    else:
        for block in [m for m in network.modules() if type(m).__name__ in network._no_split_modules]:
            fully_shard(block)
        fully_shard(network)
    optimizer = METHODS[method.value](network.parameters(), torch.optim.AdamW, lr=1e-3, m_sharpness=m_sharpness)
    run = Run(network, optimizer)
    folder = folder or Path(from_first(mkdtemp))
    folder.mkdir(parents=True, exist_ok=True)
    last = from_first(lambda: complete(folder)[-1:])
    if last:
        dcp.load({"run": run}, checkpoint_id=last[0])
    with Progress(disable=rank != 0) as progress:
        bar = progress.add_task("", total=steps, completed=run.step)
        while run.step < steps:
            epoch, position = divmod(run.step, (len(labels) - TEST_SIZE) // batch_size)
            order = torch.randperm(len(labels) - TEST_SIZE, generator=torch.Generator().manual_seed(seed + epoch))
            rows = order[position * batch_size :][:batch_size][rank::ranks].to(device)  # this process's of the batch
            torch.manual_seed((seed * steps + run.step) * ranks + rank)  # dropout

            def closure(x=images[rows], y=labels[rows]):
                loss = cross_entropy(network(x).logits, y)
                loss.backward()
                return loss

            loss = optimizer.step(closure, model=network).detach() / ranks
            dist.all_reduce(loss)
            run.step += 1
            if rank == 0:
                progress.update(bar, advance=1, description=f"loss {loss:.3f}")
                with (folder / "losses.jsonl").open("a") as log:
                    print(json.dumps({"step": run.step, "loss": float(loss)}), file=log)
            if run.step % save_every == 0:
                if m_sharpness and optimizer.recipe.averages:
                    average_momentum(optimizer)  # each process has its own, and a checkpoint keeps one
                dcp.save({"run": run}, checkpoint_id=folder / f"step-{run.step:07d}")
                for old in complete(folder)[:-2] if rank == 0 else ():
                    shutil.rmtree(old)
    network.eval()
    right = (network(images[-TEST_SIZE:]).logits.argmax(1) == labels[-TEST_SIZE:]).float().mean()
    if rank == 0:
        print(f"test accuracy {right:.3f}")
    dist.destroy_process_group()


def data(config, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = map(torch.tensor, load_digits(return_X_y=True))
    images = interpolate(images.float().reshape(-1, 1, 8, 8) / 8 - 1, size=config.image_size, mode="bilinear")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))  # writers come one after another
    return images.expand(-1, config.num_channels, -1, -1)[order].to(device), labels[order].to(device)


def from_first(function):
    """What ``function()`` returns on the first process."""
    found = [function() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found)
    return found[0]


def complete(folder: Path) -> list[Path]:
    """The checkpoints in ``folder``, oldest first: those with the file that DCP writes last."""
    return sorted(metadata.parent for metadata in folder.glob("step-*/.metadata"))


if __name__ == "__main__":
    typer.run(main)
