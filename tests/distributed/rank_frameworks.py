"""Accelerate, Transformers and Lightning on two processes: ``python rank_frameworks.py FOLDER`` writes what they did.

One launch for all of them, by Accelerate's ``notebook_launcher``: starting processes costs more than the training.
"""

import os
import sys
import traceback
import warnings
from pathlib import Path

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, SequentialSampler

import fastsam

RANKS, STEPS, SIZE = 2, 4, 6
METHODS = {
    "SAM": lambda params, **more: fastsam.SAM(params, torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9, **more),
    "F-SAM": lambda params, **more: fastsam.FriendlySAM(params, torch.optim.AdamW, rho=0.1, lr=0.01, **more),
    "Momentum-SAM": lambda params, **more: fastsam.MomentumSAM(params, torch.optim.AdamW, rho=0.3, lr=0.01, **more),
    "GSAM": lambda params, **more: fastsam.GSAM(params, torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9, **more),
    "LookSAM": lambda params, **more: fastsam.LookSAM(params, torch.optim.SGD, rho=0.1, k=2, lr=0.1, **more),
}


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def batches(micro_batches):
    """``batches(k)[step][rank][i]``: the i-th micro-batch of a rank in a step, as (inputs, targets)."""
    generator = torch.Generator().manual_seed(7)
    n = STEPS * micro_batches * RANKS
    inputs = torch.randn(n, SIZE, 5, generator=generator).double()
    targets = torch.randint(0, 3, (n, SIZE), generator=generator)
    every = list(zip(inputs, targets, strict=True))
    # Accelerate deals the batches out in turn.
    return [
        [[every[(step * micro_batches + i) * RANKS + rank] for i in range(micro_batches)] for rank in range(RANKS)]
        for step in range(STEPS)
    ]


def samples(micro_batches):
    """Every sample, in the order in which one process would see them."""
    order = [steps[rank][i] for steps in batches(micro_batches) for i in range(micro_batches) for rank in range(RANKS)]
    return [pair for x, y in order for pair in zip(x, y, strict=True)]


def flat(model):
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return torch.cat([p.detach().reshape(-1) for p in whole])


def count_reductions(model):
    """The number of buckets that DistributedDataParallel reduces from here on: one for each pass of these networks."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    def hook(group, bucket):
        seen.append(bucket)
        return allreduce_hook(group, bucket)

    seen = []
    model.register_comm_hook(None, hook)
    return seen


def with_accelerate(method, micro_batches, model_first=True, share=1.0, **more):
    from accelerate import Accelerator

    from fastsam.integrations.accelerate import SAMOptimizer

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=micro_batches)
    model = network()
    if model_first:
        model = accelerator.prepare(model)
    optimizer = SAMOptimizer(METHODS[method](model.parameters(), **more), accelerator, model, ascent_share=share)
    loader = DataLoader(samples(micro_batches), batch_size=SIZE)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    reductions = count_reductions(model)
    return steps_of(accelerator, model, optimizer, loader), len(reductions)


def steps_of(accelerator, model, optimizer, loader):
    """The weights after an epoch of what ``accelerator`` prepared."""

    def closure(x, y):
        loss = nn.functional.cross_entropy(model(x), y)
        accelerator.backward(loss)
        return loss

    for x, y in loader:
        with accelerator.accumulate(model):
            optimizer.step(closure, x, y)
    forget_accelerator()
    return flat(model)


def with_accelerate_fsdp2(method, micro_batches, **more):
    """Accelerate shards the model when it prepares it with the optimizer, whose parameters it then replaces."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import DistributedType, PartialState

    from fastsam.integrations.accelerate import SAMOptimizer

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=micro_batches)
    # What Accelerate does where there are GPUs; on CPUs it would leave the weights whole.
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="no_wrap")
    kind = DistributedType.FSDP
    accelerator.state.distributed_type = PartialState._shared_state["distributed_type"] = kind
    model = network()
    optimizer = SAMOptimizer(METHODS[method](model.parameters(), **more), accelerator, model)
    loader = DataLoader(samples(micro_batches), batch_size=SIZE)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    assert isinstance(model, FSDPModule)
    return steps_of(accelerator, model, optimizer, loader), None


def with_accelerate_alone(method, micro_batches):
    """The optimizer wrapped by Accelerate itself."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=micro_batches)
    model = network()
    loader = DataLoader(samples(micro_batches), batch_size=SIZE)
    model, optimizer, loader = accelerator.prepare(model, METHODS[method](model.parameters()), loader)
    reductions = count_reductions(model)
    for x, y in loader:

        def closure(x=x, y=y):
            loss = nn.functional.cross_entropy(model(x), y)
            accelerator.backward(loss)
            return loss

        optimizer.step(closure)
    forget_accelerator()
    return flat(model), len(reductions)


def forget_accelerator():
    from accelerate.state import AcceleratorState, DistributedType, GradientState, PartialState

    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_CPU
    AcceleratorState._reset_state()
    GradientState._reset_state()


def with_transformers(method, micro_batches, share=1.0, **more):
    from transformers import TrainingArguments

    from fastsam.integrations.transformers import SAMTrainer

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = network()

        def forward(self, x, labels=None):
            logits = self.layers(x)
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    model = Classifier()
    data = [{"x": x, "labels": y} for x, y in samples(micro_batches)]
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"), use_cpu=True, per_device_train_batch_size=SIZE, num_train_epochs=1,
        gradient_accumulation_steps=micro_batches, lr_scheduler_type="constant", max_grad_norm=0.0, report_to=[],
        save_strategy="no", disable_tqdm=True, logging_strategy="no", dataloader_pin_memory=False,
    )  # fmt: skip
    optimizer = METHODS[method](model.parameters(), **more)
    trainer = SAMTrainer(model, arguments, train_dataset=data, optimizers=(optimizer, None), ascent_share=share)
    trainer._get_train_sampler = lambda *_: SequentialSampler(data)
    trainer.train()
    forget_accelerator()
    return flat(model), None


def with_lightning(method, micro_batches, callback=True, strategy="ddp", static_graph=False, share=1.0, **more):
    import lightning.pytorch as pl
    from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

    from fastsam.integrations.lightning import SAMCallback

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = network()

        def configure_model(self):
            if strategy == "fsdp2" and not isinstance(self.model, FSDPModule):
                mesh = self.device_mesh["data_parallel"]
                for layer in (self.model[0], self.model[2]):
                    fully_shard(layer, mesh=mesh)
                fully_shard(self.model, mesh=mesh)

        def training_step(self, batch, _):
            x, y = batch
            return nn.functional.cross_entropy(self.model(x), y)

        def configure_optimizers(self):
            return METHODS[method](self.parameters(), **more)

        def on_train_start(self):
            self.reductions = count_reductions(self.trainer.strategy.model) if strategy == "ddp" else []
            self.sharded = all(isinstance(p, DTensor) for p in self.model.parameters())

    made = DDPStrategy(static_graph=static_graph)
    if strategy == "fsdp2":
        made = ModelParallelStrategy(data_parallel_size=RANKS, tensor_parallel_size=1)
    rank = int(os.environ["RANK"])
    mine = [batch for step in batches(micro_batches) for batch in step[rank]]
    module = Module()
    pl.Trainer(
        accelerator="cpu", devices=RANKS, strategy=made, max_epochs=1, accumulate_grad_batches=micro_batches,
        callbacks=[SAMCallback(ascent_share=share)] if callback else [], use_distributed_sampler=False, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, default_root_dir=folder,
    ).fit(module, DataLoader(mine, batch_size=None))  # fmt: skip
    assert module.sharded == (strategy == "fsdp2")
    return flat(module.model), len(module.reductions)


CASES = {
    "accelerate, SAM": (with_accelerate, ("SAM", 1), {}),
    "accelerate, F-SAM, 2 micro-batches": (with_accelerate, ("F-SAM", 2), {}),
    "accelerate, SAM, 2 micro-batches, m-sharpness": (with_accelerate, ("SAM", 2), dict(m_sharpness=True)),
    "accelerate, model prepared later, F-SAM, 2 micro-batches": (
        with_accelerate,
        ("F-SAM", 2),
        dict(model_first=False),
    ),
    "accelerate, model prepared later, SAM, m-sharpness": (
        with_accelerate,
        ("SAM", 1),
        dict(model_first=False, m_sharpness=True),
    ),
    "accelerate, fsdp2, F-SAM, 2 micro-batches": (with_accelerate_fsdp2, ("F-SAM", 2), {}),
    "accelerate, fsdp2, Momentum-SAM": (with_accelerate_fsdp2, ("Momentum-SAM", 1), {}),
    "accelerate, Momentum-SAM, 2 micro-batches": (with_accelerate, ("Momentum-SAM", 2), {}),
    "accelerate, LookSAM, 2 micro-batches, a third": (with_accelerate, ("LookSAM", 2), dict(share=1 / 3)),
    "transformers, Momentum-SAM, 2 micro-batches": (with_transformers, ("Momentum-SAM", 2), {}),
    "transformers, GSAM, a third": (with_transformers, ("GSAM", 1), dict(share=1 / 3)),
    "lightning, LookSAM, 2 micro-batches": (with_lightning, ("LookSAM", 2), {}),
    "lightning, SAM, m-sharpness, a third": (with_lightning, ("SAM", 1), dict(m_sharpness=True, share=1 / 3)),
    "lightning, fsdp2, Momentum-SAM, 2 micro-batches": (with_lightning, ("Momentum-SAM", 2), dict(strategy="fsdp2")),
    "lightning, fsdp2, GSAM, a third": (with_lightning, ("GSAM", 1), dict(strategy="fsdp2", share=1 / 3)),
    "accelerate without SAMOptimizer, SAM": (with_accelerate_alone, ("SAM", 1), {}),
    "accelerate without SAMOptimizer, SAM, 2 micro-batches": (with_accelerate_alone, ("SAM", 2), {}),
    "transformers, F-SAM, 2 micro-batches": (with_transformers, ("F-SAM", 2), {}),
    "transformers, SAM, m-sharpness": (with_transformers, ("SAM", 1), dict(m_sharpness=True)),
    "lightning, SAM": (with_lightning, ("SAM", 1), {}),
    "lightning, F-SAM, 2 micro-batches": (with_lightning, ("F-SAM", 2), {}),
    "lightning, SAM, 2 micro-batches, m-sharpness": (with_lightning, ("SAM", 2), dict(m_sharpness=True)),
    "lightning, static graph, SAM, m-sharpness": (
        with_lightning,
        ("SAM", 1),
        dict(static_graph=True, m_sharpness=True),
    ),
    "lightning, fsdp2, F-SAM, 2 micro-batches": (with_lightning, ("F-SAM", 2), dict(strategy="fsdp2")),
    "lightning without callback, SAM": (with_lightning, ("SAM", 1), dict(callback=False)),
    "lightning without callback, SAM, 2 micro-batches": (with_lightning, ("SAM", 2), dict(callback=False)),
    "lightning without callback, SAM, m-sharpness": (
        with_lightning,
        ("SAM", 1),
        dict(callback=False, m_sharpness=True),
    ),
}


def every_case():
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found = {}
    for name, (function, arguments, options) in CASES.items():
        try:
            found[name] = function(*arguments, **options)
        except Exception as error:
            traceback.print_exc()
            found[name] = f"{type(error).__name__}: {error}"
            if function in (with_accelerate, with_accelerate_fsdp2, with_accelerate_alone, with_transformers):
                forget_accelerator()
    torch.save(found, folder / f"rank{torch.distributed.get_rank()}.pt")


if __name__ == "__main__":
    from accelerate import notebook_launcher
    from free_port import free_port

    folder = Path(sys.argv[1])
    notebook_launcher(every_case, num_processes=RANKS, use_port=free_port())
