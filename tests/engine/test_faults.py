"""Exceptions anywhere in a long run: the weights are the last completed step's, and the run goes on undisturbed."""

import functools
import signal

import pytest
import torch
from reference import METHODS, build_optimizer, mlp
from reference.scripted import bits, noise, state_bits

from fastsam.kernels import cpu as cpu_kernels

ALL_METHODS = ["SAM", "F-SAM sigma=0.5 lmbda=0.9", "Eigen-SAM given v"]
BASES = ["SGD momentum", "AdamW", "RMSprop"]
LONG_RUN = ("F-SAM sigma=0.5 lmbda=0.9", "SGD momentum", "cpu")


def length(*run):
    """Steps of a run: one of them is long, the table's others suffice to meet every place a fault can be in."""
    return 500 if run == LONG_RUN else 40


class Injected(Exception):
    pass


class Faults:
    """Raises at every tenth call into what is wrapped, before or after the call has done its work."""

    def __init__(self, every=10):
        self.every, self.calls, self.raised, self.active = every, 0, 0, False

    def wrap(self, owner, name):
        original = getattr(owner, name)

        @functools.wraps(original)
        def faulty(*args, **kwargs):
            self.calls += self.active
            fails = self.active and self.calls % self.every == 0
            if fails and self.raised % 2:
                self.raised += 1
                raise Injected(f"in {name}")
            result = original(*args, **kwargs)
            if fails:
                self.raised += 1
                raise Injected(f"behind {name}")
            return result

        setattr(owner, name, faulty)


def make(method, base, backend, scaled):
    problem = mlp(torch.float32 if scaled else torch.float64)
    optimizer = build_optimizer(method, base, problem.params(), backend)
    if METHODS[method].eigenvector == "given":
        optimizer.eigenvector = [noise(p.shape, 900 + i, p.dtype) * 0.1 for i, p in enumerate(problem.params())]
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=10**6) if scaled else None
    return problem, optimizer, scaler


def closure_of(problem, scaler):
    def closure():
        loss = problem.loss()
        (loss if scaler is None else scaler.scale(loss)).backward()
        return loss

    return closure


@functools.cache
def undisturbed(method, base, backend, scaled):
    problem, optimizer, scaler = make(method, base, backend, scaled)
    weights, losses = [bits(problem.params())], []
    for _ in range(length(method, base, backend)):
        losses.append(optimizer.step(closure_of(problem, scaler), grad_scaler=scaler).item())
        if scaler is not None:
            scaler.update()
        weights.append(bits(problem.params()))
        problem.next_batch()
    return weights, losses, state_bits(optimizer, problem.params())


def whole_step(problem, optimizer, scaler):
    return optimizer.step(closure_of(problem, scaler), grad_scaler=scaler)


def manual_step(problem, optimizer, scaler):
    optimizer.zero_grad()
    loss = closure_of(problem, scaler)()
    optimizer.first_step(zero_grad=True, grad_scaler=scaler)
    closure_of(problem, scaler)()
    optimizer.second_step(zero_grad=True, grad_scaler=scaler)
    return loss


@pytest.mark.parametrize("how", [whole_step, manual_step])
@pytest.mark.parametrize("scaled", [False, True], ids=["", "GradScaler"])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", ALL_METHODS)
def test_an_exception_at_every_tenth_call(backend, method, base, scaled, how):
    weights, losses, state = undisturbed(method, base, backend, scaled)
    problem, optimizer, scaler = make(method, base, backend, scaled)
    faults = Faults()
    faults.wrap(problem.model[0], "forward")
    faults.wrap(problem.model[3], "forward")
    faults.wrap(optimizer, "zero_grad")
    faults.wrap(optimizer.two_pass.spaces, "collect_gradients")
    faults.wrap(optimizer.two_pass.spaces, "find_states")
    if base == "RMSprop":
        before_base_step(optimizer, faults)
    if scaler is not None:
        faults.wrap(scaler, "scale")
    for k in range(length(method, base, backend)):
        for active in (True, False):  # a second try, undisturbed, after an exception
            faults.active = active
            try:
                loss = how(problem, optimizer, scaler)
            except Injected:
                faults.active = False
                if bits(problem.params()) == weights[k + 1] != weights[k]:
                    loss = None  # raised behind a step that was complete
                    break
                optimizer.restore()  # what a manual loop has to do itself
                optimizer.zero_grad()
                assert bits(problem.params()) == weights[k]
                continue
            break
        faults.active = False
        optimizer.zero_grad()
        assert bits(problem.params()) == weights[k + 1]
        assert loss is None or loss.item() == losses[k]
        if scaler is not None:
            scaler.update()
        problem.next_batch()
    assert faults.raised > length(method, base, backend) / 3
    assert state_bits(optimizer, problem.params()) == state


def before_base_step(optimizer, faults):
    """A third-party base optimizer whose step raises before it has done anything."""
    base_step = optimizer.base_optimizer.step

    def step(*args, **kwargs):
        faults.calls += faults.active
        if faults.active and faults.calls % faults.every == 0:
            faults.raised += 1
            raise Injected("in the base optimizer")
        return base_step(*args, **kwargs)

    optimizer.base_optimizer.step = step


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("passes", [(1,), (2,), (1, 2)], ids=["pass one", "pass two", "both"])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", ALL_METHODS)
def test_a_loss_that_is_not_finite_now_and_then(backend, method, base, passes, value):
    weights, losses, _state = undisturbed(method, base, backend, False)
    problem, optimizer, _ = make(method, base, backend, False)
    for k in range(24):
        if k % 10 == 3:
            calls = []

            def spoiled(calls=calls):
                calls.append(None)
                loss = problem.loss() * (value if len(calls) in passes else 1.0)
                loss.backward()
                return loss

            before = state_bits(optimizer, problem.params())
            optimizer.step(spoiled)
            assert optimizer.found_inf == 1.0 and len(calls) == 2
            assert bits(problem.params()) == weights[k] and state_bits(optimizer, problem.params()) == before
        assert optimizer.step(problem.closure).item() == losses[k]
        assert bits(problem.params()) == weights[k + 1]
        problem.next_batch()


@pytest.mark.parametrize(("closure", "error", "says"), [
    (lambda p: None, TypeError, "return"),
    (lambda p: torch.ones(3), TypeError, r"\(3,\)"),
    (lambda p: p.loss(), RuntimeError, "backward"),
], ids=["None", "no scalar", "no backward"])  # fmt: skip
@pytest.mark.parametrize("call", ["step", "accumulate"])
@pytest.mark.parametrize("bad_pass", [1, 2])
def test_a_closure_that_is_none_of_a_closure(backend, closure, error, says, call, bad_pass):
    problem, optimizer, _ = make("F-SAM sigma=0.5 lmbda=0.9", "SGD momentum", backend, False)
    optimizer.step(problem.closure)
    before, calls = (bits(problem.params()), state_bits(optimizer, problem.params())), []

    def bad():
        calls.append(None)
        return closure(problem) if len(calls) == bad_pass else problem.closure()

    with pytest.raises(error, match=says):
        getattr(optimizer, call)(bad)
    assert (bits(problem.params()), state_bits(optimizer, problem.params())) == before
    optimizer.step(problem.closure)


class Signalling:
    """The compiled kernels, one of which is done when a signal arrives, before anybody could note that it is."""

    def __init__(self, compiled, kernel, number):
        self.compiled, self.kernel, self.number = compiled, kernel, number

    def __getattr__(self, name):
        original = getattr(self.compiled, name)
        if name != self.kernel:
            return original

        def signalled(*args):
            original(*args)
            signal.raise_signal(self.number)

        return signalled


@pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="no such signals on this system")
@pytest.mark.parametrize("kernel, completed", [("climb", 1), ("descend_sgd", 2)])
@pytest.mark.parametrize("name", ["SIGINT", "SIGALRM", "SIGCHLD"])  # SIGCHLD: a DataLoader's worker has died
def test_a_signal_whose_handler_raises_waits_for_weights_and_state_to_belong_together(
    cpu, monkeypatch, name, kernel, completed
):
    def handler(*_):
        raise Injected(name)

    number = getattr(signal, name)
    before = signal.signal(number, handler)
    try:
        weights = undisturbed("SAM", "SGD momentum", cpu, False)[0]
        problem, optimizer, _ = make("SAM", "SGD momentum", cpu, False)
        whole_step(problem, optimizer, None)
        problem.next_batch()
        with monkeypatch.context() as patch:
            patch.setattr(cpu_kernels, "_cpu", Signalling(cpu_kernels._cpu, kernel, number))
            with pytest.raises(Injected):
                whole_step(problem, optimizer, None)
        assert bits(problem.params()) == weights[completed]
        assert signal.getsignal(number) is handler
        if completed == 2:
            problem.next_batch()
        for _ in range(completed, 4):
            whole_step(problem, optimizer, None)
            problem.next_batch()
        assert bits(problem.params()) == weights[4]
    finally:
        signal.signal(number, before)
