"""The CUDA kernels without a GPU: their own code run on this processor, what launches are planned with, the import.

Under FASTSAM_CUDA_ON_HOST=1 the compiled kernels run block after block on CPU tensors. Only barriers, atomics and
the instructions of a GPU are left to prove on one.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from reference import METHODS, build_optimizer
from reference.scripted import assert_same_rounding, bits, copies, like, noise, random_gradients, scripted_steps

import fastsam
from fastsam import kernels
from fastsam.kernels import cuda, device

if cuda._cuda is None:
    pytest.skip(f"backend 'cuda': {cuda.unavailable()}", allow_module_level=True)

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SOME_METHODS = ["SAM", "ASAM", "F-SAM sigma=0.5 lmbda=0.9", "Eigen-SAM given v", "adaptive Eigen-SAM given v"]
SGD_AND_ADAM = [
    "SGD",
    "SGD momentum",
    "SGD nesterov",
    "SGD dampening",
    "SGD maximize",
    "Adam",
    "AdamW",
    "AdamW maximize",
]


@pytest.fixture
def on_host(monkeypatch):
    monkeypatch.setenv("FASTSAM_CUDA_ON_HOST", "1")
    monkeypatch.setattr(device, "_SMALLEST_CHUNK", 2048)  # several chunks without many elements
    for method in (fastsam.SAM, fastsam.EigenSAM):
        monkeypatch.setattr(method.coefficients, "closed_form", True, raising=False)


def dense(dtype):
    return [noise(s, 100 + i, dtype) for i, s in enumerate([(1,), (17,), (0,), (), (6000,), (5, 7), (33, 4), (4096,)])]


def off_alignment(dtype):
    """Neighbours in memory, and one that begins between two vectors."""
    buffer = noise((4200,), 5, dtype)
    return [buffer[:1000].view(10, 100), buffer[1000:1007], buffer[1007:2500], buffer[2601:4199]]


def run(backend, method, base, dtype, tensors=dense, edit=lambda passes: passes, groups=lambda p: p, steps=3):
    """The optimizer after the scripted steps, and what the weights were after each pass."""
    params = [torch.nn.Parameter(t) for t in tensors(dtype)]
    optimizer = build_optimizer(method, base, groups(params), backend)
    if METHODS[method].eigenvector == "given":
        optimizer.eigenvector = [like(p.detach(), 900 + i) * 0.02 for i, p in enumerate(params)]
    passes = edit([random_gradients(params, 1000 * k) for k in range(2 * steps)])
    return optimizer, scripted_steps(optimizer, params, passes)


def compare(method, base, dtype, *args, **kwargs):
    _, expected = run("torch", method, base, dtype, *args, **kwargs)
    optimizer, actual = run("cuda", method, base, dtype, *args, **kwargs)
    assert_same_rounding(actual, expected, dtype)
    return optimizer, actual


@pytest.mark.parametrize("tensors", [dense, off_alignment])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", SOME_METHODS)
def test_kernels_equal_the_specification(on_host, method, dtype, tensors):
    compare(method, "SGD momentum", dtype, tensors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("base", SGD_AND_ADAM)
def test_every_fused_base_equals_the_specification(on_host, base, dtype):
    compare("F-SAM sigma=1.0 lmbda=0.9", base, dtype)


@pytest.mark.parametrize("base", ["SGD momentum", "AdamW"])
@pytest.mark.parametrize("method", SOME_METHODS)
def test_missing_gradients(on_host, method, base):
    missing = {(1, 0), (4, 1), (5, 3), *((6, k) for k in range(6))}  # (parameter, pass)

    def drop(passes):
        return [[None if (i, k) in missing else g for i, g in enumerate(p)] for k, p in enumerate(passes)]

    compare(method, base, torch.float64, edit=drop)


def test_several_groups(on_host):
    def groups(params):
        return [
            {"params": params[:2], "rho": 0.3, "lr": 0.01, "momentum": 0.0},
            {"params": params[2:5], "perturb": False},
            {"params": params[5:], "weight_decay": 0.1, "adaptive": True, "sigma": 0.2, "lmbda": 0.5},
        ]

    compare("F-SAM sigma=1.0 lmbda=0.9", "SGD momentum", torch.float32, groups=groups)


@pytest.mark.parametrize("gradients", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_another_type_than_the_weights(on_host, weights, gradients):
    ends = []
    for backend in ("torch", "cuda"):
        params = [torch.nn.Parameter(noise((n,), n, weights)) for n in (5, 3000)]
        optimizer = fastsam.FriendlySAM(params, torch.optim.SGD, lr=0.1, momentum=0.9, backend=backend)
        for k in range(4):
            for i, p in enumerate(params):
                p.grad_dtype = None
                p.grad = noise(p.shape, 10 * k + i, gradients if i else weights)
            (optimizer.second_step if k % 2 else optimizer.first_step)()
        ends.append(copies(params))
    assert_same_rounding(ends[1:], ends[:1], weights)


@pytest.mark.parametrize("base", ["SGD momentum", "AdamW"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", [0, 1])
def test_a_step_that_overflows_changes_nothing_and_the_next_is_the_first(on_host, base, bad, which):
    def spoil(passes):
        passes[which][4][123] = bad
        return passes

    _, seen = run("cuda", "F-SAM sigma=1.0 lmbda=0.9", base, torch.float32, edit=spoil, steps=2)
    assert bits(seen[1]) == bits(dense(torch.float32))
    _, clean = run("torch", "F-SAM sigma=1.0 lmbda=0.9", base, torch.float32, edit=lambda p: p[2:], steps=2)
    assert_same_rounding(seen[2:], clean, torch.float32)


@pytest.mark.parametrize("options", [{"max_norm": 0.5}, {"clip_value": 0.3}], ids=str)
@pytest.mark.parametrize("base", ["SGD momentum", "Adam"])
def test_clipping(on_host, base, options):
    ends = []
    for backend in ("torch", "cuda"):
        params = [torch.nn.Parameter(t) for t in dense(torch.float64)]
        optimizer = build_optimizer("SAM", base, params, backend)
        for k, step in enumerate((optimizer.first_step, lambda o=optimizer: o.second_step(**options))):
            for p, g in zip(params, random_gradients(params, k), strict=True):
                p.grad = g
            step()
        ends.append(copies(params))
    assert_same_rounding(ends[1:], ends[:1], torch.float64)


def test_restore_is_exact(on_host):
    params = [torch.nn.Parameter(t) for t in off_alignment(torch.bfloat16)]
    before = bits(params)
    optimizer = build_optimizer("SAM", "SGD", params, "cuda")
    for p, g in zip(params, random_gradients(params, 1), strict=True):
        p.grad = g
    with optimizer.perturbed():
        assert bits(params) != before
    assert bits(params) == before


# ---- what launches are planned with ----------------------------------------------------------------------------


@pytest.mark.parametrize("table", ["ROW", "CHUNK", "ASCENT", "SGD", "ADAM", "SCALING"])
def test_tables_have_the_columns_that_the_kernels_read(table):
    assert tuple(cuda._cuda.columns()[table]) == getattr(device, table)


@pytest.mark.parametrize("chunks", [0, 1, 7, 4096, 4097, 100_000])
def test_gram_walks_every_chunk_once_and_the_others_backwards(chunks):
    blocks = cuda._cuda.gram_blocks(chunks)
    assert blocks <= cuda._cuda.MOST_GRAM_BLOCKS
    walked = [c for b in range(blocks) for c in range(b, chunks, blocks)]
    assert sorted(walked) == list(range(chunks))
    if chunks:
        assert cuda._cuda.reversed_chunk(0, chunks) == chunks - 1
        assert cuda._cuda.reversed_chunk(chunks - 1, chunks) == 0


@pytest.mark.parametrize(
    "count, width, addresses, expected",
    [
        (8192, 4, 0, 8192),
        (8191, 4, 64, 8188),
        (3, 4, 0, 0),
        (100, 8, 0x10 | 0x30, 96),
        (100, 8, 0x10 | 0x12, 0),
        (0, 2, 0, 0),
    ],
)
def test_whole_vectors_only_where_every_address_is_a_multiple_of_16(count, width, addresses, expected):
    assert cuda._cuda.vector_count(count, width, addresses) == expected


def test_a_block_finds_the_elements_of_its_chunk():
    #       weight, gradient, offset, size, group, param, climbed, gradient type
    rows = torch.tensor([[4096, 0, 0, 100, 1, 2, 1, 0], [8192, 1024, 128, 5000, 3, 4, 0, 2]])
    chunks = device.build_chunks([100, 5000], 2048)
    found = [cuda._cuda.piece(rows.data_ptr(), chunks.data_ptr(), i, 4) for i in range(len(chunks))]
    assert found == [
        (4096, 0, 0, 100, 1, 2, 0, True),
        (8192, 1024, 128, 2048, 3, 4, 2, False),
        (8192 + 4 * 2048, 1024 + 2 * 2048, 128 + 2048, 2048, 3, 4, 2, False),
        (8192 + 4 * 4096, 1024 + 2 * 4096, 128 + 4096, 904, 3, 4, 2, False),
    ]


# ---- where the backend serves ----------------------------------------------------------------------------------


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0), (10, 0), (12, 1)])
def test_a_gpu_that_some_code_was_compiled_for(capability):
    assert cuda._too_old(capability, (800, 900, 1000)) is None


@pytest.mark.parametrize(
    "capability, architectures", [((7, 5), (800, 900, 1000)), ((9, 0), (800, 1000)), ((8, 0), (860, 1000))]
)
def test_a_gpu_that_nothing_was_compiled_for(capability, architectures):
    reason = cuda._too_old(capability, architectures)
    assert f"sm_{capability[0]}{capability[1]}" in reason and "FASTSAM_CUDA_ARCHS" in reason


def test_auto_prefers_cuda_to_triton():
    assert kernels.NAMES.index("cuda") < kernels.NAMES.index("triton") < kernels.NAMES.index("cpu")


def test_the_library_loads_and_says_why_it_cannot_run():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    code = "import fastsam; from fastsam import _cuda; print(_cuda.problem()); print(fastsam.backends()['cuda'])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True
    )
    problem, status = done.stdout.splitlines()
    assert "driver" in problem or "no CUDA-capable device" in problem
    assert status == "torch finds no GPU"


def test_a_launch_without_a_driver_raises_with_cudas_words():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    rows, chunks = (
        torch.zeros(1, len(device.ROW), dtype=torch.int64),
        torch.zeros(1, len(device.CHUNK), dtype=torch.int64),
    )
    with pytest.raises(RuntimeError, match="CUDA could not select the device"):
        cuda._cuda.restore((rows.data_ptr(), chunks.data_ptr(), 1, 1, 0, False, 0, 0), 0)
