"""The CUDA kernels without a GPU: their own code run on this processor, what launches are planned with, the import.

Under FASTSAM_CUDA_ON_HOST=1 the compiled kernels run block after block on CPU tensors. Barriers and atomics are
test_cuda_concurrency.py's, and what nvcc makes of them all is test_ptx.py's.
"""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tape
import torch
from net import Net, batch
from reference import METHODS, SOME_METHODS, build_optimizer, second_side
from reference.scripted import (
    assert_same_rounding,
    bits,
    copies,
    like,
    noise,
    random_gradients,
    scripted_steps,
    set_gradients,
)
from torch.utils._python_dispatch import TorchDispatchMode

import fastsam
from fastsam import kernels
from fastsam.flat.space import FlatSpace
from fastsam.kernels import cuda, device, launches
from fastsam.methods.eigen import Estimate

if cuda._cuda is None:
    pytest.skip(f"backend 'cuda': {cuda.unavailable()}", allow_module_level=True)

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
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


def dense(dtype):
    return [noise(s, 100 + i, dtype) for i, s in enumerate([(1,), (17,), (0,), (), (6000,), (5, 7), (33, 4), (4096,)])]


def off_alignment(dtype):
    """Neighbours in memory, and one that begins between two vectors."""
    buffer = noise((4200,), 5, dtype)
    return [buffer[:1000].view(10, 100), buffer[1000:1007], buffer[1007:2500], buffer[2601:4199]]


def run(
    backend, method, base, dtype, tensors=dense, edit=lambda passes: passes, groups=lambda p: p, steps=3, **options
):
    """The optimizer after the scripted steps, and what the weights were after each pass."""
    params = [torch.nn.Parameter(t) for t in tensors(dtype)]
    optimizer = build_optimizer(method, base, groups(params), backend, **options)
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


@pytest.mark.parametrize("tensors", [dense, off_alignment])
@pytest.mark.parametrize("base", ["SGD momentum", "AdamW"])
@pytest.mark.parametrize("method", SOME_METHODS[2:])
def test_vectors_in_bfloat16(on_host, method, base, tensors):
    compare(method, base, torch.float32, tensors, state_dtype=torch.bfloat16)


@pytest.mark.parametrize("base", ["SGD nesterov", "AdamW"])
@pytest.mark.parametrize("tensors", [dense, off_alignment])
def test_a_stored_vector_in_bfloat16(on_host, base, tensors):
    second_side.compare("cuda", base, "everything", torch.float32, tensors, state_dtype=torch.bfloat16)


@pytest.mark.parametrize("which", [0, 1], ids=["first pass", "second pass"])
def test_an_overflow_leaves_an_average_in_bfloat16(on_host, which):
    options = dict(tensors=off_alignment, steps=2, state_dtype=torch.bfloat16)

    def spoil(passes):
        passes[2 + which][1][3] = float("nan")
        return passes

    optimizer, seen = run("cuda", "F-SAM sigma=0.5 lmbda=0.9", "SGD momentum", torch.float32, edit=spoil, **options)
    assert bits(seen[3]) == bits(seen[1])
    params = optimizer.param_groups[0]["params"]
    expected = [g.bfloat16() for g in random_gradients(params, 0)]
    assert bits([optimizer.state[p]["momentum"] for p in params]) == bits(expected)


@pytest.mark.parametrize("base", ["SGD momentum", "AdamW"])
def test_stochastic_rounding_draws_what_the_specification_draws(on_host, base):
    """Gradients are whole numbers, so that no backend's sum of squares is rounded another way."""
    ends = []
    for backend in ("cuda", "torch"):

        def whole(passes):
            return [[g.round() for g in gradients] for gradients in passes]

        options = dict(tensors=lambda dtype: [*dense(dtype), *off_alignment(dtype)], stochastic_rounding=True)
        _, seen = run(backend, "SAM", base, torch.bfloat16, edit=whole, **options)
        ends.append(bits(seen[-1]))
    assert ends[0] == ends[1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("base", SGD_AND_ADAM)
def test_every_fused_base_equals_the_specification(on_host, base, dtype):
    compare("F-SAM sigma=1.0 lmbda=0.9", base, dtype)


def test_what_an_abandoned_accumulation_left_in_a_buffer_is_no_average(on_host):
    """The first parameter has a gradient in the micro-batches that say so; the first three are abandoned."""
    outcomes = []
    for backend in ("torch", "cuda"):
        params = [torch.nn.Parameter(noise((6,), i, torch.float64)) for i in range(2)]
        optimizer = build_optimizer("F-SAM sigma=0.5 lmbda=0.9", "SGD momentum", params, backend)
        for k, meets in enumerate([False, True, True, False, False, True]):

            def closure(k=k, used=params[not meets :]):
                loss = sum((p * noise((6,), 10 + k, torch.float64)).square().sum() for p in used)
                loss.backward()
                return loss

            if k == 3:
                optimizer.zero_grad()
            optimizer.accumulate(closure)
        optimizer.descend()
        outcomes.append([*params, *(optimizer.state[p]["momentum"] for p in params)])
    torch.testing.assert_close(outcomes[1], outcomes[0], rtol=1e-12, atol=1e-12)


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
    if not hasattr(torch.Tensor, "grad_dtype"):
        pytest.skip("this torch gives no parameter a gradient of another dtype")
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


def test_an_eigenvector_that_only_some_spaces_have_bends_the_step_in_all(on_host):
    """c_d = rho (1/n - alpha s <d,v>/n^2) is one number, wherever v is."""
    ends = []
    for backend in ("torch", "cuda"):
        params = [
            torch.nn.Parameter(noise((3000,), i, dtype)) for i, dtype in enumerate((torch.float32, torch.float64))
        ]
        optimizer = fastsam.EigenSAM(params, torch.optim.SGD, rho=1.0, alpha=0.9, lr=0.1, backend=backend)
        optimizer.eigenvector = [like(p.detach(), 9) for p in params]
        del optimizer.state[params[1]]["eigenvector"]
        set_gradients(params, [like(p.detach(), 9) for p in params])
        with optimizer.perturbed():
            ends.append(copies(params))
    assert_same_rounding(ends[1:], ends[:1], torch.float32)


def test_an_average_that_was_cleared_starts_again(on_host):
    """Also in memory that was marked as never started, and then took over the average of a pass without a gradient."""
    params = [torch.nn.Parameter(t) for t in dense(torch.float32)]
    optimizer = build_optimizer("F-SAM sigma=1.0 lmbda=0.9", "SGD", params, "cuda")
    passes = [random_gradients(params, k) for k in range(6)]
    passes[2][4] = None
    scripted_steps(optimizer, params, passes[:4])
    optimizer.state.clear()
    scripted_steps(optimizer, params, passes[4:])
    assert bits([optimizer.state[p]["momentum"] for p in params]) == bits(passes[4])


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


@pytest.mark.parametrize("tensors", [dense, off_alignment])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("base", SGD_AND_ADAM)
def test_second_side_equals_the_specification(on_host, base, dtype, tensors):
    options = dict(groups=second_side.several_groups, grad_scale=0.5, flattened=tensors is off_alignment)
    second_side.compare("cuda", base, "everything", dtype, tensors, **options)


@pytest.mark.parametrize("mixture", second_side.MIXTURES)
@pytest.mark.parametrize("base", ["SGD nesterov", "Adam"])
def test_every_mixture_with_missing_gradients(on_host, base, mixture):
    def drop(passes):
        for i, k in ((1, 0), (4, 1), (5, 3), (6, 0), (6, 1)):
            passes[k][i] = None
        return passes

    second_side.compare("cuda", base, mixture, torch.float64, dense, edit=drop, clip_value=0.4)


def test_without_direct_coefficients_and_learning_rate_no_bit_changes(on_host):
    before, after = second_side.without_a_step("cuda")
    assert before == after


@pytest.mark.parametrize("base", ["SGD momentum", "AdamW"])
def test_a_second_side_without_a_stored_vector(on_host, base):
    second_side.compare("cuda", base, "Stable SAM", torch.float32, dense, stored=False)


@pytest.mark.parametrize("gradients", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)
def test_second_side_with_gradients_of_another_type(on_host, weights, gradients):
    if not hasattr(torch.Tensor, "grad_dtype"):
        pytest.skip("this torch gives no parameter a gradient of another dtype")

    def edit(passes):
        return [[g.to(gradients) if i % 2 else g for i, g in enumerate(p)] for p in passes]

    second_side.compare("cuda", "SGD momentum", "everything", weights, dense, edit=edit)


@pytest.mark.parametrize("where", [0, 1, "s"], ids=["first gradient", "second gradient", "s"])
@pytest.mark.parametrize("base", ["SGD momentum", "AdamW"])
def test_a_second_side_that_overflows_writes_nothing(on_host, base, where):
    before, after = second_side.spoiled("cuda", base, where, float("inf"))
    assert before == after


def test_a_mixture_has_its_clipping_to_a_norm_in_its_coefficients(on_host):
    second_side.compare("cuda", "SGD", "GSAM", torch.float64, dense, max_norm=1e-3)


@pytest.mark.parametrize("shapes", [[(5,), (0,), (3000,)], [(0,), (2, 0)]], ids=["one empty", "all empty"])
@pytest.mark.parametrize("bad", [False, True], ids=["", "one step overflows"])
def test_steps_of_parameters_without_elements_are_counted(on_host, shapes, bad):
    """A shard may be empty, and the process that has it the one that saves the count."""
    counts = {}
    for backend in ("torch", "cpu", "cuda"):
        params = [torch.nn.Parameter(noise(shape, i, torch.float32)) for i, shape in enumerate(shapes)]
        optimizer = build_optimizer("SAM", "AdamW", params, backend)
        passes = [random_gradients(params, k) for k in range(6)]
        passes[4][1] = passes[5][1] = None
        if bad and shapes[0] != (0,):
            passes[2][0][0] = float("nan")
        scripted_steps(optimizer, params, passes)
        counts[backend] = [float(optimizer.state[p]["step"]) for p in params]
    assert counts["cuda"] == counts["cpu"] == counts["torch"]
    assert counts["torch"][1] == (1 if bad and shapes[0] != (0,) else 2)


def test_restore_is_exact(on_host):
    params = [torch.nn.Parameter(t) for t in off_alignment(torch.bfloat16)]
    before = bits(params)
    optimizer = build_optimizer("SAM", "SGD", params, "cuda")
    for p, g in zip(params, random_gradients(params, 1), strict=True):
        p.grad = g
    with optimizer.perturbed():
        assert bits(params) != before
    assert bits(params) == before


@pytest.mark.parametrize("tensors", [dense, off_alignment])
def test_torchs_default_device_is_not_asked(on_host, tensors):
    expected = run("cuda", "F-SAM sigma=0.5 lmbda=0.9", "AdamW", torch.float32, tensors)[1]
    params = [torch.nn.Parameter(t) for t in tensors(torch.float32)]
    optimizer = build_optimizer("F-SAM sigma=0.5 lmbda=0.9", "AdamW", params, "cuda")
    passes = [random_gradients(params, 1000 * k) for k in range(6)]
    with torch.device("meta"):  # in place of a GPU
        actual = scripted_steps(optimizer, params, passes)
    assert_same_rounding(actual, expected, torch.float32)


def test_what_is_measured_after_a_step_does_not_change_its_decision(on_host):
    """A curvature estimate runs the same kernels; neither ``found_inf`` nor a micro-batch's overflow is lost to it."""
    model = Net()
    optimizer = fastsam.EigenSAM(
        model.parameters(), torch.optim.SGD, lr=0.1, backend="cuda", estimate=Estimate(method="finite-difference")
    )

    def loss(scale=1.0):
        return torch.nn.functional.cross_entropy(model(batch(0)[0]), batch(0)[1]) * scale

    def closure(scale=1.0):
        value = loss(scale)
        value.backward()
        return value

    optimizer.step(lambda: closure(float("inf")), model=model)
    assert optimizer.found_inf == 1
    optimizer.update_eigenvector(loss, model)
    assert optimizer.found_inf == 1
    weights = bits(model.parameters())
    optimizer.accumulate(lambda: closure(float("nan")), model=model)
    optimizer.update_eigenvector(loss, model)
    for p in model.parameters():
        if p.grad is not None:
            p.grad.zero_()  # so that the first pass alone met it
    optimizer.descend()
    assert optimizer.found_inf == 1
    assert bits(model.parameters()) == weights


# ---- what a step costs the host ---------------------------------------------------------------------------------


class Operations(TorchDispatchMode):
    """Notes torch's own operations, views aside, and refuses those that wait for a value."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function not in tape.WAITS, "the host waits for the device"
        if all(r.alias_info is None or r.alias_info.is_write for r in function._schema.returns):
            self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("base", "update"), [("SGD momentum", "descend_sgd"), ("AdamW", "descend_adam")])
@pytest.mark.parametrize("method", SOME_METHODS)
def test_a_settled_step_launches_four_kernels_and_nothing_of_torchs(on_host, monkeypatch, method, base, update):
    launched = tape.Launches(cuda._cuda)
    monkeypatch.setattr(cuda, "_cuda", launched)
    params = [torch.nn.Parameter(t) for t in dense(torch.float32)]
    optimizer = build_optimizer(method, base, params, "cuda")
    if METHODS[method].eigenvector == "given":
        optimizer.eigenvector = [like(p.detach(), 900 + i) * 0.02 for i, p in enumerate(params)]
    passes = [random_gradients(params, k) for k in range(2)]
    for _ in range(4):
        launched.names.clear()
        operations = Operations()
        for gradients, step in zip(passes, (optimizer.first_step, optimizer.second_step), strict=True):
            set_gradients(params, gradients)
            with operations:
                step()
    assert launched.names == ["gram", "climb", "gram", update]
    assert operations.names == []


@pytest.mark.parametrize("base", ["SGD momentum", "AdamW"])
def test_the_host_does_not_wait_for_a_mixture(on_host, base):
    params = [torch.nn.Parameter(t) for t in dense(torch.float32)]
    side = second_side.SecondSide("cuda", base, "everything", params, groups=second_side.several_groups)
    passes = [random_gradients(params, k) for k in range(2)]
    with torch.no_grad(), Operations():
        for _ in range(2):
            side.first(passes[0])
            side.second(passes[1])


@pytest.mark.parametrize("flattened", [False, True], ids=["", "flattened"])
@pytest.mark.parametrize("method", ["F-SAM sigma=0.5 lmbda=0.9", "Eigen-SAM given v"])
def test_the_host_does_not_wait_in_a_whole_step(on_host, method, flattened):
    model = Net()
    if flattened:
        fastsam.flatten_parameters(model)
    optimizer = build_optimizer(method, "AdamW", model.parameters(), "cuda")
    if METHODS[method].eigenvector == "given":
        optimizer.eigenvector = [like(p.detach(), 900 + i) * 0.02 for i, p in enumerate(model.parameters())]

    def closure():
        loss = torch.nn.functional.cross_entropy(model(batch(0)[0]), batch(0)[1])
        loss.backward()
        return loss

    optimizer.step(closure, model=model)
    with Operations():
        for _ in range(3):
            optimizer.step(closure, model=model, max_norm=1.0)
            optimizer.accumulate(closure, model=model)
            optimizer.accumulate(closure, model=model)
            optimizer.descend(zero_grad=True)


@pytest.mark.parametrize("base", ["SGD momentum", "AdamW"])
def test_a_replay_computes_mixtures_from_its_own_sums(on_host, monkeypatch, base):
    """With the learning rate of the replay, and whatever other numbers a step in between had."""
    launched = tape.Launches(cuda._cuda)
    monkeypatch.setattr(cuda, "_cuda", launched)
    ends = []
    for replays in (False, True):
        params = [torch.nn.Parameter(t) for t in dense(torch.float32)]
        side = second_side.SecondSide(
            "cuda", base, "everything", params, groups=second_side.several_groups, flattened=True, max_norm=0.1
        )
        space, groups = side.space, side.base.param_groups
        second_side.steps_of(side, [random_gradients(params, k) for k in range(2)])
        given = [random_gradients(params, k) for k in range(2, 4)]

        def step(side=side, given=given):
            side.first(given[0])
            side.second(given[1])

        with torch.no_grad():
            if replays:
                owner = SimpleNamespace(param_groups=groups, two_pass=SimpleNamespace(spaces=[space]))
                gpu = tape.HostGpu(launched, owner, torch.nn.Module())
                recording = device.Recording(device.table_of(space), space)
                replay = gpu.record(step)
                recording.fill()
            groups[0]["share"] = 0.2
            step()
            groups[0]["share"], groups[0]["lr"] = 0.45, 0.01
            for gradients, k in zip(given, (4, 5), strict=True):
                for g, new in zip(gradients, random_gradients(params, k), strict=True):
                    g.copy_(new)
            if replays:
                updated = [True] * len(params)
                launches.refresh(space, side.ascent(), side.rule.kernel, side.descent(), updated)
                replay()
            else:
                step()
        ends.append(bits(side.all()))
    assert ends[0] == ends[1]


def test_flattened_gradients_from_elsewhere_are_noticed_all_the_same(on_host):
    model = Net()
    fastsam.flatten_parameters(model)
    optimizer = build_optimizer("SAM", "SGD", model.parameters(), "cuda")

    def closure():
        loss = torch.nn.functional.cross_entropy(model(batch(0)[0]), batch(0)[1])
        loss.backward()
        return loss

    optimizer.step(closure)
    closure()
    with pytest.raises(RuntimeError, match="gradients that it did not compute"):
        optimizer.step(closure)
    for p in model.parameters():
        if p.grad is not None:
            p.grad.zero_()  # by hand: the values have to be looked at
    optimizer.step(closure)


# ---- what launches are planned with ----------------------------------------------------------------------------


@pytest.mark.parametrize("table", ["ROW", "CHUNK", "ASCENT", "SGD", "ADAM", "MIXTURE", "SCALING", "ROUNDING"])
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
    #       weight, gradient, offset, size, group, param, climbed, gradient type, first
    rows = torch.tensor([[4096, 0, 0, 100, 1, 2, 1, 0, 7], [8192, 1024, 128, 5000, 3, 4, 0, 2, 107]])
    chunks = device.build_chunks([100, 5000], 2048)
    found = [cuda._cuda.piece(rows.data_ptr(), chunks.data_ptr(), i, 4) for i in range(len(chunks))]
    assert found == [
        (4096, 0, 0, 100, 1, 2, 0, True, 7),
        (8192, 1024, 128, 2048, 3, 4, 2, False, 107),
        (8192 + 4 * 2048, 1024 + 2 * 2048, 128 + 2048, 2048, 3, 4, 2, False, 107 + 2048),
        (8192 + 4 * 4096, 1024 + 2 * 4096, 128 + 4096, 904, 3, 4, 2, False, 107 + 4096),
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


@pytest.mark.parametrize(
    ("capability", "chosen"), [((9, 0), "cuda"), ((7, 5), "triton"), ((6, 1), "torch")], ids=["new", "older", "oldest"]
)
def test_a_gpu_older_than_the_compiled_targets_falls_to_triton_or_torch_and_says_so(monkeypatch, capability, chosen):
    """As it would be on a machine with such a GPU."""
    gpu, triton = torch.device("cuda", 0), kernels._module("triton")
    monkeypatch.delenv("FASTSAM_CUDA_ON_HOST", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    compiled = SimpleNamespace(
        problem=lambda: "", capabilities=lambda: [capability], architectures=lambda: [800, 900, 1000]
    )
    monkeypatch.setattr(cuda, "_cuda", compiled)
    caches = cuda._no_gpu, triton._too_old
    for cached in caches:
        cached.cache_clear()
    try:
        assert kernels.choose("auto", gpu, torch.float32) is kernels._module(chosen)
        if chosen == "cuda":
            assert fastsam.backends()["cuda"] == "available"
        else:
            assert f"this GPU is an sm_{capability[0]}{capability[1]}" in fastsam.backends()["cuda"]
            with pytest.raises(RuntimeError, match=rf"sm_{capability[0]}{capability[1]}; rebuild with"):
                kernels.choose("cuda", gpu, torch.float32)
        if chosen == "torch":
            with pytest.raises(RuntimeError, match=r"'triton' cannot serve .* sm_61"):
                kernels.choose("triton", gpu, torch.float32)
    finally:
        for cached in caches:
            cached.cache_clear()


@pytest.mark.parametrize("bad", [None, 1, 2], ids=["", "one overflows", "the other does"])
@pytest.mark.parametrize("base", ["SGD momentum", "AdamW"])
def test_backends_that_decide_on_the_device_and_on_the_host_share_one_norm_and_one_decision(
    on_host, monkeypatch, base, bad
):
    """As with parameters on a GPU and on the CPU; here those of one dtype stand for the GPU's."""
    choose = kernels.choose

    def by_dtype(name, where, dtype):
        return (
            kernels._module("cuda" if dtype == torch.float32 else "cpu")
            if name == "cuda"
            else choose(name, where, dtype)
        )

    monkeypatch.setattr(kernels, "choose", by_dtype)
    records = []
    for backend in ("cuda", "torch"):
        params = [
            torch.nn.Parameter(noise((n,), n, dtype)) for n, dtype in ((300, torch.float32), (500, torch.float64))
        ]
        optimizer = build_optimizer("F-SAM sigma=0.5 lmbda=0.9", base, params, backend, rho=0.5)
        passes = [random_gradients(params, k) for k in range(6)]
        if bad is not None:
            passes[2][bad - 1][7] = float("inf")
        records.append(scripted_steps(optimizer, params, passes))
        assert {space.kernels.__name__.rsplit(".", 1)[-1] for space in optimizer.two_pass.spaces} == (
            {"cuda", "cpu"} if backend == "cuda" else {"torch"}
        )
    if bad is not None:
        assert all(torch.equal(a, b) for a, b in zip(records[0][1], records[0][3], strict=True))
    assert_same_rounding(*records, torch.float32)


def test_a_gradient_on_another_device_is_refused():
    space = FlatSpace([torch.nn.Parameter(torch.zeros(5))], [0], perturbed=True)
    with pytest.raises(ValueError, match=r"gradient of a parameter of shape \(5,\) is on meta, the parameter on cpu"):
        space.use_gradients([torch.zeros(5, device="meta")])


def test_auto_prefers_cuda_to_triton():
    assert kernels.NAMES.index("cuda") < kernels.NAMES.index("triton") < kernels.NAMES.index("cpu")


def test_the_library_loads_and_says_why_it_cannot_run():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    code = "import fastsam; from fastsam import _cuda; print(_cuda.problem()); print(fastsam.backends()['cuda'])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True
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
        cuda._cuda.restore((rows.data_ptr(), chunks.data_ptr(), 1, 1, 0, 0, False, 0, 0), 0)
