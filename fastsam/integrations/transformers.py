"""fastsam in the ``Trainer`` of Transformers.

    trainer = SAMTrainer(
        model, args, train_dataset=data,
        optimizer_cls_and_kwargs=(SAM, {"base_optimizer": torch.optim.AdamW, "rho": 0.05, "lr": 1e-3}),
    )

or ``optimizers=(SAM(model.parameters(), ...), None)``. The former's learning rate is ``args.learning_rate`` if it says
no ``"lr"``; whatever else the base optimizer is to be told (betas, momentum) stands there too. Accumulation, fp16,
bf16, checkpoints and schedules are the Trainer's own; every micro-batch of a step is evaluated as often as the method
asks. The logged loss and norm are those of the first pass.

As a mixin it goes before any trainer that is one of Transformers', such as TRL's for language models:

    class SAMSFTTrainer(SAMTrainer, SFTTrainer): ...

``SAMTrainer(..., ascent_share=0.25)`` has the first pass take the first quarter of every micro-batch.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from fastsam.integrations.accelerate import SAMOptimizer
from fastsam.loop.share import check_share, first_part
from fastsam.optimizer import SharpnessAware, StepOptions


class SAMTrainer(Trainer):
    """A ``transformers.Trainer`` whose optimizer is one of fastsam's.

    ``max_grad_norm`` clips the second gradient, the one that the update is made with. Buffers and dropout masks are
    the same in both passes. DeepSpeed, which has a step of its own, and any other optimizer are refused when training
    starts.

    Args:
        args, kwargs: those of ``Trainer``.
        ascent_share: the share of each micro-batch that the first of two passes takes, its first samples, rounded up;
            in (0, 1]. Its loss is the mean over the part as the other is over the whole, where the Trainer counts
            tokens (``num_items_in_batch``) those of the parts of all micro-batches. With less than 1 the logged loss
            is the part's, BatchNorm's statistics follow the part alone, and the second pass draws dropout masks of its
            own. A pass that is a step's only one takes every sample.

    Raises ``ValueError`` for a share out of its range, and in training what :func:`fastsam.loop.share.first_part`
    raises for inputs that cannot be divided.
    """

    def __init__(self, *args: Any, ascent_share: float = 1.0, **kwargs: Any) -> None:
        check_share(ascent_share)
        self.ascent_share = ascent_share
        self._items_in_parts: torch.Tensor | int | None = None
        super().__init__(*args, **kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
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
        options: StepOptions = {"max_norm": self.args.max_grad_norm} if self.args.max_grad_norm > 0 else {}
        self.optimizer = SAMOptimizer(
            optimizer,
            self.accelerator,
            self.model if model is None else model,
            ascent_share=self.ascent_share,
            **options,
        )
        return self.optimizer

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | int | None]:
        """The Trainer's, where what is to be counted is counted for the first pass as well."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._items_in_parts = items
        if self.ascent_share < 1 and items is not None:
            self._items_in_parts = self._get_num_items_in_batch([self._part(batch) for batch in batches], device)
        return batches, items

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        assert isinstance(self.optimizer, SAMOptimizer)
        self.optimizer.model = model  # as the Trainer prepared it
        step = super().training_step
        evaluated: list[bool] = []

        def evaluate(inputs: dict[str, Any], items: torch.Tensor | int | None) -> torch.Tensor:
            with self._metrics_kept() if evaluated else contextlib.nullcontext():
                evaluated.append(True)
                return step(model, inputs, items)

        return self.optimizer.take(
            lambda: evaluate(inputs, num_items_in_batch),
            lambda: evaluate(self._part(inputs), self._items_in_parts),
        )

    @contextlib.contextmanager
    def _metrics_kept(self) -> Iterator[None]:
        """What trainers of TRL count while they compute a loss is of the first evaluation of a micro-batch alone."""
        names = [name for name in ("_metrics", "_total_train_tokens") if hasattr(self, name)]
        kept = {name: copy.deepcopy(getattr(self, name)) for name in names}
        try:
            yield
        finally:
            vars(self).update(kept)

    def _part(self, inputs: Any) -> Any:
        return first_part(inputs, self.ascent_share, "inputs")

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        """One attempt: ``auto_find_batch_size`` makes another where the memory did not suffice."""
        try:
            return super()._inner_training_loop(*args, **kwargs)
        except BaseException:
            if isinstance(self.optimizer, SAMOptimizer):
                self.optimizer.micro_batches.abandon()
            raise

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """torch's functions for sharded state know the optimizer itself, and no wrapper that wants a closure."""
        with self._unwrapped():
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with self._unwrapped():
            super()._load_optimizer_and_scheduler(checkpoint)

    @contextlib.contextmanager
    def _unwrapped(self) -> Iterator[None]:
        wrapper = self.optimizer
        if isinstance(wrapper, SAMOptimizer):
            self.optimizer = wrapper.optimizer
        try:
            yield
        finally:
            self.optimizer = wrapper

    def _clip_grad_norm(self, model: nn.Module) -> None:
        """Leaves the first gradient alone, whose norm the Trainer then measures."""


for needed in ("_clip_grad_norm", "_inner_training_loop", "_get_num_items_in_batch"):
    if not hasattr(Trainer, needed):
        raise ImportError(f"SAMTrainer needs a Trainer with {needed}(), as that of transformers 5.23 has")
