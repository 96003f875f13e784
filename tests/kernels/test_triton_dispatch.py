"""Launches by the kernel that Triton compiled before, on a driver that notes them: as Triton dispatches them."""

import os

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("nothing is compiled under TRITON_INTERPRET=1", allow_module_level=True)

from fake_triton_driver import FakeDriver  # noqa: E402

import fastsam  # noqa: E402
from fastsam.kernels import triton as backend  # noqa: E402

if backend._CONSTANTS_PASSED is None:
    pytest.skip(f"Triton {triton.__version__} dispatches every launch", allow_module_level=True)


@pytest.fixture
def driver(monkeypatch):
    driver = FakeDriver()
    for name, value in vars(triton.runtime.driver).items():  # set_active() writes into one of them
        monkeypatch.setattr(triton.runtime.driver, name, value)
    triton.runtime.driver.set_active(driver)
    monkeypatch.setattr(backend, "unavailable", lambda: None)
    monkeypatch.setattr(backend, "refuses", lambda device, dtype: None)
    monkeypatch.setattr(backend, "_compiled", {})
    return driver


@pytest.fixture
def dispatched(monkeypatch):
    """The names of kernels that went through Triton's dispatch."""
    names, run = [], triton.JITFunction.run

    def noted(self, *args, **kwargs):
        names.append(self.__name__)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(triton.JITFunction, "run", noted)
    return names


def problem(method=fastsam.SAM, base=torch.optim.SGD, dtype=torch.float32, shift=0, **options):
    """Weights that begin ``shift`` elements behind a multiple of 16 bytes, and their optimizer."""
    params = [torch.nn.Parameter(torch.ones(n + shift, dtype=dtype)[shift:].clone()) for n in (64, 8)]
    return params, method(params, base, lr=0.1, backend="triton", **options)


def step(params, optimizer, dtype=None):
    for take in (optimizer.first_step, optimizer.second_step):
        for p in params:
            if dtype is not None:
                p.grad, p.grad_dtype = None, dtype
            p.grad = torch.ones_like(p, dtype=dtype)
        take()


def addresses(launch):
    """Grid, stream, kernel, and the addresses and numbers that the kernel reads; the constants are in it."""
    grid, stream, kernel, arguments = launch
    plain = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments]
    return grid, stream, kernel, plain


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("method", [fastsam.SAM, fastsam.FriendlySAM])
def test_a_kept_kernel_is_launched_as_the_dispatch_launches_it(driver, dispatched, monkeypatch, method, base):
    params, optimizer = problem(method, base)
    gradients = [[torch.ones_like(p) for p in params] for _ in range(2)]

    def launches():
        driver.launches.clear()
        for passed, take in zip(gradients, (optimizer.first_step, optimizer.second_step), strict=True):
            for p, g in zip(params, passed, strict=True):
                p.grad = g
            take()
        return [addresses(launch) for launch in driver.launches]

    for _ in range(2 if method is fastsam.SAM else 4):
        launches()
    before = len(dispatched)
    kept = [launches() for _ in range(2)]  # F-SAM's averages change places
    assert len(dispatched) == before
    monkeypatch.setattr(backend, "_compiled", {})
    monkeypatch.setattr(backend, "_CONSTANTS_PASSED", None)
    assert [launches() for _ in range(2)] == kept
    assert len(dispatched) == before + 8


def test_gram_is_compiled_once_for_the_norm_and_once_for_the_guard(driver, dispatched):
    params, optimizer = problem()
    for _ in range(3):
        step(params, optimizer)
    assert dispatched == ["gram", "climb", "gram", "descend_sgd"], "the guard carries the sums of the first pass on"


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ({"method": fastsam.FriendlySAM}, {"gram", "climb"}),
        ({"adaptive": True}, {"gram"}),
        ({"momentum": 0.9}, {"descend_sgd"}),
        ({"dtype": torch.float64}, {"gram", "climb", "descend_sgd"}),
    ],
    ids=["another method", "adaptive", "momentum", "float64"],
)
def test_another_kernel_is_compiled_where_the_launch_is_another(driver, dispatched, other, expected):
    step(*problem())
    dispatched.clear()
    for _ in range(2):
        pair = problem(**other)
        step(*pair)
        step(*pair)
    assert expected <= set(dispatched)
    assert len(dispatched) <= 6, "two kernels of a pass at most: m is there from the second step on, say"


def test_gradients_of_another_dtype_have_kernels_of_their_own(driver, dispatched):
    params, optimizer = problem(dtype=torch.bfloat16)
    step(params, optimizer)
    dispatched.clear()
    step(params, optimizer, torch.float32)
    assert dispatched == ["gram", "climb", "gram", "descend_sgd"]


def test_a_buffer_off_alignment_is_never_given_to_a_kernel_for_aligned_ones(driver, dispatched):
    params, optimizer = problem()
    for _ in range(2):
        step(params, optimizer)
    dispatched.clear()
    space = next(iter(optimizer.two_pass.spaces))
    backup = space.buffer("backup")
    aligned = {launch[2] for launch in driver.launches}
    shifted = torch.zeros(backup.flat.numel() + 1)[1:]
    assert shifted.data_ptr() % 16
    driver.launches.clear()
    layout = space.table.layout(space)
    for _ in range(2):
        backend.launch("restore", space, layout, (shifted,))
    assert dispatched == ["restore", "restore"]
    assert not {launch[2] for launch in driver.launches} & aligned
    for _ in range(2):
        backend.launch("restore", space, layout, (backup.flat,))
    assert dispatched == ["restore", "restore", "restore"]
    backend.launch("restore", space, layout, (shifted,))
    assert dispatched == ["restore"] * 4


def test_a_triton_whose_convention_is_not_known_dispatches_every_launch(driver, dispatched, monkeypatch):
    monkeypatch.setattr(backend, "_CONSTANTS_PASSED", None)
    params, optimizer = problem()
    for _ in range(3):
        step(params, optimizer)
    assert len(dispatched) == 12
