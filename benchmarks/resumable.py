"""Runs that are made once: a JSON line for each that is finished, and processes of one thread that make the others."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Protocol, TypeVar

import torch


class Job(Protocol):
    """One run to make."""

    def key(self) -> str:
        """What its record is known by: the same for the same run in every process and checkout."""


AnyJob = TypeVar("AnyJob", bound=Job)


class Records:
    """The finished runs, one JSON line each in a file that only this process writes.

    A line that a killed process left unfinished is dropped, and its run made again.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.by_key = path, {}
        whole = 0
        if path.exists():
            for line in path.read_bytes().splitlines(keepends=True):
                try:
                    record = json.loads(line) if line.endswith(b"\n") else None
                except ValueError:
                    record = None
                if record is None:
                    break
                self.by_key[record["key"]] = record
                whole += len(line)
            with path.open("r+b") as file:
                file.truncate(whole)

    def add(self, record: dict) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            file.write(json.dumps(record).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.by_key[record["key"]] = record

    def of(self, jobs: Sequence[Job]) -> list[dict]:
        """The records of these jobs, without those that failed."""
        return [self.by_key[job.key()] for job in jobs if job.key() in self.by_key]


def pool(workers: int) -> ProcessPoolExecutor:
    """``workers`` processes with a thread each."""
    return ProcessPoolExecutor(workers, get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,))


def outcomes(
    executor: Executor, run: Callable[[AnyJob], dict], jobs: Sequence[AnyJob]
) -> Iterator[tuple[AnyJob, dict | BaseException]]:
    """Each job, when it is over, with what ``run`` made of it, or the error that it raised."""
    futures = {executor.submit(run, job): job for job in jobs}
    try:
        for future in as_completed(futures):
            error = future.exception()
            yield futures[future], future.result() if error is None else error
    finally:
        for future in futures:
            future.cancel()
