"""A fine-tuning run from settings to saved model, which may be killed at any moment and goes on where it was.

Everything random is a function of the seed and of the step: the order of the images of an epoch, augmentation and
dropout of a step. So a checkpoint needs no generator's state, and the weights do not depend on how often a run was
stopped, nor on what else drew random numbers meanwhile.
"""

from __future__ import annotations

import os
import statistics
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from fastsam.commands.finetune import model as models
from fastsam.commands.finetune import processes
from fastsam.commands.finetune.batches import Images
from fastsam.commands.finetune.interruption import Interrupted, OutOfMemory, Stop, memory_watched, what_to_lower
from fastsam.commands.finetune.parts import Job
from fastsam.commands.finetune.settings import Settings, optimizers
from fastsam.commands.finetune.show import Show, memory_mib
from fastsam.commands.finetune.surroundings import (
    check_packages,
    check_processes,
    deterministic,
    device_of,
    put_back,
    quiet_libraries,
    seed_everything,
    whole_models,
)
from fastsam.commands.training import augment
from fastsam.commands.training.batches import seed_of
from fastsam.commands.training.data import DataError, open_dataset, open_image
from fastsam.commands.training.run import RunFolder

NO_MEMORY = "out of memory ({}): lower --batch-size. If there is a checkpoint, it is intact"


def run(settings: Settings, show: Show | None = None) -> dict[str, Any]:
    """Trains, evaluates and saves; returns what ``result.json`` holds. An unfinished run in the folder goes on.

    Under torchrun or ``accelerate launch`` every process calls it; what one of them cannot use is raised on all. The
    global random generators are left as they were. Raises ``ValueError`` for what cannot be used, ``OSError`` without
    space on the disk, ``OutOfMemory`` with what to lower, ``Interrupted`` after Ctrl-C or SIGTERM; the same run goes
    on after each.
    """
    check_packages(settings)
    ranks, device = check_processes(settings), device_of(settings)
    first = os.environ.get("RANK", "0") == "0"
    with show or Show(Console(highlight=False, quiet=not first)) as shown, put_back(), quiet_libraries():
        arguments = _training_arguments(settings, device, ranks)  # from here on the processes know each other
        with deterministic(settings, arguments.device):
            job = processes.on_each(lambda: _opened(settings, arguments, shown))
            found: dict[str, Any] = {"train_images": len(job.splits.train), "test_images": len(job.splits.test)}
            found["classes"] = job.splits.classes
            processes.check_same({**settings.as_json(), **found, "labels": _labels(job.splits.train).tolist()})
            try:
                return _in_folder(job, found, shown)
            finally:
                if job.folder is not None:
                    job.folder.close()


def _opened(settings: Settings, arguments: Any, shown: Show) -> Job:
    """Data and model, checked as far as possible before there is a folder."""
    splits = open_dataset(settings.data, data_dir=settings.data_dir)
    if len(splits.classes) < 2:
        raise ValueError(f"{settings.data} has one class, {splits.classes[0]}: a classifier needs two at least")
    if len(splits.train) < settings.batch_size:
        raise ValueError(f"--batch-size {settings.batch_size} is more than the {len(splits.train)} training images")
    seed_everything(settings.seed, "weights")
    example = open_image(splits.train, 0)
    with whole_models():
        model, preparation = models.load(settings.model, splits.classes, example, shown.say, settings.image_size)
    if settings.gradient_checkpointing:
        if not getattr(model, "supports_gradient_checkpointing", False):
            raise ValueError(f"--gradient-checkpointing: {type(model).__name__} does not support it")
        enable: Any = model.activation_checkpointing_enable
        enable(activation_checkpointing_kwargs={"use_reentrant": False})
    if settings.compile:
        model.compile()
    return Job(settings, arguments, splits, model, preparation)


def _in_folder(job: Job, found: dict[str, Any], shown: Show) -> dict[str, Any]:
    settings, folder = job.settings, None
    state: tuple[int | None, Any, Any] | None
    if processes.rank() > 0:
        processes.on_each(lambda: None)
    else:
        config = {**settings.as_json(), **found}
        usual = Settings(model=settings.model, method=settings.method).as_json()
        folder = job.folder = processes.on_each(
            lambda: RunFolder(settings.output, config, settings.may_change(), usual)
        )
    state = processes.on_first(lambda: None if folder is None else (folder.step, folder.result, folder.load()))
    assert state is not None  # the first process has a folder
    job.saved_step, result, payload = state
    if result is not None:
        shown.say(f"{settings.output} holds this run, and it is finished: for a new one name another --output")
    else:
        with memory_watched(NO_MEMORY):
            result = _trained(job, payload and payload["progress"], shown)
        if folder is not None:
            _report(settings.output, result, shown)
            folder.finish(result)  # last: killed before it, the run writes both again
    shown.result(result)
    return result


def _report(folder: Path, result: dict[str, Any], shown: Show) -> None:
    from fastsam.commands.finetune.report import write_report

    shown.say(f"all of it on one page: {write_report(folder, result)}")


def _trained(job: Job, progress: dict[str, Any] | None, shown: Show) -> dict[str, Any]:
    from fastsam.commands.finetune.record import Record
    from fastsam.commands.finetune.trainer import Finetuning, SharpFinetuning

    settings, arguments = job.settings, job.arguments
    processes.on_each(lambda: _decode(job, shown))
    step, steps = job.saved_step or 0, settings.epochs * job.steps_per_epoch
    start = None if not step else str(settings.output / f"checkpoint-{step}")
    with Stop() as stop:
        record = Record(job, stop, shown, progress)
        trainer = (Finetuning if settings.method == "none" else SharpFinetuning)(job, record)
        if start is not None:
            processes.on_each(lambda: _check_kind(Path(start), trainer.is_fsdp_enabled))
            shown.say(f"going on from step {step} of {steps} in {settings.output}")
            arguments.eval_on_start = step % job.steps_per_epoch == 0 and record.progress["evaluated"] < step
        try:
            with memory_watched():
                trainer.train(resume_from_checkpoint=start)
        except Exception as error:
            raise _after(error, trainer, record) from error
    if stop.signal:
        text = f"stopped at step {trainer.state.global_step} of {steps}, all of it saved in {settings.output}"
        raise Interrupted(f"{text}: the same command goes on from there", stop.signal)
    return _result(job, trainer, record.progress)


def _after(error: Exception, trainer: Any, record: Any) -> Exception:
    """Saves the step before one that failed, of which nothing has happened; returns the error to raise."""
    text = str(error)
    if text.startswith("Caught "):  # in a process that decodes images: its message comes after a traceback
        kind = DataError if isinstance(error, DataError) else type(error)
        error = kind(text.strip().splitlines()[-1].partition(": ")[2])
    elif "DataLoader worker" in text:
        error = DataError(f"a process that decodes images ended ({text}): say --workers 0, or fewer")
    if not isinstance(error, (OutOfMemory, DataError)):
        return error
    step, saved = trainer.state.global_step, "the last checkpoint is intact"
    if record.began and trainer.args.world_size == 1:
        trainer.optimizer.zero_grad()
        trainer._save_checkpoint(trainer.model_wrapped)
        saved = f"step {step} is saved"
    if isinstance(error, OutOfMemory):
        return OutOfMemory(what_to_lower(trainer.settings, step, error, saved, trainer.args.world_size))
    saved = saved[0].upper() + saved[1:]
    return DataError(f"{error}. {saved}: with as many images as before the same command goes on from there")


def _training_arguments(settings: Settings, device: torch.device, ranks: int) -> Any:
    """What of the settings is the Trainer's."""
    from transformers import TrainingArguments

    parts = 1 if settings.cuda_graph else settings.accumulate  # the graph has all of them in it
    arguments = TrainingArguments(
        output_dir=str(settings.output),
        per_device_train_batch_size=settings.batch_size // (parts * ranks),
        per_device_eval_batch_size=settings.batch_size // (settings.accumulate * ranks),
        gradient_accumulation_steps=parts,
        num_train_epochs=settings.epochs,
        max_grad_norm=settings.max_norm or 0.0,
        use_cpu=device.type == "cpu",
        bf16=settings.precision == "bf16",
        fp16=settings.precision == "fp16" and device.type != "cpu",
        seed=settings.seed % 2**32,
        label_names=["labels"],
        remove_unused_columns=False,
        report_to=settings.log,
        save_strategy="no",
        logging_strategy="no",
        logging_nan_inf_filter=False,
        disable_tqdm=True,
    )
    if arguments.world_size != ranks:
        raise ValueError(f"WORLD_SIZE is {ranks} and {arguments.world_size} processes met: launch with torchrun")
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # or the Trainer would take all GPUs of the machine by DataParallel
    return arguments


def _decode(job: Job, shown: Show) -> None:
    """The images of both splits, in memory where they fit; the labels of the one with noise."""
    settings, splits, device = job.settings, job.splits, job.arguments.device
    noise = seed_of(settings.seed, "label noise")
    labels = augment.label_noise(_labels(splits.train), settings.label_noise, len(splits.classes), noise)
    common = job.preparation, device, settings.workers, shown.decoding
    job.train = Images(splits.train, labels, *common)
    job.test = Images(splits.test, _labels(splits.test), *common)
    job.arguments.dataloader_num_workers = 0 if job.test.in_memory else job.test.workers
    job.arguments.dataloader_pin_memory = device.type == "cuda" and not job.test.in_memory


def _check_kind(path: Path, sharded: bool) -> None:
    """Raises ``ValueError`` for a checkpoint that is not there, or of processes that hold the weights otherwise."""
    if not path.is_dir():
        raise ValueError(f"{path} is missing, which checkpoint.pt names: put it back, or delete the run")
    was = not (path / "model.safetensors").exists()
    if was != sharded:
        now, then = ("under FSDP", "without") if sharded else ("without FSDP", "under it")
        raise ValueError(
            f"{path} was written {then}, and this run is {now}: start it as before, its number of processes may differ"
        )


def _result(job: Job, trainer: Any, progress: dict[str, Any]) -> dict[str, Any]:
    settings, device = job.settings, job.arguments.device
    return {
        "model": settings.model,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "data": settings.data,
        "train_images": len(job.train),
        "test_images": len(job.test),
        "method": settings.method,
        "optimizer": optimizers()[settings.optimizer.lower()].__name__,
        "test_accuracy": progress["test_accuracy"],
        "best_accuracy": progress["best_accuracy"],
        "best_epoch": progress["best_step"] // job.steps_per_epoch,
        "test_loss": progress["test_loss"],
        "steps": trainer.state.global_step,
        "seconds": progress["seconds"],
        "images_per_second": statistics.median(progress["images_per_second"]),  # the first has the start in it
        "data_wait_share": progress["waited"] / progress["seconds"],
        "data_in_memory": job.train.in_memory,
        "memory_mib": memory_mib(device),
        "device": str(device),
        "processes": job.arguments.world_size,
        "saved": trainer.save_folder("model"),
    }


def _labels(dataset: Any) -> Tensor:
    return torch.tensor(dataset["label"][:], dtype=torch.int64)
