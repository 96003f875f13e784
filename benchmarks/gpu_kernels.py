"""Time of each kernel of a step on a GPU, from the profiler, whatever the host does meanwhile.

    python -m benchmarks.gpu_kernels OUTDIR

For every backend, method, dtype and size of a chunk: microseconds of gram, climb, guard (gram of the second gradient)
and descend on ViT-B/16, and each one's share of the bandwidth of a copy. Writes ``kernels.md`` line by line. It says
where a step loses what it misses of the bandwidth, and which chunk to take: ``fastsam/kernels/device.py`` has it.
"""

from __future__ import annotations

import argparse
import itertools
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from fastsam import kernels
from fastsam.bench import clock, rivals
from fastsam.bench.bandwidth import FLOAT32_BYTES, CopyBandwidth, passes
from fastsam.bench.gradients import GradientSequence
from fastsam.bench.parameter_sets import ParameterSet, parameter_set
from fastsam.bench.settings import METHODS, PRECISIONS
from fastsam.kernels import device

CHUNKS = (8192, 16384, 32768)  # elements; the first is the one in use
STEPS = 10
HEADER = ("backend", "dtype", "method", "base", "chunk", *(f"{name}, µs" for name in passes("sam", "sgd")), "step, µs")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_kernels", description=__doc__.split("\n")[0])
    parser.add_argument("output", type=Path, help="folder for kernels.md")
    parser.add_argument("--seconds", type=float, default=60, help="no further line is begun after them (default 60)")
    options = parser.parse_args(arguments)
    where = torch.device(os.environ.get("FASTSAM_BENCH_DEVICE", "cuda"))
    end = time.monotonic() + options.seconds
    copy = CopyBandwidth(where)
    copy.sample()
    with open(options.output / "kernels.md", "w") as file:

        def write(*cells: str) -> None:
            print("|", " | ".join(cells), "|", file=file, flush=True)

        print(f"A copy: {copy.gb_per_s:.0f} GB/s. In brackets: share of it. Median of {STEPS} steps.\n", file=file)
        write(*HEADER)
        write(*("---" for _ in HEADER))
        for backend, dtype, method, base, chunk in _cases():
            if time.monotonic() > end:
                break
            names = (backend, dtype, METHODS[method], base, str(chunk))
            try:
                write(*names, *_cells(where, copy.gb_per_s, backend, dtype, method, base, chunk))
            except Exception as error:
                write(*names, clock.failure(error))


def _cases() -> Iterator[tuple[str, str, str, str, int]]:
    """The chunk in use first, everywhere; then the others."""
    backends = [name for name in ("cuda", "triton") if kernels.backends()[name] == "available"]
    for chunk, dtype, backend in itertools.product(CHUNKS, ("fp32", "bf16"), backends):
        for method, base in itertools.product(METHODS, ("sgd", "adamw")):
            if base == "sgd" or method == "sam":
                yield backend, dtype, method, base, chunk


def _cells(where: torch.device, gb_per_s: float, backend: str, dtype: str, method: str, base: str, chunk: int):
    shapes, precision = parameter_set("vit-b16"), PRECISIONS[dtype]
    chosen, device._SMALLEST_CHUNK = device._SMALLEST_CHUNK, chunk
    try:
        times = _times(shapes, precision.weights, where, backend, method, base)
    finally:
        device._SMALLEST_CHUNK = chosen
    mixes = list(passes(method, base).values())
    moved = [m.bytes_per_parameter * precision.bytes // FLOAT32_BYTES * shapes.parameters for m in mixes]
    for each, count in zip([*times, sum(times)], [*moved, sum(moved)], strict=True):
        yield f"{each:.0f} ({count / (each * 1e3) / gb_per_s:.0%})"


def _times(shapes: ParameterSet, dtype: torch.dtype, where: torch.device, backend: str, method: str, base: str):
    """Microseconds of the four kernels of a step, medians."""
    place = {"device": where, "dtype": dtype}
    vector = shapes.random(seed=3, scale=shapes.parameters**-0.5, **place) if method == "eigensam" else []
    parameters = list(shapes.module(shapes.random(seed=0, scale=0.02, **place)).parameters())
    optimizer = rivals.fastsam_optimizer(method, base, parameters, vector, backend)
    first, second = GradientSequence(shapes, **place).fixed()

    def step() -> None:
        for gradients, take in ((first, optimizer.first_step), (second, optimizer.second_step)):
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            take()

    for _ in range(3):
        step()
    clock.wait_for(where)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as taken:
        for _ in range(STEPS):
            step()
        clock.wait_for(where)
    launches = [e.time_range for e in taken.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    launches.sort(key=lambda each: each.start)
    if len(launches) != 4 * STEPS:
        raise RuntimeError(f"{len(launches)} launches in {STEPS} steps, not four in each")
    return [clock.quartiles(each.elapsed_us() for each in launches[i::4])[1] for i in range(4)]


if __name__ == "__main__":
    main()
