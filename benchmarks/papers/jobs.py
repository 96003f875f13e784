"""Rows and seeds, one process on each GPU or on a share of the processors."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.papers import runners
from benchmarks.papers.tables import Row
from fastsam.commands.machine import processors

Job = tuple[Row, int]


def run_all(
    jobs: list[Job], output: Path, data_dir: Path | None, workers: int, save_seconds: float, console: Console
) -> tuple[dict[tuple[str, int], dict], list[tuple[str, int, str]]]:
    """Runs every (row, seed) in ``output/row/seed-N``; returns the results and what failed, with the reason.

    A run that fails does not stop the others. Its folder is intact, and the same command tries it again.
    """
    finished, failed = {}, []
    for (row, seed), outcome in _outcomes(jobs, output, data_dir, workers, save_seconds):
        if isinstance(outcome, Exception):
            message = _explained(outcome)
            failed.append((row.name, seed, message))
            console.print(f"{row.name}, seed {seed}: failed: {message}", markup=False, highlight=False)
            continue
        finished[row.name, seed] = outcome
        shown = ", ".join(
            f"{name.replace('_', ' ')} {outcome[name]:.4g}"
            for name in ("test_accuracy", "top_eigenvalue", "alignment", "seconds")
            if name in outcome
        )
        done = f"[{len(finished) + len(failed)}/{len(jobs)}]"
        console.print(f"{done} {row.name}, seed {seed}: {shown}", markup=False, highlight=False)
    return finished, failed


def processes(wanted: int | None, jobs: int) -> int:
    """How many: as wanted, or one a GPU, or one a processor; not more than there are jobs."""
    if wanted is not None and wanted < 1:
        raise ValueError(f"workers={wanted} must be at least 1")
    return min(wanted or torch.cuda.device_count() or processors(), jobs)


def folder_of(row: Row, seed: int, output: Path) -> Path:
    return output / re.sub(r"[^\w.=-]+", "_", row.name) / f"seed-{seed}"


def _outcomes(jobs, output, data_dir, workers, save_seconds) -> Iterator[tuple[Job, dict | Exception]]:
    gpus = torch.cuda.device_count()
    if workers == 1:
        device = "cuda:0" if gpus else "cpu"
        for job in jobs:
            try:
                yield job, _run(job, output, device, data_dir, save_seconds)
            except Exception as error:
                yield job, error
        return
    context = get_context("spawn")
    devices = context.SimpleQueue()
    for i in range(workers):
        devices.put(f"cuda:{i % gpus}" if gpus else "cpu")
    threads = max(1, processors() // workers)
    with ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(devices, threads)) as pool:
        pending: dict[Future, Job] = {
            pool.submit(_run_in_worker, job, output, data_dir, save_seconds): job for job in jobs
        }
        try:
            for future in as_completed(pending):
                yield pending[future], future.exception() or future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _start_worker(devices, threads: int) -> None:
    global _device
    _device = devices.get()
    torch.set_num_threads(threads)


def _run_in_worker(job: Job, output: Path, data_dir: Path | None, save_seconds: float) -> dict:
    return _run(job, output, _device, data_dir, save_seconds)


def _run(job: Job, output: Path, device: str, data_dir: Path | None, save_seconds: float) -> dict:
    row, seed = job
    return runners.run(row.settings, seed, folder_of(row, seed, output), device, data_dir, save_seconds)


def _explained(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory; lower it with --set batch_size=... and --output another folder"
    if isinstance(error, BrokenProcessPool):
        return "its process was killed; the same command goes on from the last checkpoint"
    if isinstance(error, (ValueError, OSError, ImportError)):
        return str(error)
    return f"{type(error).__name__}: {error}"
