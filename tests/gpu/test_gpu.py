"""What only a GPU can show. Collected everywhere, skipped where torch finds none."""

import gc

import pytest
import torch
from reference import METHODS, SOME_METHODS, build_optimizer
from reference.family import FAMILY
from reference.scripted import assert_same_rounding, copies, like, noise, set_gradients

import fastsam
from fastsam import kernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU"),
]

DEVICE = torch.device("cuda")
BACKENDS = [name for name in kernels.NAMES if name not in ("cpu", "torch")]
SIZES = [(1,), (17,), (0,), (), (5, 7), (1023,), (300_007,), (512, 1024), (33, 65)]
SOME_BASES = ["SGD momentum", "SGD nesterov", "AdamW", "Adam"]


@pytest.fixture(params=BACKENDS)
def backend(request):
    status = fastsam.backends()[request.param]
    if status != "available":
        pytest.skip(status)
    return request.param


def parameters(dtype=torch.float32, sizes=SIZES):
    return [torch.nn.Parameter(noise(size, 100 + i, dtype).to(DEVICE)) for i, size in enumerate(sizes)]


def gradients(params, seed):
    return [like(p.detach().cpu(), seed + 7 * i).to(DEVICE) for i, p in enumerate(params)]


def optimizer_of(backend, method, base, params, **extra):
    optimizer = build_optimizer(method, base, params, backend, **extra)
    if METHODS[method].eigenvector == "given":
        optimizer.eigenvector = [like(p.detach().cpu(), 900 + i).to(DEVICE) * 0.02 for i, p in enumerate(params)]
    return optimizer


def step(optimizer, params, first, second, **options):
    set_gradients(params, first)
    optimizer.first_step()
    set_gradients(params, second)
    optimizer.second_step(**options)


def prepared_step(backend, method="F-SAM sigma=0.5 lmbda=0.9", base="SGD momentum", sizes=SIZES):
    """A step to repeat, warmed up, with the gradients of its passes at two sets of addresses."""
    params = parameters(sizes=sizes)
    optimizer = optimizer_of(backend, method, base, params)
    passes = gradients(params, 1), gradients(params, 2)

    def run():
        step(optimizer, params, *passes)

    for _ in range(3):
        run()
    torch.cuda.synchronize()
    return run, params, optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("base", SOME_BASES)
@pytest.mark.parametrize("method", SOME_METHODS)
def test_backend_equals_the_specification(backend, method, base, dtype):
    if reason := kernels._module(backend).refuses(DEVICE, dtype):
        pytest.skip(reason)
    records = []
    for name in (backend, "torch"):
        params = parameters(dtype)
        optimizer = optimizer_of(name, method, base, params)
        record = []
        for k in range(3):
            set_gradients(params, gradients(params, 1000 * k))
            optimizer.first_step()
            record.append(copies(params))
            set_gradients(params, gradients(params, 1000 * k + 500))
            optimizer.second_step()
            record.append(copies(params))
        records.append(record)
    assert_same_rounding(*records, dtype)


@pytest.mark.parametrize("base", ["SGD momentum", "AdamW"])
@pytest.mark.parametrize("method", SOME_METHODS[2:])
def test_vectors_in_bfloat16_equal_the_specification(backend, method, base):
    records = []
    for name in (backend, "torch"):
        params, record = parameters(), []
        optimizer = optimizer_of(name, method, base, params, state_dtype=torch.bfloat16)
        for k in range(3):
            step(optimizer, params, gradients(params, 1000 * k), gradients(params, 1000 * k + 500))
            record.append(copies(params))
        records.append(record)
        kept = [v for p in params for n, v in optimizer.state[p].items() if n in ("momentum", "eigenvector")]
        assert {v.dtype for v in kept} == {torch.bfloat16}
    assert_same_rounding(*records, torch.float32)


def test_stochastic_rounding_draws_what_the_specification_draws(backend):
    """Gradients are whole numbers, so that no backend's sum of squares is rounded another way."""
    ends = []
    for name in (backend, "torch"):
        params = parameters(torch.bfloat16)
        optimizer = optimizer_of(name, "SAM", "SGD momentum", params, stochastic_rounding=True)
        for k in range(3):
            step(optimizer, params, *[[g.round() for g in gradients(params, 100 * k + i)] for i in (0, 50)])
        ends.append(copies(params))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


FAMILY_BASES = {"SGD": dict(lr=0.05, momentum=0.9), "AdamW": dict(lr=0.01, weight_decay=0.1)}


def family_step(optimizer, params, passes):
    """A step of any method: with one gradient or two, as it says."""
    if optimizer.evaluations == 2:
        set_gradients(params, passes[0])
    if optimizer.two_pass.climbs():
        optimizer.first_step(zero_grad=True)
    set_gradients(params, passes[1])
    optimizer.second_step(zero_grad=True)


def family_of(backend, name, base, params):
    method = FAMILY[name]
    settings = {**method.kwargs, **FAMILY_BASES[base]}
    return getattr(fastsam, method.name)(params, getattr(torch.optim, base), backend=backend, **settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("base", FAMILY_BASES)
@pytest.mark.parametrize("name", ["Momentum-SAM", "VaSSO", "GSAM", "Stable SAM", "WSAM coupled", "LookSAM k=3"])
def test_the_familys_second_side_equals_the_specification(backend, name, base, dtype):
    records = []
    for each in (backend, "torch"):
        params, record = parameters(dtype), []
        optimizer = family_of(each, name, base, params)
        for k in range(4):
            family_step(optimizer, params, (gradients(params, 1000 * k), gradients(params, 1000 * k + 500)))
            record.append(copies(params))
        records.append(record)
    assert_same_rounding(*records, dtype)


@pytest.mark.parametrize("name", ["Momentum-SAM", "GSAM", "LookSAM k=3"])
def test_an_overflow_in_a_step_of_the_family_changes_nothing(backend, name):
    params = parameters()
    optimizer = family_of(backend, name, "SGD", params)
    for k in range(3):  # so that LookSAM's next step climbs
        family_step(optimizer, params, (gradients(params, k), gradients(params, 10 + k)))
    weights = copies(params)
    state = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in params]
    passes = gradients(params, 3), gradients(params, 4)
    passes[1][6][123_456] = float("nan")
    family_step(optimizer, params, passes)
    assert optimizer.found_inf.item() == 1
    assert all(torch.equal(p.detach(), w) for p, w in zip(params, weights, strict=True))
    for p, entries in zip(params, state, strict=True):
        for key, value in entries.items():
            assert torch.equal(optimizer.state[p][key], value), key


@pytest.mark.parametrize("which", [0, 1], ids=["first pass", "second pass"])
@pytest.mark.parametrize("base", ["SGD momentum", "AdamW"])
def test_an_overflow_changes_nothing(backend, base, which):
    params = parameters()
    optimizer = optimizer_of(backend, "F-SAM sigma=0.5 lmbda=0.9", base, params)
    step(optimizer, params, gradients(params, 1), gradients(params, 2))
    weights = copies(params)
    state = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in params]
    passes = gradients(params, 3), gradients(params, 4)
    passes[which][6][123_456] = float("nan")
    step(optimizer, params, *passes)
    assert optimizer.found_inf.item() == 1
    assert all(torch.equal(p.detach(), w) for p, w in zip(params, weights, strict=True))
    for p, entries in zip(params, state, strict=True):
        for name, value in entries.items():
            assert torch.equal(optimizer.state[p][name], value), name


@pytest.mark.parametrize("base", ["SGD momentum", "AdamW"])
def test_a_first_step_that_overflows_is_as_if_it_had_not_been(backend, base):
    weights = []
    for skipped in (True, False):
        params = parameters()
        optimizer = optimizer_of(backend, "F-SAM sigma=0.5 lmbda=0.9", base, params)
        if skipped:
            step(optimizer, params, gradients(params, 1), [g * float("inf") for g in gradients(params, 2)])
        for k in range(3):
            step(optimizer, params, gradients(params, 10 + k), gradients(params, 20 + k))
        weights.append(copies(params))
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_restore_is_bit_exact(backend):
    params = parameters(torch.bfloat16)
    optimizer = optimizer_of(backend, "ASAM", "SGD momentum", params)
    weights = copies(params)
    set_gradients(params, gradients(params, 1))
    with optimizer.perturbed():
        assert not torch.equal(params[7], weights[7])
    assert all(torch.equal(p.detach(), w) for p, w in zip(params, weights, strict=True))


@pytest.mark.parametrize("base", ["SGD momentum", "AdamW"])
def test_the_same_bits_from_run_to_run(backend, base):
    runs = []
    for _ in range(3):
        params = parameters(sizes=[*SIZES, (4096, 2048)])
        optimizer = optimizer_of(backend, "F-SAM sigma=0.5 lmbda=0.9", base, params)
        for k in range(5):
            step(optimizer, params, gradients(params, k), gradients(params, 100 + k))
        runs.append(copies(params))
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("base", ["SGD momentum", "AdamW"])
@pytest.mark.parametrize("method", ["SAM", "F-SAM sigma=0.5 lmbda=0.9", "Eigen-SAM given v"])
def test_the_host_never_waits(backend, method, base):
    params = parameters()
    optimizer = optimizer_of(backend, method, base, params)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for k in range(4):
            fresh = [torch.full_like(p, 0.01 * (k + 1)) for p in params], [torch.full_like(p, 0.02) for p in params]
            optimizer.param_groups[0]["lr"] = 0.1 / (k + 1)
            step(optimizer, params, *fresh)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("flattened", [False, True], ids=["", "flattened"])
def test_the_host_does_not_wait_in_a_whole_step(backend, flattened):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(64, 64), torch.nn.BatchNorm1d(64), torch.nn.Dropout(), torch.nn.Linear(64, 10)
    ).to(DEVICE)
    if flattened:
        fastsam.flatten_parameters(model)
    optimizer = fastsam.FriendlySAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, backend=backend)
    x, y = torch.randn(32, 64, device=DEVICE), torch.randint(10, (32,), device=DEVICE)

    def closure():
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    optimizer.step(closure, model=model)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for k in range(4):
            optimizer.param_groups[0]["lr"] = 0.1 / (k + 1)
            optimizer.step(closure, model=model)
            optimizer.accumulate(closure, model=model)
            optimizer.accumulate(closure, model=model)
            optimizer.descend(zero_grad=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("base", ["SGD momentum", "AdamW"])
@pytest.mark.parametrize("bad", [None, 1, 2], ids=["", "first micro-batch overflows", "second does"])
def test_micro_batches_equal_the_specification(backend, base, bad):
    """Each micro-batch climbs along its own gradient; if one overflows, nothing of the step is kept."""
    ends = []
    for name in (backend, "torch"):
        params = parameters(torch.float64)
        optimizer = optimizer_of(name, "F-SAM sigma=0.5 lmbda=0.9", base, params)

        def closure(seed, params=params):
            loss = sum((p * g).sum() + (p * p).sum() for p, g in zip(params, gradients(params, seed), strict=True))
            (loss * float("inf") if seed == bad else loss).backward()
            return loss

        for micro_batches in ((1, 2), (1, 2), (3, 4)):
            for seed in micro_batches:
                optimizer.accumulate(lambda seed=seed: closure(seed))
            optimizer.descend(zero_grad=True)
        ends.append(copies(params))
    assert_same_rounding(ends[:1], ends[1:], torch.float64)


def test_a_schedule_on_the_device_is_followed_without_waiting(backend):
    params = parameters()
    optimizer = optimizer_of(backend, "SAM", "SGD momentum", params)
    lr = torch.tensor(0.0, device=DEVICE)
    optimizer.param_groups[0]["lr"] = lr
    weights = copies(params)
    passes = gradients(params, 1), gradients(params, 2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(optimizer, params, *passes)
        unchanged = [p.detach().eq(w).all() for p, w in zip(params, weights, strict=True)]
        lr.fill_(0.1)
        step(optimizer, params, *passes)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(unchanged)
    assert not torch.equal(params[7], weights[7])


@pytest.mark.parametrize("base", ["SGD momentum", "AdamW"])
def test_nothing_is_reserved_or_kept_in_steady_state(backend, base):
    run, _, _ = prepared_step(backend, base=base)
    gc.collect()
    before = torch.cuda.memory_stats()
    for _ in range(10):
        run()
    torch.cuda.synchronize()
    after = torch.cuda.memory_stats()
    for counter in (
        "num_device_alloc",
        "num_alloc_retries",
        "reserved_bytes.all.current",
        "allocated_bytes.all.current",
    ):
        assert after[counter] == before[counter], counter


@pytest.mark.parametrize(("base", "update"), [("SGD momentum", "descend_sgd"), ("AdamW", "descend_adam")])
@pytest.mark.parametrize("method", ["SAM", "F-SAM sigma=0.5 lmbda=0.9", "Eigen-SAM given v"])
def test_launches_of_a_step(backend, method, base, update):
    run, _, _ = prepared_step(backend, method, base)
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        run()
        torch.cuda.synchronize()
    events = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    events.sort(key=lambda e: e.time_range.start)
    kinds = {k.replace("_", ""): k for k in ("gram", "climb", "descend_sgd", "descend_adam", "restore")}
    names = [next((kinds[k] for k in kinds if k in e.name.lower().replace("_", "")), e.name) for e in events]
    assert names == ["gram", "climb", "gram", update], "nothing else runs on the device, nothing is copied there"


def test_streams_that_wait_for_each_other(backend):
    weights = []
    for streams in ([torch.cuda.Stream() for _ in range(3)], [torch.cuda.current_stream()] * 3):
        params = parameters()
        optimizer = optimizer_of(backend, "F-SAM sigma=0.5 lmbda=0.9", "SGD momentum", params)
        for k, stream in enumerate(streams * 2):
            passes = gradients(params, k), gradients(params, 50 + k)
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                step(optimizer, params, *passes)
            torch.cuda.current_stream().wait_stream(stream)
        weights.append(copies(params))
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_optimizers_on_streams_of_their_own(backend):
    """Two optimizers at once on two streams: nothing of theirs is shared."""
    weights = []
    for together in (True, False):
        pairs = []
        for seed in (0, 1):
            params = parameters(sizes=[(1024, 1024), (333,)])
            pairs.append((optimizer_of(backend, "SAM", "AdamW", params), params, torch.cuda.Stream(), seed))
        torch.cuda.synchronize()
        for k in range(5):
            for optimizer, params, stream, seed in pairs:
                passes = gradients(params, 100 * seed + k), gradients(params, 100 * seed + 50 + k)
                torch.cuda.synchronize()
                with torch.cuda.stream(stream if together else torch.cuda.current_stream()):
                    step(optimizer, params, *passes)
        torch.cuda.synchronize()
        weights.append([w for _, params, _, _ in pairs for w in copies(params)])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


@pytest.mark.parametrize(
    ("method", "buffers"), [("SAM", 1), ("F-SAM sigma=0.5 lmbda=0.9", 3), ("Eigen-SAM given v", 2)]
)
def test_peak_memory(backend, method, buffers):
    """The momentum buffer of the base optimizer, and what the method needs; F-SAM keeps the next average, too."""
    size = (16 << 20,)
    params = [torch.nn.Parameter(torch.full(size, 0.5, device=DEVICE)) for _ in range(2)]
    passes = [[torch.full_like(p, 0.01) for p in params] for _ in range(2)]
    optimizer = build_optimizer(method, "SGD momentum", params, backend)
    if METHODS[method].eigenvector == "given":
        optimizer.eigenvector = [torch.full_like(p, 1e-4) for p in params]
    weight_bytes = sum(p.numel() * p.element_size() for p in params)
    given = weight_bytes if METHODS[method].eigenvector == "given" else 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() - given
    for _ in range(2):
        step(optimizer, params, *passes)
    extra = (torch.cuda.memory_allocated() - before) / weight_bytes
    assert extra <= 1 + buffers + 0.05
    peak = (torch.cuda.max_memory_allocated() - before) / weight_bytes
    assert peak <= 1 + buffers + 0.05 + (1 if given else 0), "adopting a given eigenvector holds both for a moment"


def test_gradients_that_move_every_step_are_followed(backend):
    weights = []
    for moving in (True, False):
        params = parameters()
        optimizer = optimizer_of(backend, "SAM", "SGD momentum", params)
        fixed = gradients(params, 1), gradients(params, 2)
        keep = []
        for _ in range(12):
            passes = [[g.clone() for g in gs] for gs in fixed] if moving else fixed
            keep.append(passes)
            step(optimizer, params, *passes)
        weights.append(copies(params))
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_a_weight_that_moved_is_followed(backend):
    params = parameters()
    optimizer = optimizer_of(backend, "SAM", "SGD momentum", params)
    step(optimizer, params, gradients(params, 1), gradients(params, 2))
    before = copies(params)
    with torch.no_grad():
        for p in params:
            p.data = p.data.clone()
    step(optimizer, params, gradients(params, 3), gradients(params, 4))
    assert not torch.equal(params[7], before[7])


def test_parameters_on_cpu_and_gpu_share_one_norm(backend):
    weights = []
    for place in (DEVICE, torch.device("cpu")):
        params = [
            torch.nn.Parameter(noise((300,), 1, torch.float32)),
            torch.nn.Parameter(noise((500,), 2, torch.float32).to(place)),
        ]
        optimizer = fastsam.SAM(params, torch.optim.SGD, rho=0.5, lr=0.1)
        for k in range(2):
            set_gradients(params, [like(p.detach().cpu(), 10 * k + i).to(p.device) for i, p in enumerate(params)])
            (optimizer.second_step if k else optimizer.first_step)()
        weights.append([p.detach().cpu() for p in params])
    torch.testing.assert_close(*weights, rtol=1e-6, atol=1e-6)


def test_auto_takes_a_fused_backend(backend):
    optimizer = fastsam.SAM(parameters(), torch.optim.SGD, lr=0.1)
    params = optimizer.param_groups[0]["params"]
    step(optimizer, params, gradients(params, 1), gradients(params, 2))
    assert kernels.choose("auto", DEVICE, torch.float32) is not kernels._module("torch")


# ---- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_parameters_on_several_gpus_share_one_norm(backend):
    weights = []
    for place in (torch.device("cuda", 1), DEVICE):
        params = [
            torch.nn.Parameter(noise((300,), 1, torch.float32).to(DEVICE)),
            torch.nn.Parameter(noise((500,), 2, torch.float32).to(place)),
        ]
        optimizer = optimizer_of(backend, "SAM", "SGD momentum", params)
        for k in range(2):
            set_gradients(params, [like(p.detach().cpu(), 10 * k + i).to(p.device) for i, p in enumerate(params)])
            (optimizer.second_step if k else optimizer.first_step)()
        weights.append([p.detach().cpu() for p in params])
    torch.testing.assert_close(*weights, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("trained", [False, True], ids=["before the first step", "after some"])
def test_a_model_moved_to_the_gpu_after_the_optimizer_was_built(trained):
    """Weights are followed, and so is what state there is."""
    ends = []
    for moved in (True, False):
        torch.manual_seed(0)
        model = torch.nn.Linear(33, 17)
        optimizer = fastsam.FriendlySAM(model.parameters(), torch.optim.SGD, rho=0.5, lr=0.1, momentum=0.9)
        for k in range(4):
            if moved and k == (2 if trained else 0):
                model.to(DEVICE)
            params = list(model.parameters())
            step(
                optimizer, params, *([like(p.detach().cpu(), 10 * k + j).to(p.device) for p in params] for j in (0, 5))
            )
        ends.append([p.detach().cpu() for p in model.parameters()])
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-6)


def test_a_gradient_on_another_device_is_refused(backend):
    params = parameters()
    optimizer = optimizer_of(backend, "SAM", "SGD momentum", params)
    for p, g in zip(params, gradients(params, 1), strict=True):
        p.grad = g
    kept = copies(params)
    moved = params[7]
    g, weight = moved.grad, moved.data
    moved.grad = None
    moved.data = weight.cpu()
    moved.grad = g.cpu()
    moved.data = weight
    with pytest.raises(ValueError, match="is on cpu, the parameter on cuda"):
        optimizer.first_step()
    assert all(torch.equal(p.detach(), w) for p, w in zip(params, kept, strict=True))


def test_a_gpu_older_than_the_compiled_targets_falls_to_triton(monkeypatch):
    cuda = kernels._module("cuda")
    if cuda.unavailable():
        pytest.skip(cuda.unavailable())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 0))
    assert "sm_70" in cuda.refuses(DEVICE, torch.float32)
    assert kernels.choose("auto", DEVICE, torch.float32) is kernels._module("triton")


def test_a_capture_from_outside_is_refused(backend):
    run, _, _ = prepared_step(backend)
    with pytest.raises(RuntimeError, match=r"fastsam\.graphs\.capture"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.zeros(1, device=DEVICE)
        run()
