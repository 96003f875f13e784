"""The Trainer of a fine-tuning run: what it does otherwise than that of Transformers, each for a promise of the docs.

- Random numbers, the order of the images and augmentation are functions of seed and step: there is no state of
  generators to save, and data loaders are this package's.
- A checkpoint takes the place of the one before as a whole, and holds safetensors and tensors, no pickled arguments.
- The schedule reaches 0 with the last step and begins above 0; weight decay and learning rates go by layer.
- Network, loss and autocast are those of images: uint8 until they are on the device. A pass sets no modes.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import DistributedType, FullyShardedDataParallelPlugin, PartialState
from safetensors.torch import load_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer
from transformers.trainer_utils import EvalPrediction

from fastsam import graphs
from fastsam.commands.finetune import network, processes
from fastsam.commands.finetune.batches import Order, as_it_is, loader
from fastsam.commands.finetune.folders import checkpoints, reach_disk, save, save_weights
from fastsam.commands.finetune.groups import make_optimizer
from fastsam.commands.finetune.parts import Job
from fastsam.commands.finetune.surroundings import seed_everything
from fastsam.commands.training import augment
from fastsam.commands.training.batches import seed_of
from fastsam.commands.training.schedule import warmup_then_cosine
from fastsam.distributed.shards import local
from fastsam.integrations.accelerate import SAMOptimizer
from fastsam.integrations.transformers import SAMTrainer
from fastsam.optimizer import SharpnessAware

PARTIAL = ".partial"


class Finetuning(Trainer):
    """Trains ``job.model`` on ``job.train``; ``record`` is the callback that keeps what the run is to remember."""

    loss_is_scaled_for_ga = False

    def __init__(self, job: Job, record: Any, **options: Any) -> None:
        self.job, self.settings, self.record = job, job.settings, record
        self.dtype = next(p.dtype for p in job.model.parameters() if p.is_floating_point())
        super().__init__(
            job.model,
            job.arguments,
            data_collator=as_it_is,
            train_dataset=job.train,
            eval_dataset=job.test,
            compute_metrics=measured,
            callbacks=[record],
            **options,
        )
        self.remove_callback(PrinterCallback)
        record.trainer = self

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.settings.precision == "fp16" and self.args.device.type == "cpu":
            # Accelerate has fp16 on accelerators alone; it is for trying out what will run on one.
            self.accelerator.state._mixed_precision = "fp16"
            self.accelerator.native_amp = True
            self.accelerator.scaler = torch.amp.GradScaler("cpu")
        if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" and not self.is_fsdp_enabled:
            self._shard_on_cpu()

    def _shard_on_cpu(self) -> None:
        """FSDP2 over gloo, where Accelerate would leave the weights whole without a word."""
        state, plugin = self.accelerator.state, FullyShardedDataParallelPlugin()  # as accelerate launch configured it
        if state.distributed_type != DistributedType.MULTI_CPU or plugin.fsdp_version != 2:
            raise ValueError(
                "FSDP needs several processes, and on CPUs its version 2: accelerate launch --num_processes 2 "
                "--fsdp_version 2"
            )
        if state.mixed_precision != "no":
            plugin.set_mixed_precision(state.mixed_precision)
        state.fsdp_plugin, self.is_fsdp_enabled = plugin, True
        # Where Accelerate itself notes it: every AcceleratorState() reads it there.
        state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    # ---- data ------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """The run's own: skipping to a step reads no image, and each process has its part of one order."""
        args, images = self.args, self.job.train
        order = Order(
            len(images),
            self.settings.batch_size,
            seed_of(self.settings.seed, "order"),
            args.gradient_accumulation_steps,
            args.process_index,
            args.world_size,
            lambda: self.state.global_step,
        )
        workers = 0 if images.in_memory else images.workers
        return loader(images, order, workers, pin=args.device.type == "cuda" and not images.in_memory)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        """The micro-batches of a step, augmented as one batch, and the seed of whatever else the step draws."""
        start = time.perf_counter()
        batches = [next(epoch_iterator) for _ in range(num_batches)]
        self.record.waited(start)
        rank = [self.args.process_index] if self.args.world_size > 1 else []
        seed = seed_everything(self.settings.seed, "step", self.state.global_step, *rank)
        parts = [batch["pixel_values"].to(device, non_blocking=True) for batch in batches]
        images = parts[0] if num_batches == 1 else torch.cat(parts)
        images = self._augmented(self.job.preparation.normalised(images), seed).to(self.dtype)
        pairs = zip(images.chunk(num_batches), batches, strict=True)
        return [{"pixel_values": x, "labels": b["labels"].to(device, non_blocking=True)} for x, b in pairs], None

    def _augmented(self, images: Tensor, seed: int) -> Tensor:
        generator = torch.Generator(images.device).manual_seed(seed)
        if self.settings.random_crop:
            images = augment.random_crop(images, self.settings.random_crop, generator)
        if self.settings.flip:
            images = augment.random_flip(images, generator)
        if self.settings.cutout:
            images = augment.cutout(images, self.settings.cutout, generator)
        return images

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = super()._prepare_inputs(inputs)
        if inputs["pixel_values"].dtype == torch.uint8:  # in testing
            inputs["pixel_values"] = self.job.preparation.normalised(inputs["pixel_values"]).to(self.dtype)
        return inputs

    # ---- the step --------------------------------------------------------------------------------------

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """One pass over a micro-batch. The Trainer's own sets the mode of every module anew in each."""
        if not (model.training and self._network.training):  # a test is of what a wrapper wraps
            model.train()
        with self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs) / self.current_gradient_accumulation_steps
        self.accelerator.backward(loss)
        return loss.detach()

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        logits = network.logits(model, inputs["pixel_values"])
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        smoothing = self.settings.label_smoothing if model.training else 0.0
        loss = F.cross_entropy(logits, inputs["labels"], label_smoothing=smoothing)
        return (loss, {"logits": logits}) if return_outputs else loss

    @property
    def _network(self) -> nn.Module:
        assert self.model is not None
        return self.model

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = make_optimizer(self.settings, self._network if model is None else model)
        return super().create_optimizer(model)

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        warmup = round(self.settings.warmup * num_training_steps)
        factor = warmup_then_cosine(warmup, num_training_steps)
        chosen = optimizer or self.optimizer
        assert chosen is not None
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(chosen, factor)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> Any:
        """None where there is no clipping: the Trainer would read the gradient for a number that nobody asked for."""
        return grad_norm

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """0: the Trainer's estimate counts the parameters anew at every step, and nothing here shows it."""
        return 0

    # ---- checkpoints -----------------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.settings.output / PARTIAL)

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        """Writes a folder beside the last checkpoint and then puts it in its place: ``checkpoint.pt`` names it."""
        step, folder = self.state.global_step, self.job.folder
        self.check_finite()
        self.record.before_save()

        def write() -> None:
            try:
                super(Finetuning, self)._save_checkpoint(model, trial)
                if self.args.should_save:
                    reach_disk(self.settings.output / PARTIAL)
            except Exception as error:  # safetensors and torch have kinds of their own for a full disk
                shutil.rmtree(self.settings.output / PARTIAL, ignore_errors=True)
                if folder is None or not isinstance(error, (OSError, RuntimeError)):
                    raise
                raise folder.explained(error, "the checkpoint of step", step) from error

        processes.on_each(write)
        processes.on_first(partial(self._replace, step))

    def _replace(self, step: int) -> None:
        folder = self.job.folder
        assert folder is not None  # the first process has it
        old = checkpoints(folder.path)
        new = folder.path / f"checkpoint-{step}"
        if new.exists():  # of this very step, and the same
            shutil.rmtree(new)
        os.replace(folder.path / PARTIAL / new.name, new)
        folder.save(step, {"progress": self.record.progress})
        for past in old:
            if past != new:
                shutil.rmtree(past, ignore_errors=True)

    def check_finite(self) -> None:
        """Raises ``ValueError`` on every process unless all weights are finite."""
        parts = [local(p.detach()) for p in self._network.parameters()]
        finite = torch.stack([p.isfinite().all() for p in parts]).all()
        if processes.highest(int(not finite), self.args.device):
            raise self.diverged("the weights are")

    def diverged(self, what: str) -> ValueError:
        step = self.job.saved_step
        last = "there is none" if step is None else f"that of step {step} is intact"
        return ValueError(
            f"{what} not finite at step {self.state.global_step}: lower --lr, or give --max-norm 1, and another "
            f"--output. Nothing was saved over the last checkpoint: {last}"
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Within a checkpoint: the weights by the names of the module, so that loading them is strict."""
        if self.args.should_save and not self.is_fsdp_enabled:
            assert output_dir is not None
            save_weights(self._network, Path(output_dir) / "model.safetensors")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_model(self._network, os.path.join(resume_from_checkpoint, "model.safetensors"))

    def _save_rng_state(self, output_dir: str) -> None:
        """Nothing: what a step draws comes of seed and step."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Nothing: what a step draws comes of seed and step."""

    def save_folder(self, name: str) -> str:
        """Writes the model and its image processor for ``from_pretrained``; collective."""
        state = self.accelerator.get_state_dict(self.model_wrapped) if self.is_fsdp_enabled else None
        module = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        path, step = self.settings.output / name, self.state.global_step
        write = partial(save, module, self.job.preparation.processor, path, step, state)
        return processes.on_first(lambda: str(write()))


class SharpFinetuning(SAMTrainer, Finetuning):
    """The same with a method of fastsam, as :class:`SAMTrainer` makes its steps."""

    def __init__(self, job: Job, record: Any) -> None:
        super().__init__(job, record, ascent_share=job.settings.ascent_share)

    _graph: Callable[[Tensor, Tensor], Tensor] | None = None

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        assert isinstance(optimizer, SAMOptimizer)
        own = _Parts if self.settings.perturb_parts else _Replayed if self.settings.cuda_graph else None
        if own is not None:
            self.optimizer = optimizer = own(optimizer.optimizer, self.accelerator, self.model, **optimizer.options)
        return optimizer

    @property
    def _sharpness_aware(self) -> SharpnessAware:
        assert isinstance(self.optimizer, SAMOptimizer)
        return self.optimizer.optimizer

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """One micro-batch; with ``--perturb-parts`` both its passes, with ``--cuda-graph`` the whole step."""
        if self.settings.cuda_graph:
            return self._replay(model, inputs["pixel_values"], inputs["labels"])
        if not self.settings.perturb_parts:
            return super().training_step(model, inputs, num_items_in_batch)
        parts, self.current_gradient_accumulation_steps = self.current_gradient_accumulation_steps, 1
        closure = partial(Finetuning.training_step, self, model, inputs)
        try:
            with torch.enable_grad():
                return (
                    self._sharpness_aware.accumulate(closure, model=model, grad_scaler=self.accelerator.scaler) / parts
                )
        finally:
            self.current_gradient_accumulation_steps = parts

    def _replay(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        model.train()
        if self._graph is None:
            max_norm = self.settings.max_norm
            optimizer = self._sharpness_aware
            self._graph = graphs.capture(optimizer, self._whole, images, labels, model=model, max_norm=max_norm)
        return self._graph(images, labels).detach()

    def _whole(self, images: Tensor, labels: Tensor) -> Tensor:
        """Both passes' closure in the graph: a batch in its micro-batches."""
        total, parts = torch.zeros((), device=images.device), self.settings.accumulate
        for x, y in zip(images.chunk(parts), labels.chunk(parts), strict=True):
            loss = self.compute_loss(self.model_wrapped, {"pixel_values": x, "labels": y}) / parts
            loss.backward()
            total = total + loss.detach()
        return total


class _Parts(SAMOptimizer):
    """Each micro-batch has climbed by itself; what is left of the step is the update."""

    def step(self, closure: Any = None, *batch: Any, **options: Any) -> None:
        self.optimizer.descend(zero_grad=True, grad_scaler=self.scaler, **self.options)
        if self.scaler is not None:
            self.scaler.update()
            self._is_overflow = bool(self.optimizer.found_inf)


class _Replayed(SAMOptimizer):
    """The graph has made the step."""

    def step(self, closure: Any = None, *batch: Any, **options: Any) -> None:
        self._is_overflow = False


def measured(prediction: EvalPrediction) -> dict[str, float]:
    """Mean cross-entropy, where the Trainer's on several processes counts images twice, and share of right answers."""
    logits, labels = (torch.from_numpy(np.asarray(a)) for a in (prediction.predictions, prediction.label_ids))
    right = (logits.argmax(dim=1) == labels).double().mean()
    return {"loss": F.cross_entropy(logits.double(), labels).item(), "accuracy": right.item()}
