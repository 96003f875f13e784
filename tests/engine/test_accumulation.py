"""Gradient accumulation: one perturbation for the whole batch, or one for each micro-batch."""

import pytest
import torch
from reference import build_optimizer, build_reference, find, mlp, take_step
from reference.loops import ReferenceFriendlySAM
from reference.scripted import noise, state_bits

import fastsam

ALL_METHODS = ["SAM", "ASAM", "F-SAM sigma=0.5 lmbda=0.9", "Eigen-SAM given v"]
BASES = ["SGD momentum", "AdamW", "RMSprop"]
PARTS = 4


def parts(problem):
    """The micro-batches of the present batch, as closures whose gradients add up to the batch's."""
    inputs, targets = problem.inputs[problem.batch], problem.targets[problem.batch]

    def closure(x, y):
        loss = torch.nn.functional.cross_entropy(problem.model(x), y) / PARTS
        loss.backward()
        return loss

    pairs = zip(inputs.chunk(PARTS), targets.chunk(PARTS), strict=True)
    return [lambda x=x, y=y: closure(x, y) for x, y in pairs]


def give_vector(method, problem, *optimizers):
    if find(method).eigenvector == "given":
        for optimizer in optimizers:
            optimizer.eigenvector = [noise(p.shape, 900 + i) * 0.1 for i, p in enumerate(problem.params())]


def everything(optimizer, problem):
    gradients = [None if p.grad is None else p.grad.clone() for p in problem.params()]
    return problem.weights().tolist(), state_bits(optimizer, problem.params()), str(gradients)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", ALL_METHODS)
def test_two_sweeps_over_the_micro_batches_are_the_big_batch(backend, method, base):
    whole, swept = mlp(), mlp()
    one, other = (build_optimizer(method, base, problem.params(), backend) for problem in (whole, swept))
    give_vector(method, whole, one, other)
    for _ in range(5):
        one.step(whole.closure)
        for step in (other.first_step, other.second_step):
            for closure in parts(swept):
                closure()
            step(zero_grad=True)
        whole.next_batch()
        swept.next_batch()
    torch.testing.assert_close(swept.weights(), whole.weights(), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("base", ["SGD momentum", "AdamW"])
@pytest.mark.parametrize("method", ["Momentum-SAM", "LookSAM k=3"])
def test_micro_batches_of_one_evaluation_are_the_big_batch(backend, method, base):
    """LookSAM's steps that climb are taken whole here: each of their micro-batches would climb by itself."""
    reference, problem, calls = mlp(), mlp(), []
    loop = build_reference(method, base, reference.params())
    optimizer = build_optimizer(method, base, problem.params(), backend)
    for _ in range(5):
        take_step(loop, reference.closure)
        if optimizer.evaluations == 2:
            optimizer.step(problem.closure)
        else:
            for closure in parts(problem):
                optimizer.accumulate(lambda closure=closure: calls.append(0) or closure())
            optimizer.descend(zero_grad=True)
        torch.testing.assert_close(problem.weights(), reference.weights(), rtol=1e-11, atol=1e-11)
        problem.next_batch()
        reference.next_batch()
    assert len(calls) == PARTS * (5 if method == "Momentum-SAM" else 3)


def sums_of_both_passes(loop, problem):
    """The first gradients of all micro-batches and the second ones, each at a perturbation of its own."""
    first, second = ([torch.zeros_like(p) for p in problem.params()] for _ in range(2))
    for closure in parts(problem):
        loop.zero_grad()
        closure()
        first = [t + p.grad for t, p in zip(first, problem.params(), strict=True)]
        loop.first_step()
        loop.zero_grad()
        closure()
        second = [t + p.grad for t, p in zip(second, problem.params(), strict=True)]
        with torch.no_grad():
            for p, weight in loop.backup.items():
                p.copy_(weight)
    return first, second


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", ["GSAM", "WSAM", "WSAM coupled", "LookSAM k=3"])
def test_a_two_sided_method_combines_the_gradients_of_all_micro_batches(backend, method, base):
    reference, problem = mlp(), mlp()
    loop = build_reference(method, base, reference.params())
    optimizer = build_optimizer(method, base, problem.params(), backend)
    for _ in range(4):
        for closure in parts(problem):
            optimizer.accumulate(closure)
        optimizer.descend(zero_grad=True)
        if getattr(loop, "evaluations", 2) == 2:
            first, second = sums_of_both_passes(loop, reference)
            loop.first = dict(zip(reference.params(), first, strict=True))
            for p, total in zip(reference.params(), second, strict=True):
                p.grad = total
        else:
            loop.zero_grad()
            for closure in parts(reference):
                closure()
        loop.second_step()
        torch.testing.assert_close(problem.weights(), reference.weights(), rtol=1e-10, atol=1e-11)
        problem.next_batch()
        reference.next_batch()


def test_micro_batches_that_do_not_climb_are_evaluated_once(backend):
    plain, problem, calls = mlp(), mlp(), []
    base = torch.optim.SGD(plain.params(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    optimizer = build_optimizer("SAM", "SGD momentum", problem.params(), backend, rho=0.0)
    for _ in range(3):
        base.zero_grad()
        for closure in parts(plain):
            closure()
        base.step()
        for closure in parts(problem):
            optimizer.accumulate(lambda closure=closure: calls.append(0) or closure())
        optimizer.descend(zero_grad=True)
    assert len(calls) == 3 * PARTS
    torch.testing.assert_close(problem.weights(), plain.weights(), rtol=1e-13, atol=1e-13)


def m_sharpness(loop, problem):
    """A perturbation for each micro-batch, with the plain loop's first_step and a restore by hand."""
    total = [torch.zeros_like(p) for p in problem.params()]
    for closure in parts(problem):
        loop.zero_grad()
        closure()
        loop.first_step()
        loop.zero_grad()
        closure()
        with torch.no_grad():
            for p, weight in loop.backup.items():
                p.copy_(weight)
        loop.backup.clear()
        total = [t + p.grad for t, p in zip(total, problem.params(), strict=True)]
    for p, t in zip(problem.params(), total, strict=True):
        p.grad = t
    loop.second_step()


@pytest.mark.parametrize("flattened", [False, True], ids=["", "flattened"])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", ALL_METHODS)
def test_accumulate_perturbs_for_each_micro_batch(backend, method, base, flattened):
    reference, problem = mlp(), mlp()
    if flattened:
        fastsam.flatten_parameters(problem.model)
    loop = build_reference(method, base, reference.params())
    optimizer = build_optimizer(method, base, problem.params(), backend)
    give_vector(method, problem, optimizer, loop)
    for _ in range(4):
        start = problem.weights()
        for closure in parts(problem):
            optimizer.accumulate(closure)
            assert torch.equal(problem.weights(), start)
        optimizer.descend(zero_grad=True)
        m_sharpness(loop, reference)
        torch.testing.assert_close(problem.weights(), reference.weights(), rtol=1e-11, atol=1e-11)
        problem.next_batch()
        reference.next_batch()


def test_the_average_is_fed_once_for_each_micro_batch_and_kept_with_the_step(backend):
    reference, problem = mlp(), mlp()
    loop = ReferenceFriendlySAM(reference.params(), torch.optim.SGD, lr=0.05)
    optimizer = fastsam.FriendlySAM(problem.params(), torch.optim.SGD, lr=0.05, backend=backend)
    for closure in parts(problem):
        optimizer.accumulate(closure)
    assert all("momentum" not in optimizer.state[p] for p in problem.params())
    optimizer.descend(zero_grad=True)
    m_sharpness(loop, reference)
    for p, q in zip(problem.params(), reference.params(), strict=True):
        torch.testing.assert_close(optimizer.state[p]["momentum"], loop.momentum[q], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("micro_batch", [0, 2])
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("flattened", [False, True], ids=["", "flattened"])
def test_an_exception_in_a_micro_batch_leaves_everything_as_before(backend, call, micro_batch, error, flattened):
    method = "F-SAM sigma=0.5 lmbda=0.9"
    undisturbed, problem = mlp(), mlp()
    if flattened:
        fastsam.flatten_parameters(problem.model)
        fastsam.flatten_parameters(undisturbed.model)
    twin, optimizer = (build_optimizer(method, "AdamW", p.params(), backend) for p in (undisturbed, problem))
    for _ in range(2):
        for k, (closure, same) in enumerate(zip(parts(problem), parts(undisturbed), strict=True)):
            if k == micro_batch:
                before, calls = everything(optimizer, problem), []

                def failing(closure=closure, calls=calls):
                    calls.append(None)
                    optimizer.zero_grad()  # as many closures do
                    loss = closure()
                    if len(calls) == call:
                        raise error
                    return loss

                with pytest.raises(error):
                    optimizer.accumulate(failing)
                assert everything(optimizer, problem) == before
            optimizer.accumulate(closure)
            twin.accumulate(same)
        optimizer.descend(zero_grad=True)
        twin.descend(zero_grad=True)
    assert torch.equal(problem.weights(), undisturbed.weights())
    assert state_bits(optimizer, problem.params()) == state_bits(twin, undisturbed.params())


@pytest.mark.parametrize("call", [0, 1])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", ALL_METHODS)
def test_a_nan_in_any_pass_of_any_micro_batch_skips_the_step(backend, method, base, call):
    problem = mlp()
    optimizer = build_optimizer(method, base, problem.params(), backend)
    give_vector(method, problem, optimizer)
    optimizer.step(problem.closure)
    before, calls = (problem.weights(), state_bits(optimizer, problem.params())), []
    for closure in parts(problem):

        def spoiled(closure=closure):
            loss = closure()
            calls.append(None)
            if len(calls) == 3 + call:
                problem.params()[0].grad[0, 0] = float("nan")
            return loss

        optimizer.accumulate(spoiled)
    optimizer.descend(zero_grad=True)
    assert optimizer.found_inf == 1.0
    assert torch.equal(problem.weights(), before[0]) and state_bits(optimizer, problem.params()) == before[1]
    for closure in parts(problem):
        optimizer.accumulate(closure)
    optimizer.descend(zero_grad=True)
    assert optimizer.found_inf == 0.0 and not torch.equal(problem.weights(), before[0])


def test_a_parameter_without_a_gradient_in_one_micro_batch_keeps_its_average(backend):
    params = [torch.nn.Parameter(noise((5,), i)) for i in range(2)]
    optimizer = fastsam.FriendlySAM(params, torch.optim.SGD, lmbda=0.5, lr=0.1, backend=backend)
    # the gradient of p^2 / 2 is p, whatever came before
    for used in ([0, 1], [0], [0, 1]):

        def closure(used=used):
            loss = sum((params[i] * noise((5,), 7)).sum() for i in used)
            loss.backward()
            return loss

        optimizer.accumulate(closure)
    optimizer.descend(zero_grad=True)
    for p in params:
        torch.testing.assert_close(optimizer.state[p]["momentum"], noise((5,), 7))


def test_zero_grad_abandons_what_was_accumulated(backend):
    problem = mlp()
    optimizer = build_optimizer("F-SAM sigma=0.5 lmbda=0.9", "SGD momentum", problem.params(), backend)
    optimizer.accumulate(problem.closure)
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="accumulate"):
        optimizer.descend()
    optimizer.step(problem.closure)


def test_gradients_cleared_by_the_model_start_another_step(backend):
    problem, twin_problem = mlp(), mlp()
    optimizer, twin = (
        build_optimizer("F-SAM sigma=0.5 lmbda=0.9", "SGD momentum", p.params(), backend)
        for p in (problem, twin_problem)
    )
    optimizer.accumulate(problem.closure)
    problem.model.zero_grad()
    for one, its in ((optimizer, problem), (twin, twin_problem)):
        one.accumulate(its.closure)
        one.descend(zero_grad=True)
    assert torch.equal(problem.weights(), twin_problem.weights())


def test_the_wrong_order_is_refused_and_changes_nothing(backend):
    problem = mlp()
    optimizer = build_optimizer("SAM", "SGD momentum", problem.params(), backend)
    with pytest.raises(RuntimeError, match="accumulate"):
        optimizer.descend()
    problem.closure()
    with pytest.raises(RuntimeError, match="zero_grad"):
        optimizer.accumulate(problem.closure)
    optimizer.first_step()
    for call in (optimizer.descend, lambda: optimizer.accumulate(problem.closure)):
        with pytest.raises(RuntimeError, match="second_step"):
            call()
    optimizer.second_step(zero_grad=True)
    optimizer.accumulate(problem.closure)
    before = everything(optimizer, problem)
    with pytest.raises(RuntimeError, match="descend"):
        optimizer.first_step()
    with pytest.raises(RuntimeError, match="descend"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2))]})
    with pytest.raises(TypeError, match="closure"):
        optimizer.accumulate(None)
    assert everything(optimizer, problem) == before
    optimizer.descend()


def test_an_accumulated_step_with_a_scaler_and_clipping(backend):
    plain, scaled = mlp(torch.float32), mlp(torch.float32)
    one, other = (build_optimizer("F-SAM sigma=0.5 lmbda=0.9", "SGD", p.params(), backend) for p in (plain, scaled))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for _ in range(3):
        for closure in parts(plain):
            one.accumulate(closure)
        one.descend(zero_grad=True, max_norm=0.1)
        inputs, targets = scaled.inputs[scaled.batch], scaled.targets[scaled.batch]
        for x, y in zip(inputs.chunk(PARTS), targets.chunk(PARTS), strict=True):

            def closure(x=x, y=y):
                loss = torch.nn.functional.cross_entropy(scaled.model(x), y) / PARTS
                scaler.scale(loss).backward()
                return loss

            other.accumulate(closure, grad_scaler=scaler)
        with pytest.raises(RuntimeError, match="same grad_scaler"):
            other.descend()
        other.descend(zero_grad=True, max_norm=0.1, grad_scaler=scaler)
        scaler.update()
        torch.testing.assert_close(scaled.weights(), plain.weights(), rtol=1e-6, atol=1e-6)


def test_unscale_inside_accumulation_is_refused(backend):
    problem = mlp(torch.float32)
    optimizer = build_optimizer("SAM", "SGD", problem.params(), backend)
    scaler = torch.amp.GradScaler("cpu")

    def closure():
        loss = problem.loss()
        scaler.scale(loss).backward()
        return loss

    optimizer.accumulate(closure, grad_scaler=scaler)
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="unscale_"):
        optimizer.accumulate(closure, grad_scaler=scaler)
    optimizer.descend(grad_scaler=scaler)
