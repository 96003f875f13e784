"""The same bits from run to run, for any number of threads, any alignment and any instruction set."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from reference import METHODS, build_optimizer, second_side
from reference.scripted import bits, like, noise, random_gradients, scripted_steps

BIG_SHAPES = ((3, 1_000_001), (129, 513), (7,), (500_000,), (1,))


def big_parameters(offset):
    params = []
    for i, shape in enumerate(BIG_SHAPES):
        size = torch.Size(shape).numel()
        buffer = torch.empty(size + offset)[offset:]
        params.append(torch.nn.Parameter(buffer.copy_(noise((size,), i)).view(shape)))
    return params


def big_run(method, base, backend, offset=0):
    params = big_parameters(offset)
    optimizer = build_optimizer(method, base, params, backend)
    if METHODS[method].eigenvector:
        optimizer.eigenvector = [like(p.detach(), 900 + i) * 1e-3 for i, p in enumerate(params)]
    gradients = [random_gradients(params, 40 * k) for k in range(2)]
    return bits(scripted_steps(optimizer, params, [*gradients, *gradients])[-1])


@pytest.mark.parametrize(
    ("method", "base"),
    [("ASAM", "AdamW"), ("F-SAM sigma=0.5 lmbda=0.9", "SGD momentum"), ("Eigen-SAM given v", "SGD momentum")],
)
def test_the_bits_are_the_same_for_any_number_of_threads_and_any_alignment(cpu, method, base):
    runs = []
    for threads, offset in ((1, 0), (2, 0), (4, 0), (4, 0), (3, 1), (2, 5)):
        torch.set_num_threads(threads)
        runs.append(big_run(method, base, cpu, offset=offset))
    assert all(run == runs[0] for run in runs[1:])


@pytest.mark.parametrize("base", ["SGD momentum", "AdamW"])
def test_the_bits_of_a_second_side_are_the_same_for_any_number_of_threads_and_any_alignment(cpu, base):
    runs = []
    for threads, offset in ((1, 0), (2, 0), (4, 1)):
        torch.set_num_threads(threads)
        params = big_parameters(offset)
        side = second_side.SecondSide(cpu, base, "everything", params, groups=second_side.several_groups)
        runs.append(bits(second_side.steps_of(side, [random_gradients(params, 40 * k) for k in range(2)])[-1]))
    assert all(run == runs[0] for run in runs[1:])


def test_the_specification_gives_the_same_bits_from_run_to_run():
    torch.set_num_threads(2)
    assert big_run("F-SAM sigma=0.5 lmbda=0.9", "SGD", "torch") == big_run("F-SAM sigma=0.5 lmbda=0.9", "SGD", "torch")


ISA_SCRIPT = """
    import hashlib, sys, torch
    sys.path.insert(0, {tests!r})
    from reference import METHODS, build_optimizer, second_side
    from reference.scripted import bits, like, noise, random_gradients, scripted_steps
    digest = hashlib.sha256()
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for method in ("SAM", "ASAM", "F-SAM sigma=0.5 lmbda=0.9", "Eigen-SAM given v", "adaptive F-SAM"):
            for base in ("SGD", "SGD nesterov", "SGD dampening", "SGD maximize", "AdamW", "Adam"):
                shapes = [(20_003,), (7, 9), ()]
                params = [torch.nn.Parameter(noise(s, i, dtype)) for i, s in enumerate(shapes)]
                optimizer = build_optimizer(method, base, params, "cpu")
                if METHODS[method].eigenvector:
                    optimizer.eigenvector = [like(p.detach(), i) * 0.01 for i, p in enumerate(params)]
                passes = [random_gradients(params, 40 * k) for k in range(4)]
                for record in scripted_steps(optimizer, params, passes):
                    digest.update(b"".join(bits(record)))
        for base in ("SGD nesterov", "AdamW"):
            params = [torch.nn.Parameter(noise(s, i, dtype)) for i, s in enumerate(shapes)]
            side = second_side.SecondSide("cpu", base, "everything", params, groups=second_side.several_groups)
            for record in second_side.steps_of(side, [random_gradients(params, 40 * k) for k in range(4)]):
                digest.update(b"".join(bits(record)))
    print(digest.hexdigest())
"""
FEATURES = {"baseline": set(), "avx2": {"avx2", "fma", "f16c"}, "avx512": {"avx512f", "avx512bw", "avx512vl"}}


def cpu_features():
    try:
        with open("/proc/cpuinfo") as file:
            return set(next(line for line in file if line.startswith("flags")).split())
    except (OSError, StopIteration):
        return set()


def test_every_instruction_set_gives_the_same_bits(cpu):
    hashes = {}
    for isa, needed in FEATURES.items():
        if needed <= cpu_features():
            script = textwrap.dedent(ISA_SCRIPT.format(tests=os.path.dirname(os.path.dirname(__file__))))
            environment = {**os.environ, "FASTSAM_ISA": isa, "OMP_NUM_THREADS": "1"}
            run = subprocess.run(
                [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
            )
            assert run.returncode == 0, run.stderr
            hashes[isa] = run.stdout.strip()
    if len(hashes) < 2:
        pytest.skip(f"this processor has {list(hashes)} alone: there is nothing to compare")
    assert len(set(hashes.values())) == 1, hashes
