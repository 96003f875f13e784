"""Peak memory of a process that trains: the base optimizer's and the buffers of the method, no more."""

import os
import subprocess
import sys
import weakref

import pytest
import torch
from conftest import require_backend

import fastsam
from fastsam import FriendlySAM

WEIGHT_MB = 96
SLACK = 0.15
#: F-SAM keeps the present and the next EMA, because a step that is skipped must not move it.
BUFFERS = {"SAM": 1, "FriendlySAM": 3, "EigenSAM": 2, "FriendlySAM bfloat16": 2, "EigenSAM bfloat16": 1.5}
BASES = ("SGD", "AdamW")

#: A process forked for each case begins with the modules and has nothing else to count.
SCRIPT = """
import os, sys, torch, fastsam

def train(method, base, **options):
    base_class, settings = {"SGD": (torch.optim.SGD, {"momentum": 0.9}), "AdamW": (torch.optim.AdamW, {})}[base]
    params = [torch.nn.Parameter(torch.full((1 << 17, 3), 0.5)) for _ in range(64)]
    for p in params:
        p.grad = torch.full_like(p, 0.01)
    if method == "base":
        optimizer = base_class(params, lr=0.1, **settings)
    else:
        optimizer = getattr(fastsam, method)(params, base_class, lr=0.1, backend="cpu", **settings, **options)
    for step in range(2):
        if method == "base":
            optimizer.step()
            continue
        if method == "EigenSAM" and step == 0:
            optimizer.eigenvector = [torch.full_like(p, 1e-4) for p in params]
        optimizer.first_step()
        optimizer.second_step()

for case in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        method, *half, base = case.split()
        train(method, base, **({"state_dtype": torch.bfloat16} if half else {}))
        with open("/proc/self/status") as file:
            print(case, next(line for line in file if line.startswith("VmHWM")).split()[1], flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


@pytest.fixture(scope="module")
def peaks_mb():
    if not os.path.exists("/proc/self/status"):
        pytest.skip("the peak of a process is read from /proc, which this system does not have")
    require_backend("cpu")
    # glibc then gives every freed tensor back at once: the peak is that of the tensors alive together
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "262144"}
    cases = [f"{method} {base}" for method in ("base", *BUFFERS) for base in BASES]
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, *cases], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    lines = (line.rsplit(maxsplit=2) for line in run.stdout.splitlines())
    return {(method, base): int(kib) / 1024 for method, base, kib in lines}


@pytest.mark.parametrize("method", BUFFERS)
@pytest.mark.parametrize("base", BASES)
def test_peak_memory_is_the_base_optimizers_plus_the_buffers(peaks_mb, base, method):
    extra = (peaks_mb[method, base] - peaks_mb["base", base]) / WEIGHT_MB
    assert extra <= BUFFERS[method] + SLACK
    assert extra > BUFFERS[method] - 1, "the measurement does not see the buffers"


def test_the_weights_are_as_large_as_this_file_says():
    assert 64 * torch.Size((1 << 17, 3)).numel() * 4 == WEIGHT_MB * 2**20


@pytest.mark.parametrize("method", ["FriendlySAM", "EigenSAM"])
def test_frozen_parameters_take_no_memory(backend, method):
    """A backbone whose head is trained: model.parameters() is what scripts hand over."""
    backbone, head = torch.nn.Parameter(torch.randn(1 << 16), requires_grad=False), torch.nn.Parameter(torch.randn(5))
    whole_numbers = torch.nn.Parameter(torch.ones(1 << 16, dtype=torch.uint8), requires_grad=False)  # quantised
    params = [backbone, head, whole_numbers]
    optimizer = getattr(fastsam, method)(params, torch.optim.SGD, lr=0.1, momentum=0.9, backend=backend)
    if method == "EigenSAM":
        optimizer.eigenvector = [torch.ones(1).expand_as(p) for p in (backbone, head, backbone)]
    head.grad = torch.randn(5)
    optimizer.first_step()
    optimizer.second_step()
    assert set(optimizer.state) == {head}
    kept = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in optimizer.state[head].values()}
    assert len(kept) == 2
    assert sum(kept.values()) < 1000


@pytest.mark.parametrize("step", ["first_step", "second_step"])
def test_a_pass_lets_go_of_its_gradients(step):
    parameter = torch.nn.Parameter(torch.randn(5))
    optimizer = FriendlySAM([parameter], torch.optim.SGD, lr=0.1)
    parameter.grad = torch.randn(5)
    if step == "second_step":
        optimizer.first_step()
    gradient = weakref.ref(parameter.grad)
    getattr(optimizer, step)(zero_grad=True)
    assert gradient() is None, "the memory of the gradients is the next pass's"
