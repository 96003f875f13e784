"""Whole steps in a CUDA graph on the device; the bookkeeping around it is tested in tests/graphs/test_graphs.py."""

import copy

import pytest
import torch
from net import Net, batch
from reference import BASES, FAMILY, METHODS
from reference.scripted import like

import fastsam
from fastsam import graphs, kernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU"),
]

DEVICE = torch.device("cuda", 0)
BACKENDS = [name for name in kernels.NAMES if name not in ("cpu", "torch")]


@pytest.fixture(params=BACKENDS)
def backend(request):
    status = fastsam.backends()[request.param]
    if status != "available":
        pytest.skip(status)
    return request.param


class Training:
    """A model and its optimizer on the GPU, trained by replays or without."""

    def __init__(self, backend, method="F-SAM sigma=0.5 lmbda=0.9", base="SGD momentum", flattened=False):
        torch.manual_seed(0)
        self.model = Net().to(DEVICE)
        if flattened:
            fastsam.flatten_parameters(self.model)
        found, (base_class, options) = {**METHODS, **FAMILY}[method], BASES[base]
        settings = {**found.kwargs, **options, "backend": backend}
        self.optimizer = getattr(fastsam, found.name)(self.model.parameters(), base_class, **settings)
        if found.eigenvector == "given":
            params = [p.detach().cpu() for p in self.model.parameters()]
            self.optimizer.eigenvector = [like(p, i).to(DEVICE) * 0.1 for i, p in enumerate(params)]
        self.step = None

    def closure(self, x, y):
        with torch.autocast("cuda", torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(self.model(x), y)
        loss.backward()
        return loss

    def capture(self, **options):
        self.step = graphs.capture(self.optimizer, self.closure, *on_gpu(0), model=self.model, **options)
        return self

    def train(self, numbers):
        losses = []
        for k in numbers:
            group = self.optimizer.param_groups[0]
            group["lr"], group["rho"] = 0.1 / (k + 1), 0.05 * (k + 1)
            torch.manual_seed(100 + k)
            x, y = on_gpu(k)
            if self.step is None:
                loss = self.optimizer.step(lambda x=x, y=y: self.closure(x, y), model=self.model)
            else:
                loss = self.step(x, y)
            losses.append(loss.detach().clone())
        return torch.stack(losses)

    def everything(self):
        tensors = [p.detach() for p in self.model.parameters()] + list(self.model.buffers())
        entries = [v for p in self.model.parameters() for v in self.optimizer.state.get(p, {}).values()]
        return [t.float().cpu() for t in tensors + entries]


def on_gpu(k):
    return tuple(t.to(DEVICE) for t in batch(k))


def assert_equal(captured, eager):
    for a, b in zip(captured.everything(), eager.everything(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("flattened", [False, True], ids=["", "flattened"])
@pytest.mark.parametrize("base", ["SGD momentum", "AdamW"])
@pytest.mark.parametrize("method", ["SAM", "ASAM", "F-SAM sigma=0.5 lmbda=0.9", "Eigen-SAM given v"])
def test_replays_equal_steps(backend, method, base, flattened):
    """With BatchNorm, dropout with the same masks in both passes, and other hyper-parameters at each step."""
    eager, captured = (Training(backend, method, base, flattened) for _ in range(2))
    captured.capture()
    torch.testing.assert_close(captured.train(range(6)), eager.train(range(6)), rtol=1e-5, atol=1e-6)
    assert_equal(captured, eager)


GRAPHS = {"Momentum-SAM": 1, "GSAM": 1, "WSAM": 1, "LookSAM k=3": 2, "Stable SAM": 1, "VaSSO": 2}


@pytest.mark.parametrize("base", ["SGD momentum", "AdamW"])
@pytest.mark.parametrize("method", GRAPHS)
def test_replays_of_the_family_equal_steps(backend, method, base):
    """LookSAM climbs twice in six steps, and Momentum-SAM's first step is none of a graph."""
    eager, captured = (Training(backend, method, base) for _ in range(2))
    captured.capture()
    torch.testing.assert_close(captured.train(range(6)), eager.train(range(6)), rtol=1e-5, atol=1e-6)
    assert_equal(captured, eager)


@pytest.mark.parametrize("method", GRAPHS)
def test_the_steps_of_the_family_are_captured(backend, method):
    """Nothing in them waits for the GPU, and each kind of step is captured once."""
    each = Training(backend, method)
    each.capture(ascent_closure=lambda x, y: each.closure(x[::2], y[::2]))
    each.train(range(6))
    assert len(each.step._graphs) == GRAPHS[method]


def test_a_loss_from_before_may_be_alive_at_a_capture(backend):
    """Its graph has the parameters' nodes on another stream than the one that captures."""
    captured, eager = Training(backend), Training(backend)
    loss = torch.nn.functional.cross_entropy(captured.model(on_gpu(0)[0]), on_gpu(0)[1])
    eager.model.load_state_dict(captured.model.state_dict())  # the forward pass moved buffers
    captured.capture()
    captured.train(range(3))
    eager.train(range(3))
    assert loss.grad_fn is not None
    assert_equal(captured, eager)


def test_a_capture_leaves_no_trace(backend):
    each = Training(backend)
    each.train(range(3))
    torch.manual_seed(5)
    before, numbers = each.everything(), torch.cuda.get_rng_state(DEVICE)
    each.capture()
    assert all(torch.equal(a, b) for a, b in zip(each.everything(), before, strict=True))
    assert torch.equal(torch.cuda.get_rng_state(DEVICE), numbers)


def test_replays_never_wait_and_allocate_nothing(backend):
    each = Training(backend).capture()
    each.train(range(3))
    batches = [on_gpu(k) for k in range(4)]
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for k, (x, y) in enumerate(batches * 3):
            each.optimizer.param_groups[0]["lr"] = 0.1 / (k + 1)
            each.step(x, y)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    after = torch.cuda.memory_stats()
    for counter in ("num_device_alloc", "reserved_bytes.all.current", "allocated_bytes.all.current"):
        assert after[counter] == before[counter], counter


def test_a_schedule_does_not_overtake_the_replays_before_it(backend):
    """A hundred replays are queued, each with its own learning rate, before the first of them can have run."""
    ends = []
    for waiting in (True, False):
        each = Training(backend, "SAM", "SGD").capture()
        x, y = on_gpu(0)
        for k in range(100):
            each.optimizer.param_groups[0]["lr"] = 0.1 / (k + 1)
            torch.manual_seed(k)
            if k == 0:
                torch.cuda._sleep(100_000_000)  # the device is busy meanwhile
            each.step(x, y)
            if waiting:
                torch.cuda.synchronize()
        ends.append(each.everything())
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_a_learning_rate_tensor_is_read_by_the_next_replay(backend):
    each = Training(backend, "SAM", "SGD").capture()
    lr = each.optimizer.param_groups[0]["lr"] = torch.zeros((), device=DEVICE)
    before = each.model.out.weight.detach().clone()
    each.step(*on_gpu(0))
    assert torch.equal(each.model.out.weight, before)
    lr.fill_(0.5)
    each.step(*on_gpu(0))
    assert not torch.equal(each.model.out.weight, before)


def test_an_overflow_changes_nothing_and_the_next_step_counts(backend):
    each = Training(backend).capture()
    each.train([0])
    before = [p.detach().clone() for p in each.model.parameters()]
    x, y = on_gpu(1)
    each.step(x * float("nan"), y)
    assert each.optimizer.found_inf == 1
    assert all(torch.equal(p, b) for p, b in zip(each.model.parameters(), before, strict=True))
    for buffer in each.model.buffers():
        buffer.nan_to_num_()
    each.train([2])
    assert each.optimizer.found_inf == 0
    assert not torch.equal(each.model.out.weight, before[-2])


def test_a_checkpoint_between_replays_goes_on_in_steps(backend):
    captured, eager = Training(backend).capture(), Training(backend)
    captured.train(range(3))
    eager.model.load_state_dict(captured.model.state_dict())
    eager.optimizer.load_state_dict(copy.deepcopy(captured.optimizer.state_dict()))
    captured.train(range(3, 6))
    eager.train(range(3, 6))
    assert_equal(captured, eager)


def test_a_graph_whose_weights_moved_is_not_replayed(backend):
    each = Training(backend).capture()
    each.model.hidden.weight.data = each.model.hidden.weight.data.clone()
    with pytest.raises(RuntimeError, match=r"has moved .*capture again"):
        each.step(*on_gpu(1))


def test_a_closure_that_waits_is_refused_and_training_goes_on(backend):
    captured, eager = Training(backend), Training(backend)
    whole = captured.closure
    captured.closure = lambda x, y: whole(x, y) if x.sum().item() < 1e9 else None
    with pytest.raises(RuntimeError, match="cannot be captured"):
        captured.capture()
    captured.closure = whole
    captured.train(range(2))
    eager.train(range(2))
    assert_equal(captured, eager)


def test_a_capture_that_breaks_leaves_torch_as_it_was(backend):
    """The current stream, the allocator, dropout outside of captures, the next capture."""
    captured, eager = Training(backend), Training(backend)
    whole, stream = captured.closure, torch.cuda.current_stream()

    def closure(x, y):
        if torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize()  # which a capture does not survive
        return whole(x, y)

    captured.closure = closure
    with pytest.raises(RuntimeError, match="cannot be captured"):
        captured.capture()
    assert torch.cuda.current_stream() == stream
    captured.closure = whole
    captured.train(range(2))
    captured.capture()
    captured.train(range(2, 4))
    eager.train(range(4))
    assert_equal(captured, eager)


def test_batches_come_from_pinned_memory(backend):
    losses = []
    for pinned in (True, False):
        each = Training(backend, "SAM", "SGD").capture()
        torch.manual_seed(3)
        losses.append(each.step(*(t.pin_memory() if pinned else t.to(DEVICE) for t in batch(3))).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_one_launch_of_a_graph_a_step(backend):
    each = Training(backend).capture()
    each.train(range(3))
    x, y = on_gpu(0)
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        each.step(x, y)
        torch.cuda.synchronize()
    calls = [e.name for e in profile.events() if e.name in ("cudaGraphLaunch", "cudaLaunchKernel", "cuLaunchKernel")]
    assert calls.count("cudaGraphLaunch") == 1
    assert len(calls) <= 8, "beside it the batch is copied and the random numbers' place is set"
