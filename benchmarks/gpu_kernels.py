"""Time of each kernel of a step on a GPU, from the profiler, whatever the host does meanwhile.

    python -m benchmarks.gpu_kernels OUTDIR

For every backend, method, dtype and size of a chunk: microseconds of gram, climb, guard (gram of the second gradient)
and descend on ViT-B/16, and each one's share of the bandwidth of a copy. Writes ``kernels.md`` line by line, each
backend in a process of its own. It says where a step loses what it misses of the bandwidth, and which chunk to take:
``fastsam/kernels/device.py`` has it.

With ``FASTSAM_BENCH_DEVICE=cpu`` every line is tried on a CPU, at tiny sizes and by the host's clock.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import workers
from benchmarks.gpu_targets import JUDGED
from fastsam import kernels
from fastsam.commands.bench import clock, rivals
from fastsam.commands.bench.bandwidth import FLOAT32_BYTES, CopyBandwidth, passes
from fastsam.commands.bench.gradients import GradientSequence
from fastsam.commands.bench.parameter_sets import ParameterSet, parameter_set
from fastsam.commands.bench.settings import METHODS, PRECISIONS
from fastsam.kernels import device

CHUNKS = (8192, 16384, 32768)  # elements; the first is the one in use
STEPS = 10
HEADER = ("backend", "dtype", "method", "base", "chunk", *(f"{name}, µs" for name in passes("sam", "sgd")), "step, µs")
_STAND_INS = {"cuda": "cpu", "triton": "torch"}
_QUICK_COPY = 1 << 20  # bytes


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_kernels", description=__doc__.split("\n")[0])
    parser.add_argument("output", type=Path, help="folder for kernels.md")
    parser.add_argument("--seconds", type=float, default=60, help="about how long it may take (default 60)")
    parser.add_argument("--backend", choices=workers.BACKENDS, help="add the lines of this one alone, in this process")
    options = parser.parse_args(arguments)
    lines = Lines(options.output / "kernels.md")
    if options.backend:
        return measure(lines, options.backend, time.monotonic() + options.seconds)
    if reason := workers.no_gpu():
        parser.error(f"{reason}; FASTSAM_BENCH_DEVICE=cpu tries every line without a GPU")
    end = time.monotonic() + options.seconds
    lines.begin()
    found, status = workers.available(), 0
    for number, (backend, why) in enumerate(found.items()):
        how = why
        if why == "available":
            left = (end - time.monotonic()) / (len(found) - number)
            ours = ["--backend", backend, "--seconds", f"{0.75 * left:.0f}"]  # it has to start, and ends with a line
            how = workers.run("benchmarks.gpu_kernels", [str(options.output), *ours], left)
        if how:
            lines.add(backend, how, *[""] * (len(HEADER) - 2))
            status = 1 if why == "available" else status
    return status


class Lines:
    """``kernels.md``, to which every process adds, and the screen where the folder cannot be written to."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def begin(self) -> None:
        self._path.unlink(missing_ok=True)
        self.add(*HEADER)
        self.add(*("---" for _ in HEADER))

    def add(self, *cells: str) -> None:
        line = "| " + " | ".join(cells) + " |\n"
        try:
            with open(self._path, "a") as file:
                file.write(line)
        except OSError as error:
            print(f"{self._path}: {error.strerror}: {line}", end="", flush=True)


def measure(lines: Lines, backend: str, end: float) -> int:
    """The lines of one backend, none begun after ``end``. Returns 1 if one failed."""
    where = torch.device("cpu" if workers.stand_in() else "cuda")
    copy, status = CopyBandwidth(where, _QUICK_COPY if workers.stand_in() else None), 0
    copy.sample()
    lines.add(backend, f"a copy: {copy.gb_per_s:.0f} GB/s, in brackets the share of it", *[""] * (len(HEADER) - 2))
    for dtype, method, base, chunk in _cases():
        if time.monotonic() > end:
            lines.add(backend, "the time was over", *[""] * (len(HEADER) - 2))
            break
        names = (backend, dtype, METHODS[method], base, str(chunk))
        try:
            lines.add(*names, *_cells(where, copy.gb_per_s, backend, dtype, method, base, chunk))
        except Exception as error:
            lines.add(*names, clock.failure(error), *[""] * 4)
            status = 1
            if reason := workers.broken(where.type):
                lines.add(backend, f"nothing runs any more in this process: {reason}", *[""] * (len(HEADER) - 2))
                break
    return status


def _cases() -> Iterator[tuple[str, str, str, int]]:
    """The chunk in use first, everywhere; then the others."""
    for chunk, dtype in itertools.product(CHUNKS, ("fp32", "bf16")):
        for method, base in itertools.product(JUDGED, ("sgd", "adamw")):
            if base == "sgd" or method == "sam":
                yield dtype, method, base, chunk


def _cells(where: torch.device, gb_per_s: float, backend: str, dtype: str, method: str, base: str, chunk: int):
    shapes, precision = parameter_set("vit-b16"), PRECISIONS[dtype]
    if where.type == "cpu":
        shapes = ParameterSet("tiny", "tiny", ((64, 32), (64,), (8, 8, 8)))
    with mock.patch.object(device, "_SMALLEST_CHUNK", chunk):
        times = _times(shapes, precision.weights, where, backend, method, base)
    mixes = list(passes(method, base).values())
    moved = [m.bytes_per_parameter * precision.bytes // FLOAT32_BYTES * shapes.parameters for m in mixes]
    for each, count in zip([*times, sum(times)], [*moved, sum(moved)], strict=True):
        yield f"{each:.0f} ({count / (each * 1e3) / gb_per_s:.0%})"


def _times(shapes: ParameterSet, dtype: torch.dtype, where: torch.device, backend: str, method: str, base: str):
    """Microseconds of the four kernels of a step, medians."""
    place = {"device": where, "dtype": dtype}
    name = _STAND_INS[backend] if where.type == "cpu" else backend
    vector = shapes.random(seed=3, scale=shapes.parameters**-0.5, **place) if method == "eigensam" else []
    parameters = list(shapes.module(shapes.random(seed=0, scale=0.02, **place)).parameters())
    optimizer = rivals.fastsam_optimizer(method, base, parameters, vector, name)
    first, second = GradientSequence(shapes, **place).fixed()

    def step() -> None:
        for gradients, take in ((first, optimizer.first_step), (second, optimizer.second_step)):
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            take()

    for _ in range(3):
        step()
    clock.wait_for(where)
    taken = _by_the_host(kernels.choose(name, where, dtype)) if where.type == "cpu" else _by_the_profiler(where)
    with taken as launches:
        for _ in range(STEPS):
            step()
        clock.wait_for(where)
    if len(launches) != 4 * STEPS:
        raise RuntimeError(f"{len(launches)} launches in {STEPS} steps, not four in each")
    return [clock.quartiles(launches[i::4])[1] for i in range(4)]


@contextlib.contextmanager
def _by_the_profiler(where: torch.device) -> Iterator[list[float]]:
    """Microseconds of what ran on the GPU, in its order; there when the block is left."""
    launches: list[float] = []
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as taken:
        yield launches
    ranges = [e.time_range for e in taken.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    launches += [each.elapsed_us() for each in sorted(ranges, key=lambda each: each.start)]


@contextlib.contextmanager
def _by_the_host(backend: ModuleType) -> Iterator[list[float]]:
    """The same of a CPU's backend in the GPU's place."""
    launches: list[float] = []

    def timed(function):
        def call(*arguments):
            begin = time.perf_counter()
            result = function(*arguments)
            launches.append((time.perf_counter() - begin) * 1e6)
            return result

        return call

    names = ("gram", "climb", "descend_sgd", "descend_adam")
    with mock.patch.multiple(backend, **{name: timed(getattr(backend, name)) for name in names}):
        yield launches


if __name__ == "__main__":
    raise SystemExit(main())
