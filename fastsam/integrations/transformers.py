"""fastsam in the ``Trainer`` of Transformers.

    trainer = SAMTrainer(
        model, args, train_dataset=data,
        optimizer_cls_and_kwargs=(SAM, {"base_optimizer": torch.optim.AdamW, "rho": 0.05, "lr": 1e-3}),
    )

or ``optimizers=(SAM(model.parameters(), ...), None)``. The former's learning rate is ``args.learning_rate`` if it says
no ``"lr"``; whatever else the base optimizer is to be told (betas, momentum) stands there too. Accumulation, fp16,
bf16, checkpoints and schedules are the Trainer's own; every micro-batch of a step is evaluated twice. The logged loss
and norm are those of the first pass.
"""

from __future__ import annotations

import functools

import torch
from transformers import Trainer

from fastsam.integrations.accelerate import SAMOptimizer
from fastsam.optimizer import SharpnessAware


class SAMTrainer(Trainer):
    """A ``transformers.Trainer`` whose optimizer is one of fastsam's.

    ``max_grad_norm`` clips the second gradient, the one that the update is made with. Buffers and dropout masks are
    the same in both passes. DeepSpeed, which has a step of its own, and any other optimizer are refused when training
    starts.
    """

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        if isinstance(self.optimizer, SAMOptimizer):
            return self.optimizer
        if self.is_deepspeed_enabled:
            raise ValueError("SAMTrainer cannot run two passes under DeepSpeed, which makes the step itself")
        if self.optimizer_cls_and_kwargs is not None:
            optimizer_class, settings = self.optimizer_cls_and_kwargs
            self.optimizer_cls_and_kwargs = optimizer_class, {"lr": self.args.learning_rate, **settings}
        optimizer = super().create_optimizer(model)
        if not isinstance(optimizer, SharpnessAware):
            raise TypeError(
                f"SAMTrainer got {type(optimizer).__name__}: pass optimizers=(SAM(model.parameters(), ...), None) or "
                'optimizer_cls_and_kwargs=(SAM, {"base_optimizer": torch.optim.AdamW, ...})'
            )
        options = {"max_norm": self.args.max_grad_norm} if self.args.max_grad_norm > 0 else {}
        self.optimizer = SAMOptimizer(optimizer, self.accelerator, self.model if model is None else model, **options)
        return self.optimizer

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        self.optimizer.model = model  # as the Trainer prepared it
        step = functools.partial(super().training_step, model, inputs, num_items_in_batch)
        return self.optimizer.micro_batches.first(step)

    def train(self, *args, **kwargs):
        if isinstance(self.optimizer, SAMOptimizer):
            self.optimizer.micro_batches.forget()  # those of a run that was interrupted
        return super().train(*args, **kwargs)

    def _clip_grad_norm(self, model) -> None:
        """Leaves the first gradient alone, whose norm the Trainer then measures."""


if not hasattr(Trainer, "_clip_grad_norm"):
    raise ImportError("SAMTrainer needs a Trainer that clips in _clip_grad_norm, as that of transformers 5.23 does")
