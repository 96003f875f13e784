"""Whole steps in a CUDA graph, on a double of it: what is captured, what is checked, and what reaches a replay.

The double (tests/tape.py) repeats operations and launches with the numbers and on the memory of the capture, as a
graph does. Only a GPU can show that CUDA accepts the capture: tests/gpu.
"""

import copy
import re
from pathlib import Path

import pytest
import tape
import torch
from net import FEATURES, Net, batch
from reference import BASES, FAMILY, METHODS, Method, build_optimizer
from reference.scripted import bits, like, state_bits

import fastsam
from fastsam import graphs
from fastsam.graphs import captured_step
from fastsam.kernels import cuda, device
from fastsam.methods.sam import SamRecipe

if cuda._cuda is None:
    pytest.skip(f"backend 'cuda': {cuda.unavailable()}", allow_module_level=True)

SOME_METHODS = ["SAM", "ASAM", "F-SAM sigma=0.5 lmbda=0.9", "Eigen-SAM given v"]
OTHERS = ["Momentum-SAM", "adaptive Momentum-SAM", "GSAM", "WSAM", "WSAM coupled", "LookSAM k=3", "Stable SAM", "VaSSO"]


ALL = {**METHODS, **FAMILY, "LookSAM k=1": Method("LookSAM", None, {"rho": 0.05, "k": 1})}


def build(method, base, params, **extra):
    found, (base_class, options) = ALL[method], BASES[base]
    return getattr(fastsam, found.name)(params, base_class, **{**found.kwargs, **options, **extra}, backend="cuda")


class Training:
    """A model and its optimizer, trained by replays or without."""

    def __init__(
        self, launches, monkeypatch, method="F-SAM sigma=0.5 lmbda=0.9", base="SGD momentum", model=None, **options
    ):
        torch.manual_seed(0)
        self.model = model or Net()
        self.optimizer = build(method, base, self.model.parameters(), **options)
        if ALL[method].eigenvector == "given":
            self.optimizer.eigenvector = [like(p.detach(), i) * 0.1 for i, p in enumerate(self.model.parameters())]
        self._launches, self._monkeypatch = launches, monkeypatch
        self.step = None

    def closure(self, x, y):
        loss = torch.nn.functional.cross_entropy(self.model(x), y)
        loss.backward()
        return loss

    def capture(self, **options):
        self.gpu = tape.HostGpu(self._launches, self.optimizer, self.model)
        self._monkeypatch.setattr(captured_step, "Gpu", lambda _: self.gpu)
        self.step = graphs.capture(self.optimizer, self.closure, *batch(0), model=self.model, **options)
        return self

    def train(self, numbers, **options):
        """Losses of steps on these batches, each with other hyper-parameters."""
        losses = []
        for k in numbers:
            group = self.optimizer.param_groups[0]
            group["lr"], group["rho"] = 0.1 / (k + 1), 0.05 * (k + 1)
            if "sigma" in group:
                group["sigma"], group["lmbda"] = 1 / (k + 1), 1 - 0.3 / (k + 1)
            for name in {"alpha", "gamma", "theta"} & group.keys():
                group[name] = 0.4 / (k + 1)
            torch.manual_seed(100 + k)
            x, y = batch(k)
            if self.step is None:
                loss = self.optimizer.step(lambda x=x, y=y: self.closure(x, y), model=self.model, **options)
            else:
                loss = self.step(x, y)
            losses.append(loss.item())
        return losses

    def everything(self):
        params = list(self.model.parameters())
        return bits(params), bits(self.model.buffers()), state_bits(self.optimizer, params)


@pytest.fixture
def training(monkeypatch):
    monkeypatch.setenv("FASTSAM_CUDA_ON_HOST", "1")
    launches = tape.Launches(cuda._cuda)
    monkeypatch.setattr(cuda, "_cuda", launches)
    return lambda *args, **kwargs: Training(launches, monkeypatch, *args, **kwargs)


def test_what_the_code_names_of_torch_cuda_is_there():
    """Where there is no GPU nothing else would notice a wrong name."""
    root = Path(__file__).parents[2]
    files = [path for folder in ("fastsam", "benchmarks", "tests/gpu") for path in (root / folder).rglob("*.py")]
    names = {name for path in files for name in re.findall(r"torch\.cuda\.(\w+)", path.read_text())}
    assert {"graph", "is_current_stream_capturing"} <= names
    assert not [name for name in sorted(names) if not hasattr(torch.cuda, name)]


# ---- a replay is a step ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["SGD momentum", "AdamW"])
@pytest.mark.parametrize("method", [*SOME_METHODS, *OTHERS])
def test_replays_equal_steps(training, method, base):
    eager, captured = training(method, base), training(method, base).capture()
    assert captured.train(range(5)) == eager.train(range(5))
    assert captured.everything() == eager.everything()


@pytest.mark.parametrize("method", SOME_METHODS[2:])
def test_replays_equal_steps_with_vectors_in_bfloat16(training, method):
    options = dict(state_dtype=torch.bfloat16)
    eager, captured = training(method, **options), training(method, **options).capture()
    assert captured.train(range(4)) == eager.train(range(4))
    assert captured.everything() == eager.everything()


class HalfNet(Net):
    """Weights in bfloat16, of which there is no copy."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__()
        self.bfloat16()

    def forward(self, x):
        return super().forward(x.bfloat16()).float()


@pytest.mark.parametrize("base", ["SGD momentum", "AdamW"])
def test_each_replay_rounds_by_the_number_of_its_own_step(training, base):
    """The keys differ from step to step, those of the capture included."""
    options = dict(base=base, stochastic_rounding=True)
    eager, captured = training(model=HalfNet(), **options), training(model=HalfNet(), **options).capture()
    assert captured.train(range(4)) == eager.train(range(4))
    assert captured.everything() == eager.everything()
    assert captured.optimizer.param_groups[0]["steps"] == 4


def accumulator(p):
    """The node that adds up p's gradients."""
    return p.view_as(p).grad_fn.next_functions[0][0]


@pytest.mark.parametrize("flattened", [False, True], ids=["", "flattened"])
def test_an_earlier_loss_that_is_alive_leaves_the_capture_its_own_nodes(training, flattened, monkeypatch):
    """Those of the loss belong to the stream of its forward pass, which a capture cannot wait for."""
    model = Net()
    if flattened:
        fastsam.flatten_parameters(model)
    each, seen, calls = training(model=model), [], []
    params = list(each.model.parameters())
    params[0].register_post_accumulate_grad_hook(lambda p: calls.append(p is params[0]))
    loss = torch.nn.functional.cross_entropy(each.model(batch(0)[0]), batch(0)[1])
    earlier = [accumulator(p) for p in params]
    before = [(p.data_ptr(), p.stride(), bits([p])) for p in params]
    warming_up = tape.HostGpu.warming_up

    def looked_at(self):
        seen.extend(accumulator(p) for p in params)
        return warming_up(self)

    monkeypatch.setattr(tape.HostGpu, "warming_up", looked_at)
    each.capture()
    assert len(seen) == len(earlier) and not any(a is b for a, b in zip(seen, earlier, strict=True))
    assert [(p.data_ptr(), p.stride(), bits([p])) for p in params] == before
    assert calls, "a hook that was there still runs"
    assert loss.grad_fn is not None, "it lived until here"


def test_masks_are_fresh_in_each_pass_if_asked_for(training):
    eager, captured = training(), training().capture(shared_masks=False)
    assert captured.train(range(3)) == eager.train(range(3), shared_masks=False)
    assert captured.everything() == eager.everything()


def test_without_the_model_both_passes_move_its_buffers_and_draw_their_own_masks(training):
    eager, captured = training(), training()
    gpu = tape.HostGpu(captured._launches, captured.optimizer, captured.model)
    captured._monkeypatch.setattr(captured_step, "Gpu", lambda _: gpu)
    before = captured.everything()
    step = graphs.capture(captured.optimizer, captured.closure, *batch(0))
    assert captured.everything() == before
    for k in range(3):
        torch.manual_seed(k)
        eager.optimizer.step(lambda k=k: eager.closure(*batch(k)))
        torch.manual_seed(k)
        step(*batch(k))
    assert captured.everything() == eager.everything()


@pytest.mark.parametrize("options", [{"max_norm": 0.1}, {"clip_value": 0.01}], ids=str)
def test_clipping(training, options):
    eager, captured = training(), training().capture(**options)
    assert captured.train(range(3)) == eager.train(range(3), **options)
    assert captured.everything() == eager.everything()


def test_flattened_parameters(training):
    eager, captured = training(), training()
    for each in (eager, captured):
        fastsam.flatten_parameters(each.model)
    captured.capture()
    assert captured.train(range(4)) == eager.train(range(4))
    assert captured.everything() == eager.everything()


def test_flattened_gradients_from_elsewhere_are_noticed(training):
    each = training()
    fastsam.flatten_parameters(each.model)
    each.capture().train(range(2))
    each.closure(*batch(0))
    with pytest.raises(RuntimeError, match="gradients that it did not compute"):
        each.step(*batch(1))
    each.optimizer.zero_grad()
    each.step(*batch(1))


def test_several_groups_one_of_which_is_not_perturbed(training):
    ends = []
    for captured in (True, False):
        each = training()
        groups = [
            {"params": each.model.hidden.parameters(), "rho": 0.2, "adaptive": True},
            {"params": each.model.out.parameters(), "perturb": False, "lr": 0.01},
        ]
        each.optimizer = build_optimizer("F-SAM sigma=0.5 lmbda=0.9", "SGD momentum", groups, "cuda")
        if captured:
            each.capture()
        each.train(range(3))
        each.optimizer.zero_grad()
        ends.append((bits(each.model.parameters()), state_bits(each.optimizer, list(each.model.parameters()))))
    assert ends[0] == ends[1]


@pytest.mark.parametrize(
    ("method", "number"),
    [("SAM", 1), ("F-SAM sigma=0.5 lmbda=0.9", 2), ("Momentum-SAM", 1), ("GSAM", 1), ("LookSAM k=3", 2), ("VaSSO", 2)],
)
def test_how_many_graphs_a_method_takes(training, method, number):
    """One for each place of an average and each kind of step, none for the one step without a momentum."""
    each = training(method).capture()
    each.train(range(4))
    assert len(each.gpu.recorded) == number


@pytest.mark.parametrize("method", ["SAM", "F-SAM sigma=0.5 lmbda=0.9", "GSAM", "LookSAM k=3", "Momentum-SAM"])
def test_the_first_pass_on_a_part_of_the_batch(training, method):
    eager, captured = training(method), training(method)
    options = dict(ascent_closure=lambda x, y: captured.closure(x[::3], y[::3]))
    captured.capture(**options)
    losses = []
    for k in range(5):
        x, y = batch(k)
        torch.manual_seed(k)
        part = dict(ascent_closure=lambda x=x, y=y: eager.closure(x[::3], y[::3]))
        loss = eager.optimizer.step(lambda x=x, y=y: eager.closure(x, y), model=eager.model, **part)
        torch.manual_seed(k)
        losses.append((captured.step(x, y).item(), loss.item()))
    assert all(a == b for a, b in losses), losses
    assert captured.everything() == eager.everything()


@pytest.mark.parametrize("method", ["SAM", "GSAM", "VaSSO"])
@pytest.mark.parametrize("begin", [0.0, 0.1])
def test_a_radius_of_0_in_some_steps(training, method, begin):
    """Such a step takes one evaluation: it is another graph than one with a radius, whichever is captured first."""
    eager, captured = training(method), training(method)
    captured.optimizer.param_groups[0]["rho"] = begin
    captured.capture()
    for k, rho in enumerate((0.0, 0.1, 0.0, 0.2)):
        x, y = batch(k)
        for each in (eager, captured):
            each.optimizer.param_groups[0]["rho"] = rho
            torch.manual_seed(k)
            step = each.step or (lambda x, y: eager.optimizer.step(lambda: eager.closure(x, y), model=eager.model))
            step(x, y)
    assert captured.everything() == eager.everything()
    assert len(captured.gpu.recorded) == (4 if method == "VaSSO" else 2)


def test_steps_without_the_graph_in_between(training):
    eager, captured = training(), training().capture()
    step = captured.step
    for k in range(5):
        captured.step = None if k in (1, 4) else step
        assert captured.train([k]) == eager.train([k])
    assert captured.everything() == eager.everything()
    assert len(captured.gpu.recorded) == 2


def test_a_step_with_other_clipping_in_between(training):
    eager, captured = training(), training().capture(max_norm=0.1)
    step = captured.step
    for k, options in enumerate([{"max_norm": 0.1}, {"clip_value": 0.01}, {"max_norm": 0.1}]):
        captured.step = step if "max_norm" in options else None
        assert captured.train([k], **options) == eager.train([k], **options)
    assert captured.everything() == eager.everything()


@pytest.mark.parametrize("method", ["F-SAM sigma=0.5 lmbda=0.9", "Momentum-SAM", "WSAM", "LookSAM", "LookSAM k=1"])
def test_a_batch_that_overflows_changes_nothing_and_the_next_step_counts(training, method):
    eager, captured = training(method), training(method).capture()
    for each in (eager, captured):
        each.train([0])
        x, y = batch(1)
        x[2, 3] = float("nan")
        before = bits(each.model.parameters()), state_bits(each.optimizer, list(each.model.parameters()))
        if each.step is None:
            each.optimizer.step(lambda each=each, x=x, y=y: each.closure(x, y), model=each.model)
        else:
            each.step(x, y)
        assert each.optimizer.found_inf == 1
        assert (bits(each.model.parameters()), state_bits(each.optimizer, list(each.model.parameters()))) == before
        for buffer in each.model.buffers():
            buffer.nan_to_num_()
        each.train([2])
        assert each.optimizer.found_inf == 0
    assert captured.everything() == eager.everything()


@pytest.mark.parametrize("method", ["F-SAM sigma=0.5 lmbda=0.9", "Momentum-SAM", "LookSAM k=3"])
def test_a_first_batch_that_overflows_leaves_no_state(training, method):
    each = training(method).capture()
    x, y = batch(0)
    each.step(x * float("inf"), y)
    entries = each.optimizer.state_dict()["state"].values()
    assert not any(name in entry for entry in entries for name in ("momentum", "momentum_buffer"))
    assert not any(entry["sharpness_gradient"].any() for entry in entries if "sharpness_gradient" in entry)
    other = training(method)
    for a, b in zip(each.model.buffers(), other.model.buffers(), strict=True):
        a.copy_(b)
    if "steps" in other.optimizer.param_groups[0]:
        other.optimizer.param_groups[0]["steps"] = 1  # a step that does not count is one of LookSAM's k
    assert each.train([1, 2]) == other.train([1, 2])
    assert each.everything()[0] == other.everything()[0]


def test_the_loss_is_one_tensor_that_is_overwritten(training):
    each = training().capture()
    first = each.step(*batch(0))
    value = first.item()
    assert each.step(*batch(1)) is first
    assert first.item() != value
    assert not first.requires_grad


# ---- a capture leaves no trace ---------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["SGD momentum", "AdamW"])
@pytest.mark.parametrize("steps", [0, 3])
def test_a_capture_leaves_no_trace(training, steps, base):
    each = training(base=base)
    each.train(range(steps))
    torch.manual_seed(7)
    before, numbers = each.everything(), torch.get_rng_state()
    groups = copy.deepcopy([{k: v for k, v in g.items() if k != "params"} for g in each.optimizer.param_groups])
    each.capture()
    assert each.everything() == before
    assert torch.equal(torch.get_rng_state(), numbers)
    assert [{k: v for k, v in g.items() if k != "params"} for g in each.optimizer.param_groups] == groups
    assert all(p.grad is None for p in each.model.parameters())


def test_a_capture_in_the_middle_of_training_goes_on_from_there(training):
    eager, captured = training(), training()
    for each in (eager, captured):
        each.train(range(3))
    captured.capture()
    assert captured.train(range(3, 6)) == eager.train(range(3, 6))
    assert captured.everything() == eager.everything()


def test_a_closure_that_waits_for_a_value_is_refused_and_training_goes_on(training):
    eager, captured = training(), training()
    for each in (eager, captured):
        each.train([0])
    whole = captured.closure
    captured.closure = lambda x, y: whole(x, y) if float(x.sum()) < 1e9 else None
    with pytest.raises(RuntimeError, match=r"cannot be captured.*called a synchronizing.*\.item\(\)"):
        captured.capture()
    assert not captured.gpu.recorded, "a capture that breaks leaves torch in disorder"
    captured.closure = whole
    assert captured.train([1, 2]) == eager.train([1, 2])
    assert captured.everything() == eager.everything()


def test_a_capture_that_breaks_leaves_no_trace_and_training_goes_on(training):
    eager, captured = training(), training()
    whole = captured.closure

    def closure(x, y):
        if captured.gpu._launches.tape is not None:  # only now
            x.sum().item()
        return whole(x, y)

    captured.closure = closure
    with pytest.raises(RuntimeError, match=r"cannot be captured.*not permitted when stream is capturing"):
        captured.capture()
    captured.closure = whole
    assert captured.train([1, 2]) == eager.train([1, 2])
    assert captured.everything() == eager.everything()


def test_a_layer_that_replaces_its_buffer_is_refused(training):
    class Counting(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))
            self.out = torch.nn.Linear(FEATURES, 3)

        def forward(self, x):
            self.seen = self.seen + 1
            return self.out(x)

    with pytest.raises(RuntimeError, match=r"'seen'.*update it in place"):
        training(model=Counting()).capture()


# ---- state between replays ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["SGD momentum", "AdamW"])
def test_a_checkpoint_between_replays_is_that_of_steps(training, base):
    eager, captured = training(base=base), training(base=base).capture()
    for k in range(3):
        eager.train([k])
        captured.train([k])
        a, b = eager.optimizer.state_dict(), captured.optimizer.state_dict()
        assert a["param_groups"] == b["param_groups"]
        assert a["state"].keys() == b["state"].keys()
        for p in a["state"]:
            assert a["state"][p].keys() == b["state"][p].keys()
            for name, value in a["state"][p].items():
                assert torch.equal(value, b["state"][p][name]), name


@pytest.mark.parametrize(
    ("method", "base"),
    [
        ("F-SAM sigma=0.5 lmbda=0.9", "SGD momentum"),
        ("F-SAM sigma=0.5 lmbda=0.9", "AdamW"),
        ("Momentum-SAM", "AdamW"),
        ("GSAM", "SGD momentum"),
        ("LookSAM", "SGD momentum"),
    ],
)
def test_a_loaded_checkpoint_is_what_the_next_replay_starts_from(training, method, base):
    source = training(method, base)
    source.train(range(3))
    saved = copy.deepcopy((source.model.state_dict(), source.optimizer.state_dict()))
    captured = training(method, base).capture()
    captured.train(range(2))
    captured.model.load_state_dict(saved[0])
    captured.optimizer.load_state_dict(saved[1])
    assert captured.train([3, 4]) == source.train([3, 4])
    assert captured.everything() == source.everything()


def test_state_that_was_cleared_starts_afresh(training):
    eager, captured = training(), training().capture()
    for each in (eager, captured):
        each.train(range(2))
        each.optimizer.state.clear()
        each.train([2])
    assert captured.everything() == eager.everything()


@pytest.mark.parametrize("flattened", [False, True], ids=["", "flattened"])
def test_the_eigenvector_is_estimated_between_replays_and_its_first_step_captured_when_it_comes(training, flattened):
    eager, captured = training("Eigen-SAM own v", "SGD momentum"), training("Eigen-SAM own v", "SGD momentum")
    for each in (eager, captured):
        if flattened:
            fastsam.flatten_parameters(each.model)
        each.optimizer.param_groups[0]["freq"] = 2
    captured.capture()
    for k in range(5):
        assert captured.train([k]) == eager.train([k])
        assert len(captured.gpu.recorded) == (1 if k < 2 else 2)
        assert captured.optimizer.param_groups[0]["steps"] == k + 1
    assert captured.everything() == eager.everything()


def test_a_momentum_that_starts_later_is_captured_when_it_comes(training):
    eager, captured = training("SAM", "SGD"), training("SAM", "SGD").capture()
    for each in (eager, captured):
        each.train(range(2))
        each.optimizer.param_groups[0]["momentum"] = 0.9
        each.train(range(2, 4))
    assert captured.everything() == eager.everything()


# ---- what no longer fits, or never did -----------------------------------------------------------------------------


def move_weight(each):
    each.model.hidden.weight.data = each.model.hidden.weight.data.clone()


def add_group(each):
    each.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(3))]})


def rebuild_spaces(each):
    each.optimizer.two_pass.spaces._members = None
    each.train_eagerly()


def replace_parameter(each):
    each.model.out.weight = torch.nn.Parameter(each.model.out.weight.detach().clone())


def replace_buffer(each):
    each.model.norm.running_mean = each.model.norm.running_mean.clone()


def evaluate(each):
    each.model.eval()


def leave_gradients(each):
    each.closure(*batch(0))


def flatten(each):
    fastsam.flatten_parameters(each.model)
    each.optimizer.zero_grad()


def hook_the_base(each):
    each.optimizer.base_optimizer.register_step_post_hook(lambda *_: None)


def climb(each):
    each.closure(*batch(0))
    each.optimizer.first_step(zero_grad=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (move_weight, r"shape \(16, 6\) has moved .*capture again"),
        (flatten, "has moved .*capture again"),
        (add_group, "groups have other parameters.*capture again"),
        (replace_parameter, r"'weight' of shape \(3, 16\) was replaced"),
        (replace_buffer, "'running_mean'"),
        (evaluate, "captured with the model in training mode, and it is in eval mode now"),
        (leave_gradients, r"gradients that it did not compute.*zero_grad\(\)"),
        (hook_the_base, r"runs its own step\(\)"),
        (climb, r"within a step.*restore\(\)"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_a_graph_that_no_longer_fits_is_not_replayed(training, change, message):
    each = training().capture()
    each.train([0])
    change(each)
    before = each.everything()
    with pytest.raises(RuntimeError, match=message):
        each.step(*batch(1))
    assert each.everything() == before


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (lambda x, y: (x,), ValueError, "captured with 2 tensors and is called with 1"),
        (lambda x, y: (x[:5], y[:5]), ValueError, r"argument 0 .*\(5, 6\).*\(8, 6\).*drop_last"),
        (lambda x, y: (x.double(), y), ValueError, "float64.*float32"),
        (lambda x, y: (x, None), TypeError, "argument 1 .*NoneType"),
    ],
    ids=["number", "shape", "dtype", "type"],
)
def test_a_batch_unlike_the_example_is_refused(training, given, error, message):
    each = training().capture()
    before = each.everything()
    with pytest.raises(error, match=message):
        each.step(*given(*batch(0)))
    assert each.everything() == before


def test_a_hyper_parameter_out_of_range_is_refused(training):
    each = training().capture()
    each.optimizer.param_groups[0]["rho"] = -1.0
    before = each.everything()
    with pytest.raises(ValueError, match="rho"):
        each.step(*batch(0))
    assert each.everything() == before


class HalfwayRecipe(SamRecipe):
    def climb(self, uu, uv, vv, group):
        return 0.5 * group["rho"] / (uu**0.5 + 1e-12), 0.0


class Halfway(fastsam.SAM):
    recipe = HalfwayRecipe()


def test_numbers_of_a_users_own_recipe_may_not_change(training):
    eager, captured = training(), training()
    for each in (eager, captured):
        each.optimizer = Halfway(each.model.parameters(), torch.optim.SGD, rho=0.3, lr=0.1, backend="cuda")
    captured.capture()
    for k in range(2):
        captured.step(*batch(k))
        eager.optimizer.step(lambda k=k: eager.closure(*batch(k)), model=eager.model)
    captured.optimizer.param_groups[0]["rho"] = 0.4
    with pytest.raises(RuntimeError, match=r"recipe of Halfway.*capture again"):
        captured.step(*batch(2))


def test_what_cannot_be_captured_says_so(training):
    each = training()
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match="use autocast in the closure"):
        each.capture()
    with pytest.raises(TypeError, match="example 0 of the batch is a str"):
        graphs.capture(each.optimizer, each.closure, "x", model=each.model)
    each.optimizer = build_optimizer("SAM", "RMSprop", each.model.parameters(), "cuda")
    with pytest.raises(RuntimeError, match=r"RMSprop runs its own step\(\).*SGD, Adam or AdamW"):
        each.capture()
    each.optimizer = build_optimizer("SAM", "SGD", each.model.parameters(), "torch")
    with pytest.raises(RuntimeError, match="backend 'torch' waits for the device"):
        each.capture()
    with pytest.raises(TypeError, match="must be one of fastsam's"):
        graphs.capture(torch.optim.SGD(each.model.parameters(), lr=0.1), each.closure, *batch(0))


def test_parameters_on_the_cpu_are_refused_with_the_remedy():
    model = torch.nn.Linear(2, 2)
    optimizer = fastsam.SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    with pytest.raises(RuntimeError, match=r"needs parameters on a GPU.*on cpu.*optimizer\.step\(closure\)"):
        graphs.capture(optimizer, lambda x: None, torch.zeros(1, 2))


def test_a_capture_from_outside_is_refused(training, monkeypatch):
    each = training()
    each.train([0])
    monkeypatch.setattr(device, "capturing", lambda _: True)
    with pytest.raises(RuntimeError, match=r"fastsam\.graphs\.capture"):
        each.train([1])
