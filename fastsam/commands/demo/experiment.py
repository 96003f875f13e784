"""All runs of the demo, spread over the processors, with progress; and what they and the machine were."""

import platform
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from multiprocessing.sharedctypes import SynchronizedArray
from pathlib import Path
from time import perf_counter

import torch
from rich.console import Console
from rich.progress import Progress

import fastsam
from fastsam.commands.demo import settings
from fastsam.commands.demo.settings import CurvatureSettings, DataSettings, ModelSettings
from fastsam.commands.demo.train import Run, digits, measure_sharpness, train
from fastsam.commands.machine import processor, processors
from fastsam.commands.training.show import progress_bar


@dataclass(frozen=True)
class Job:
    """One run to do; ``bar`` is its line in the display, one for each model and method."""

    model: str
    settings: ModelSettings
    method: str
    options: dict[str, float]
    data: DataSettings
    seed: int
    bar: int
    curvature: tuple[CurvatureSettings, Path] | None


def run(
    console: Console,
    seeds: int | None,
    epochs: int | None,
    quick: bool,
    folder: Path,
    on_model: Callable[[dict], None] = lambda results: None,
) -> dict:
    """Train every model with every method and seed; returns all of it in JSON's types.

    ``folder`` gets the CSV files of the curvature. ``on_model`` gets what is there each time that all runs of a model
    but the last one are done.
    """
    models = settings.QUICK_MODELS if quick else settings.MODELS
    methods = settings.QUICK_METHODS if quick else settings.METHODS
    data = settings.QUICK_DATA if quick else settings.DATA
    curvature = settings.QUICK_CURVATURE if quick else settings.CURVATURE
    if epochs is not None:
        models = {name: replace(model, epochs=epochs) for name, model in models.items()}

    counts = {model: 1 if quick else seeds or settings.SEEDS[model] for model in models}

    watched = [(curvature.model, method) for method in curvature.methods]
    bars = [(model, method) for model in models for method in methods]
    jobs = [
        Job(
            model,
            models[model],
            method,
            options,
            data,
            seed,
            bars.index((model, method)),
            (curvature, curvature_file(folder, model, method, seed)) if (model, method) in watched else None,
        )
        for model in models
        for seed in range(counts[model])
        for method, options in methods.items()
    ]
    workers = 1 if quick else min(len(jobs), processors())
    start = perf_counter()

    def results(runs: list[Run]) -> dict:
        done = sorted(runs, key=lambda r: (bars.index((r.model, r.method)), r.seed))
        there = [model for model in models if any(run.model == model for run in done)]
        return {
            "settings": {
                "models": {m: {**asdict(models[m]), "build": models[m].build.__name__} for m in there},
                "methods": methods,
                "data": asdict(data),
                "sharpness_rho": settings.SHARPNESS_RHO,
                "sharpness_tolerance": settings.SHARPNESS_TOLERANCE,
                "curvature": asdict(curvature),
                "runs_at_once": workers,
                "threads_a_run": 1,
            },
            "machine": _machine(),
            "seconds": round(perf_counter() - start, 1),
            "runs": [asdict(r) for r in done],
        }

    with progress_bar(console) as progress:
        tasks = [
            progress.add_task(f"{model:7s}{method:12s}", total=counts[model] * models[model].epochs, state="epochs")
            for model, method in bars
        ]
        runs = []
        for done in _here(jobs, progress, tasks) if workers == 1 else _spread(jobs, workers, progress, tasks):
            runs.append(done)
            progress.console.print(
                f"{done.model:7s}{done.method:12s} seed {done.seed}: "
                f"test accuracy {done.test_accuracy[-1]:.1%}, "
                f"top eigenvalue {done.top_eigenvalue:.1f}, {done.training_seconds:.1f} s",
                highlight=False,
            )
            finished = [r for r in runs if r.model == done.model]
            if len(finished) == counts[done.model] * len(methods) and len(runs) < len(jobs):
                on_model(results(finished))
    return results(runs)


def curvature_file(folder: Path, model: str, method: str, seed: int) -> Path:
    return folder / f"{model}-{method}-{seed}.csv"


def _here(jobs: list[Job], progress: Progress, tasks: list) -> Iterator[Run]:
    """The runs one after another in this process."""
    with _one_thread():
        for job in jobs:
            yield _train(job, lambda bar=tasks[job.bar]: progress.advance(bar))


def _spread(jobs: list[Job], workers: int, progress: Progress, tasks: list) -> Iterator[Run]:
    """The runs in ``workers`` fresh processes, in the order in which they end.

    Networks this small gain nothing from a second thread, so each process has one: the runs are faster
    together, and the number of processors changes no result.
    """
    context = get_context("spawn")
    epochs_done: SynchronizedArray[int] = context.Array("l", len(tasks))
    with ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(epochs_done,)) as pool:
        pending = {pool.submit(_train_in_worker, job) for job in jobs}
        try:
            while pending:
                done, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
                for task, count in zip(tasks, epochs_done[:], strict=True):
                    progress.update(task, completed=count)
                for future in done:
                    yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


_epochs_done: "SynchronizedArray[int]"  # in a worker


def _start_worker(epochs_done: "SynchronizedArray[int]") -> None:
    global _epochs_done
    _epochs_done = epochs_done
    torch.set_num_threads(1)


def _train_in_worker(job: Job) -> Run:
    def on_epoch() -> None:
        with _epochs_done.get_lock():
            _epochs_done[job.bar] += 1

    return _train(job, on_epoch)


def _train(job: Job, on_epoch) -> Run:
    data = digits(job.data)
    model, run = train(job.model, job.settings, job.method, job.options, data, job.seed, on_epoch, job.curvature)
    measure_sharpness(model, *data[0][: job.data.sharpness_size].pair(), run)
    return run


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _machine() -> dict:
    return {
        "processor": processor(),
        "processors": processors(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastsam": fastsam.__version__,
        "backends": fastsam.backends(),
    }
