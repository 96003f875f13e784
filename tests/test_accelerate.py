"""Loops around an Accelerator, against a loop by hand."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
from digits import Counted, batches, by_hand, in_groups, loader, same
from torch.nn.functional import cross_entropy

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")

from fastsam import SAM, EigenSAM, FriendlySAM  # noqa: E402
from fastsam.integrations.accelerate import SAMOptimizer  # noqa: E402

METHODS = {
    "sam": lambda p: SAM(p, torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9),
    "friendly": lambda p: FriendlySAM(p, torch.optim.AdamW, rho=0.05, lr=1e-2),
}


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


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_training_equals_the_loop_by_hand(method, size, precision):
    model, reference = Counted(), Counted()
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=size, mixed_precision=precision)
    optimizer = SAMOptimizer(METHODS[method](model.parameters()), accelerator, model)
    losses = train(accelerator, model, optimizer, 4, max_norm=0.5)
    autocast = torch.bfloat16 if precision == "bf16" else None
    groups = in_groups(batches(4), size)
    expected = by_hand(reference, METHODS[method](reference.parameters()), groups, max_norm=0.5, autocast=autocast)
    same(model, reference, 1e-5)
    assert model.forwards == 8
    assert losses == pytest.approx(expected, rel=1e-4)


def test_an_optimizer_that_accelerate_wraps_itself_makes_two_evaluations():
    model, reference = Counted(), Counted()
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer, data = accelerator.prepare(model, METHODS["sam"](model.parameters()), loader(4))
    for x, y in data:

        def closure(x=x, y=y):
            loss = cross_entropy(model(x), y)
            accelerator.backward(loss)
            return loss

        optimizer.step(closure)
    assert model.forwards == 8
    by_hand(reference, METHODS["sam"](reference.parameters()), in_groups(batches(4), 1))
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def with_scaler(scale=2.0**8):
    """Accelerate makes a scaler on a GPU only; its fp16 path is the same with one on the CPU."""
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    return accelerator


def test_a_scaler_is_unscaled_in_both_passes_and_updated_once():
    model, reference, accelerator = Counted(), Counted(), with_scaler()
    optimizer = SAMOptimizer(METHODS["friendly"](model.parameters()), accelerator, model)
    train(accelerator, model, optimizer, 4)
    again = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    by_hand(reference, METHODS["friendly"](reference.parameters()), in_groups(batches(4), 2), scaler=again)
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


def test_an_exception_in_the_second_pass_restores_the_weights_and_forgets_the_batches():
    model, accelerator = Counted(), accelerate.Accelerator(cpu=True)
    optimizer = SAMOptimizer(METHODS["sam"](model.parameters()), accelerator, model)
    before = [p.detach().clone() for p in model.parameters()]

    def closure(x, y):
        loss = cross_entropy(model(x), y)
        accelerator.backward(loss)
        if model.forwards == 2:
            raise KeyError("from the closure")
        return loss

    with pytest.raises(KeyError, match="from the closure"):
        optimizer.step(closure, *batches(1)[0])
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert len(optimizer.micro_batches) == 0
    assert all(p.grad is None for p in model.parameters())


def test_eigensam_refreshes_its_vector_when_due():
    model, accelerator = Counted(), accelerate.Accelerator(cpu=True)
    optimizer = SAMOptimizer(EigenSAM(model.parameters(), torch.optim.SGD, freq=2, lr=0.1), accelerator, model)
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the largest eigenvalue in magnitude may be a negative one
        train(accelerator, model, optimizer, 3)
    assert optimizer.optimizer.eigenvector is not None


def test_partial_closures_carry_their_batch():
    model, accelerator = Counted(), accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    optimizer = SAMOptimizer(METHODS["sam"](model.parameters()), accelerator)

    def closure(x, y):
        loss = cross_entropy(model(x), y)
        accelerator.backward(loss)
        return loss

    for x, y in batches(2):
        with accelerator.accumulate(model):
            optimizer.step(functools.partial(closure, x, y))
    assert model.forwards == 4


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
