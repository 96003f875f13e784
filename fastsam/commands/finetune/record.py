"""What a run remembers and shows: rows of its metrics, its best epoch, when it saves, when it stops.

A callback of the Trainer: the Trainer's own strategies for logging, testing and saving know neither time nor signals.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fastsam.commands.finetune import processes
from fastsam.commands.finetune.interruption import Stop
from fastsam.commands.finetune.show import Show, memory_mib

if TYPE_CHECKING:
    from fastsam.commands.finetune.parts import Job
    from fastsam.commands.finetune.trainer import Finetuning

SAVE_SECONDS = 600
ROWS_PER_EPOCH = 20
AGREE_EVERY = 10  # steps after which several processes ask each other whether to save or to stop


class Record(TrainerCallback):
    """``progress`` is what a checkpoint holds besides weights and the states of optimizer, schedule and scaler."""

    trainer: Finetuning

    def __init__(self, job: Job, stop: Stop, show: Show, progress: dict[str, Any] | None) -> None:
        self.job, self.stop, self.show = job, stop, show
        self.progress: dict[str, Any] = {"evaluated": 0, "seconds": 0.0, "waited": 0.0, "images_per_second": []}
        self.progress |= {"test_loss": 0.0, "test_accuracy": 0.0, "best_step": 0, "best_accuracy": -1.0}
        self.progress |= {"loss_sum": 0.0, "last_row": {"step": 0, "seconds": 0.0, "waited": 0.0}, "row": {}}
        self.progress |= progress or {}
        self.began = False  # whether there is a state worth saving
        per_epoch = job.steps_per_epoch
        self._rows = {i * per_epoch // ROWS_PER_EPOCH for i in range(1, ROWS_PER_EPOCH)} | {per_epoch}

    def waited(self, start: float) -> None:
        """The batches of a step are there, which it began to wait for at ``start``."""
        self._start = start
        self.progress["waited"] += time.perf_counter() - start

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.trainer._tr_loss += self.progress["loss_sum"]
        self.trainer._globalstep_last_logged = self.progress["last_row"]["step"]
        self.began, self._saved = True, time.monotonic()
        self.show.training(state.global_step, state.max_steps)
        if state.global_step == self.progress["best_step"] > 0:
            self.trainer.save_folder("best")  # the run was killed between the checkpoint and this

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.progress["seconds"] += time.perf_counter() - self._start
        self._start = time.perf_counter()
        step, per_epoch = state.global_step, self.job.steps_per_epoch
        self.show.stepped(step)
        within = step % per_epoch or per_epoch
        control.should_log = within in self._rows
        control.should_evaluate = within == per_epoch
        asked = self.job.settings.save_every and step % self.job.settings.save_every == 0
        control.should_save = bool(asked) or control.should_evaluate
        wanted = self.stop.signal or int(time.monotonic() - self._saved > SAVE_SECONDS)
        if args.world_size > 1:
            wanted = processes.highest(wanted, args.device) if step % AGREE_EVERY == 0 else 0
        if wanted:
            control.should_save = True
        if wanted > 1:
            self.stop.signal, control.should_training_stop = wanted, True

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """A row of metrics.csv, of means since the last one; that of an epoch waits for the test."""
        logs: dict[str, Any] = given["logs"]
        if "loss" not in logs:
            return
        progress, optimizer = self.progress, self.trainer.optimizer
        assert optimizer is not None
        progress["seconds"] += time.perf_counter() - self._start  # the wait for the loss, which is that for the steps
        past = {name: progress[name] - progress["last_row"][name] for name in ("seconds", "waited")}
        images = (state.global_step - progress["last_row"]["step"]) * self.job.settings.batch_size
        progress["row"] = {
            "step": state.global_step,
            "epoch": round(state.global_step / self.job.steps_per_epoch, 4),
            "loss": logs["loss"],
            "lr": max(group["lr"] for group in optimizer.param_groups),
            "test_loss": None,
            "test_accuracy": None,
            "images_per_second": images / max(past["seconds"], 1e-9),
            "data_wait_share": past["waited"] / max(past["seconds"], 1e-9),
            "memory_mib": memory_mib(args.device),
        }
        progress["images_per_second"].append(progress["row"]["images_per_second"])
        progress["last_row"] = {"step": state.global_step, **{n: progress[n] for n in ("seconds", "waited")}}
        if not control.should_evaluate:
            self._write()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        metrics: dict[str, float] = given["metrics"]
        loss, accuracy = metrics["eval_loss"], metrics["eval_accuracy"]
        self.progress |= {"evaluated": state.global_step, "test_loss": loss, "test_accuracy": accuracy}
        if accuracy > self.progress["best_accuracy"]:
            self.progress |= {"best_step": state.global_step, "best_accuracy": accuracy}
        self.progress["row"] |= {"test_loss": loss, "test_accuracy": accuracy}
        self._write()

    def before_save(self) -> None:
        """What the loss is so far, since the last row, as the mean over all processes."""
        losses = processes.gathered(float(self.trainer._tr_loss))
        self.progress["loss_sum"] = sum(losses) / len(losses)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._saved = time.monotonic()
        if state.global_step == self.progress["best_step"]:
            self.trainer.save_folder("best")  # after the checkpoint, which has these weights

    def _write(self) -> None:
        row = self.progress["row"]
        if self.job.folder is not None:
            self.job.folder.log(row)
        self.show.measured(row)
        if not (math.isfinite(row["loss"]) or math.isfinite(row["test_loss"] or 0.0)):
            # Such steps change nothing: the rest of the run would be as this one.
            raise self.trainer.diverged("the losses in training and testing are")
