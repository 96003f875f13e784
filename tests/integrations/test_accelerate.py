"""Loops around an Accelerator, against a loop by hand."""

from __future__ import annotations

import functools
import warnings
import weakref

import pytest
import torch
from digits import METHODS, Counted, batches, by_hand, in_groups, loader, same
from torch.nn.functional import cross_entropy

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")

from fastsam import SAM, EigenSAM, flatten_parameters  # noqa: E402
from fastsam.integrations.accelerate import SAMOptimizer  # noqa: E402
from fastsam.integrations.micro_batches import MicroBatches  # noqa: E402

PRECISIONS = {"no": None, "bf16": torch.bfloat16}


@pytest.fixture(autouse=True)
def fresh_state():
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def train(accelerator, model, optimizer, n, epochs=1, **options):
    model, optimizer, data = accelerator.prepare(model, optimizer, loader(n))

    def closure(x, y):
        optimizer.zero_grad()  # torch's convention; it may not clear other micro-batches
        with accelerator.autocast():
            loss = cross_entropy(model(x), y)
        accelerator.backward(loss)
        return loss

    losses = []
    for _ in range(epochs):
        for x, y in data:
            with accelerator.accumulate(model):
                losses.append(optimizer.step(closure, x, y, **options).item())
                optimizer.zero_grad()
    return losses


@pytest.mark.parametrize(
    ("method", "size", "precision", "share"),
    [
        *[
            (method, size, precision, 1.0)
            for method in ("sam", "friendly")
            for size in (1, 2)
            for precision in PRECISIONS
        ],
        *[(method, 2, "no", 1.0) for method in ("momentum", "look", "gsam", "sam at radius 0")],
        ("sam", 1, "no", 0.25),
        ("friendly", 2, "no", 0.3),
        ("gsam", 2, "bf16", 0.25),
        ("momentum", 1, "no", 0.25),
        ("look", 2, "no", 0.25),
        ("sam at radius 0", 1, "no", 0.25),
    ],
)
def test_training_equals_the_loop_by_hand(method, size, precision, share):
    """As to its evaluations, too: a method's only pass of a step takes whole batches whatever the share."""
    model, reference = Counted(), Counted()
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=size, mixed_precision=precision)
    optimizer = SAMOptimizer(METHODS[method](model.parameters()), accelerator, model, ascent_share=share)
    losses = train(accelerator, model, optimizer, 4, max_norm=0.5)
    of_update = method in ("look", "gsam")
    options = dict(max_norm=0.5, of_update=of_update, autocast=PRECISIONS[precision], share=share)
    expected = by_hand(reference, METHODS[method](reference.parameters()), in_groups(batches(4), size), **options)
    same(model, reference, 1e-5)
    assert [len(x) for x in model.outputs] == [len(x) for x in reference.outputs]
    assert losses == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("method", ["sam", "momentum", "look"])
def test_an_optimizer_that_accelerate_wraps_itself_makes_its_evaluations(method):
    model, reference = Counted(), Counted()
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer, data = accelerator.prepare(model, METHODS[method](model.parameters()), loader(4))
    for x, y in data:

        def closure(x=x, y=y):
            loss = cross_entropy(model(x), y)
            accelerator.backward(loss)
            return loss

        optimizer.step(closure)
    by_hand(reference, METHODS[method](reference.parameters()), in_groups(batches(4), 1))
    assert model.forwards == reference.forwards == {"sam": 8, "momentum": 4, "look": 6}[method]
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def with_scaler(scale=2.0**8):
    """Accelerate makes a scaler on a GPU only; its fp16 path is the same with one on the CPU."""
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    return accelerator


@pytest.mark.parametrize("method", METHODS)
def test_a_scaler_is_unscaled_in_every_pass_and_updated_once(method):
    model, reference, accelerator = Counted(), Counted(), with_scaler()
    optimizer = SAMOptimizer(METHODS[method](model.parameters()), accelerator, model)
    train(accelerator, model, optimizer, 4)
    again = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    by_hand(reference, METHODS[method](reference.parameters()), in_groups(batches(4), 2), scaler=again)
    same(model, reference, 1e-5)
    assert accelerator.scaler.state_dict() == again.state_dict()
    assert not optimizer.step_was_skipped


def test_an_overflow_skips_the_step_and_holds_the_schedule_back():
    model, accelerator = Counted(), with_scaler(2.0**127)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = SAMOptimizer(METHODS["sam"](model.parameters()), accelerator, model)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer.optimizer, 1, 0.1)
    optimizer, scheduler = accelerator.prepare(optimizer, schedule)

    def closure(x, y):
        loss = cross_entropy(model(x), y) * 1e3
        accelerator.backward(loss)
        return loss

    for x, y in batches(2):
        with accelerator.accumulate(model):
            optimizer.step(closure, x, y)
            scheduler.step()
    assert optimizer.step_was_skipped
    assert accelerator.scaler.get_scale() == 2.0**126
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_accelerates_own_wrapper_with_a_scaler_is_refused():
    model, accelerator = Counted(), with_scaler()
    optimizer = accelerator.prepare(METHODS["sam"](model.parameters()))
    x, y = batches(1)[0]
    accelerator.backward(cross_entropy(model(x), y))
    with pytest.raises(RuntimeError, match="cannot run two passes"):
        optimizer.step(lambda: None)


def test_a_closure_without_its_batch_is_refused_while_gradients_accumulate():
    model = Counted()
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    optimizer = SAMOptimizer(METHODS["sam"](model.parameters()), accelerator)
    with accelerator.accumulate(model), pytest.raises(TypeError, match=r"optimizer.step\(closure, x, y\)"):
        optimizer.step(lambda: None)


def test_gradients_from_outside_the_closure_are_refused():
    model, accelerator = Counted(), accelerate.Accelerator(cpu=True)
    optimizer = SAMOptimizer(METHODS["sam"](model.parameters()), accelerator)
    x, y = batches(1)[0]
    accelerator.backward(cross_entropy(model(x), y))
    with pytest.raises(RuntimeError, match="gradients that it did not compute"):
        optimizer.step(lambda: None)


def test_another_optimizer_is_refused():
    model = Counted()
    with pytest.raises(TypeError, match="needs an optimizer of fastsam, not SGD"):
        SAMOptimizer(torch.optim.SGD(model.parameters()), accelerate.Accelerator(cpu=True))


def test_a_resumed_run_equals_an_undisturbed_one(tmp_path):
    def run(epochs, load=False, save=False):
        model, accelerator = Counted(), accelerate.Accelerator(cpu=True)
        optimizer = SAMOptimizer(METHODS["friendly"](model.parameters()), accelerator, model)
        if load:
            accelerator.prepare(model, optimizer)
            accelerator.load_state(tmp_path)
        train(accelerator, model, optimizer, 4, epochs)
        if save:
            accelerator.save_state(tmp_path)
        return model

    undisturbed = run(2)
    run(1, save=True)
    resumed = run(1, load=True)
    for a, b in zip(undisturbed.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("method", ["sam", "momentum"])
def test_an_exception_in_the_pass_at_w_plus_e_restores_the_weights_and_forgets_the_batches(method):
    model, accelerator = Counted(), accelerate.Accelerator(cpu=True)
    optimizer = SAMOptimizer(METHODS[method](model.parameters()), accelerator, model)

    def closure(x, y):
        loss = cross_entropy(model(x), y)
        accelerator.backward(loss)
        if model.forwards == 2:  # Momentum-SAM's first step is its base's
            raise KeyError("from the closure")
        return loss

    with pytest.raises(KeyError, match="from the closure"):
        for batch in batches(2):
            before = [p.detach().clone() for p in model.parameters()]
            optimizer.step(closure, *batch)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert len(optimizer.micro_batches) == 0
    assert all(p.grad is None for p in model.parameters())


def test_momentum_sams_weights_are_perturbed_in_its_passes_alone():
    model, accelerator = Counted(), accelerate.Accelerator(cpu=True, gradient_accumulation_steps=3)
    optimizer = SAMOptimizer(METHODS["momentum"](model.parameters()), accelerator, model)
    weights, met = list(model.parameters()), []

    def closure(x, y):
        met.append([p.detach().clone() for p in weights])
        loss = cross_entropy(model(x), y)
        accelerator.backward(loss)
        return loss

    between = []
    for x, y in batches(6):
        with accelerator.accumulate(model):
            optimizer.step(closure, x, y)
        between.append([p.detach().clone() for p in weights])
    for i in (3, 4):
        assert all(torch.equal(p, q) for p, q in zip(between[i], between[2], strict=True))
    for i in (4, 5):
        assert all(torch.equal(p, q) for p, q in zip(met[i], met[3], strict=True))
    assert not torch.equal(met[3][0], between[2][0])


def test_eigensam_refreshes_its_vector_when_due():
    model, accelerator = Counted(), accelerate.Accelerator(cpu=True)
    optimizer = SAMOptimizer(EigenSAM(model.parameters(), torch.optim.SGD, freq=2, lr=0.1), accelerator, model)
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the largest eigenvalue in magnitude may be a negative one
        train(accelerator, model, optimizer, 3)
    assert optimizer.optimizer.eigenvector is not None


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_partial_closures_carry_their_batch(share):
    model, accelerator = Counted(), accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    optimizer = SAMOptimizer(METHODS["sam"](model.parameters()), accelerator, ascent_share=share)

    def closure(x, y):
        loss = cross_entropy(model(x), y)
        accelerator.backward(loss)
        return loss

    for x, y in batches(2):
        with accelerator.accumulate(model):
            optimizer.step(functools.partial(closure, x, y=y))
    assert [len(x) for x in model.outputs] == [16 * share] * 2 + [16] * 2


def test_a_share_without_a_batch_to_divide_is_refused_before_anything_is_evaluated():
    model, accelerator = Counted(), accelerate.Accelerator(cpu=True)
    optimizer = SAMOptimizer(METHODS["sam"](model.parameters()), accelerator, ascent_share=0.5)
    with pytest.raises(TypeError, match=r"ascent_share=0.5 divides the batch.*optimizer.step\(closure, x, y\)"):
        optimizer.step(lambda: None)
    with pytest.raises(TypeError, match=r"batch\[1\] is of type object, which cannot be divided"):
        optimizer.step(lambda x, y: None, batches(1)[0][0], object())
    with pytest.raises(ValueError, match=r"ascent_share=2 must be a number in \(0, 1\]"):
        SAMOptimizer(METHODS["sam"](model.parameters()), accelerator, ascent_share=2)
    assert model.forwards == 0


def test_accelerates_own_wrapper_may_not_drop_micro_batches():
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    optimizer = accelerator.prepare(SAM([torch.nn.Parameter(torch.zeros(1))], torch.optim.SGD, lr=0.1))
    with pytest.raises(RuntimeError, match=r"2 micro-batches.*SAMOptimizer"):
        optimizer.step(lambda: None)
    plain = torch.nn.Parameter(torch.ones(1))
    SAM([plain], torch.optim.SGD, lr=0.1).step(lambda: plain.sum().backward() or plain.detach())
    assert plain.item() < 1, "a loop beside Accelerate's is none of its business"


def test_a_step_without_a_closure_is_refused_with_what_to_write():
    model = Counted()
    accelerator = accelerate.Accelerator(cpu=True)
    optimizer = SAMOptimizer(METHODS["sam"](model.parameters()), accelerator, model)
    with pytest.raises(TypeError, match=r"optimizer.step\(closure, x, y\)"):
        optimizer.step()


def out_of_memory_once(model, at):
    """The forward pass numbered ``at`` of the model fails, as find_executable_batch_size expects it."""
    sizes = []

    def fail(_, inputs):
        sizes.append(len(inputs[0]))
        if len(sizes) == at:
            raise RuntimeError("CUDA out of memory.")

    model.register_forward_pre_hook(fail)
    return sizes


@pytest.mark.parametrize("at", [2, 3], ids=["first pass", "second pass"])
def test_an_attempt_that_failed_leaves_nothing_to_the_next(at):
    model, reference = torch.nn.Linear(64, 10), torch.nn.Linear(64, 10)
    reference.load_state_dict(model.state_dict())
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    optimizer = SAMOptimizer(METHODS["sam"](model.parameters()), accelerator, model)
    sizes = out_of_memory_once(model, at)

    def closure(x, y):
        loss = cross_entropy(model(x), y)
        accelerator.backward(loss)
        return loss

    @accelerate.utils.find_executable_batch_size(starting_batch_size=20)
    def attempt(size):
        accelerator.free_memory()
        for x, y in batches(2, size):
            with accelerator.accumulate(model):
                optimizer.step(closure, x, y)

    attempt()
    assert sizes == [20] * at + [18] * 4
    by_hand(reference, METHODS["sam"](reference.parameters()), [batches(2, 18)])
    same(model, reference, 1e-5)


def test_the_memory_of_micro_batches_is_free_as_soon_as_one_fails():
    seen, x = MicroBatches(METHODS["sam"](Counted().parameters())), torch.ones(3)
    kept = weakref.ref(x)
    seen.first(functools.partial(torch.sum, x), last=False)
    with pytest.raises(ZeroDivisionError):
        seen.first(lambda: 1 / 0, last=True)
    del x
    assert kept() is None


def test_micro_batches_whose_gradients_were_cleared_belong_to_no_step():
    """An attempt may fail outside of step(), in a data loader say."""
    model = Counted()
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    optimizer = SAMOptimizer(METHODS["sam"](model.parameters()), accelerator, model)

    def closure(x, y):
        loss = cross_entropy(model(x), y)
        accelerator.backward(loss)
        return loss

    for x, y in [batches(1)[0], *batches(2)]:
        if model.forwards == 1:
            accelerator.free_memory()
            model.zero_grad()
        with accelerator.accumulate(model):
            optimizer.step(closure, x, y)
    assert model.forwards == 1 + 4


def test_every_flattened_weight_is_in_the_saved_state(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    model, accelerator = Counted(), accelerate.Accelerator(cpu=True)
    flatten_parameters(model)
    model, optimizer = accelerator.prepare(model, SAMOptimizer(METHODS["sam"](model.parameters()), accelerator, model))
    train(accelerator, model, optimizer, 2)
    accelerator.save_state(tmp_path)
    saved = safetensors.load_file(tmp_path / "model.safetensors")
    assert saved.keys() == model.state_dict().keys()
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    train(accelerator, model, optimizer, 1)
    accelerator.load_state(tmp_path)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in expected.items())
