"""What must stay true of every step: exact restore, and a step that happens as a whole or not at all."""

import pytest
import torch
from reference import METHODS
from reference.scripted import (
    bits,
    copies,
    like,
    make_scripted,
    noise,
    random_gradients,
    scripted_steps,
    set_gradients,
    state_bits,
)

import fastsam

SOME_METHODS = ["SAM", "ASAM", "F-SAM sigma=0.5 lmbda=0.9", "Eigen-SAM given v"]
SOME_BASES = ["SGD momentum", "AdamW", "RMSprop"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


class Still(torch.optim.SGD):
    """Steps without moving anything."""

    def step(self, closure=None):
        return None


def everything(optimizer, params):
    """The bytes of all that a step may change, with -0.0 and NaN told apart."""
    v = getattr(optimizer, "eigenvector", None)
    return bits(params), state_bits(optimizer, params), bits(v) if v is not None else None


# ---- restore -------------------------------------------------------------------------------------


def special_values(dtype):
    """Weights that w + e - e would not give back: signed zeros, denormals, the largest and the smallest."""
    info = torch.finfo(dtype)
    tiny = info.smallest_normal
    rare = [0.0, -0.0, tiny / 8, -tiny / 2, info.max, -info.max, info.eps, 1.0]
    return torch.tensor(rare, dtype=torch.float64).to(dtype).repeat(37)[:-3]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", ["SAM", "F-SAM sigma=0.5 lmbda=0.9", "Eigen-SAM given v"])
def test_perturbed_restores_every_bit(backend, method, dtype):
    params, optimizer = make_scripted(method, "SGD", backend, dtype)
    with torch.no_grad():
        params[3].set_(special_values(dtype))
    if METHODS[method].eigenvector:
        optimizer.eigenvector = [like(p.detach(), i) for i, p in enumerate(params)]
    start = bits(params)
    set_gradients(params, random_gradients(params, 5))
    with optimizer.perturbed():
        assert bits(params) != start
    assert bits(params) == start


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("base_class", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop, Still])
def test_a_step_with_lr_zero_restores_every_bit(backend, dtype, base_class):
    weight = special_values(dtype)
    if base_class is torch.optim.RMSprop:  # its own step turns -0.0 into 0.0 where the update is -0.0
        weight = torch.where(weight == 0, torch.zeros_like(weight), weight)
    params = [torch.nn.Parameter(weight), torch.nn.Parameter(noise((700,), 1, dtype))]
    # an eps that float16 can hold: RMSprop's own step would else divide by zero
    settings = {"eps": 1e-3} if base_class is torch.optim.RMSprop else {}
    optimizer = fastsam.FriendlySAM(params, base_class, lr=0.0, rho=0.1, backend=backend, **settings)
    start = bits(params)
    passes = [random_gradients(params, 10 * k) for k in range(4)]
    perturbed, first, _, second = scripted_steps(optimizer, params, passes)
    assert bits(perturbed) != start
    assert bits(first) == start
    assert bits(second) == start


# ---- interruptions -------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize("base", SOME_BASES)
@pytest.mark.parametrize("method", SOME_METHODS)
def test_an_exception_between_the_passes_leaves_no_trace(backend, method, base, steps_before, error):
    def finish(optimizer, params):
        return scripted_steps(optimizer, params, [random_gradients(params, 300 + k) for k in range(4)])

    def prepare():
        params, optimizer = make_scripted(method, base, backend)
        scripted_steps(optimizer, params, [random_gradients(params, k) for k in range(2 * steps_before)])
        return params, optimizer

    params, optimizer = prepare()
    before = everything(optimizer, params)
    set_gradients(params, random_gradients(params, 100))
    with pytest.raises(error), optimizer.perturbed():
        assert bits(params) != before[0]
        raise error
    assert everything(optimizer, params) == before

    calls = []

    def closure():
        calls.append(bits(params))
        set_gradients(params, random_gradients(params, 200))
        if len(calls) == 2:
            raise error
        return torch.zeros(())

    optimizer.zero_grad()
    with pytest.raises(error):
        optimizer.step(closure)
    assert calls[0] == before[0] != calls[1]
    assert everything(optimizer, params) == before

    twin_params, twin = prepare()
    assert bits(finish(optimizer, params)[-1]) == bits(finish(twin, twin_params)[-1])


def test_an_exception_in_the_first_pass_leaves_no_trace(backend):
    params, optimizer = make_scripted("F-SAM sigma=0.5 lmbda=0.9", "SGD momentum", backend)
    before = everything(optimizer, params)

    def closure():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        optimizer.step(closure)
    assert everything(optimizer, params) == before


@pytest.mark.parametrize("method", SOME_METHODS)
def test_state_dict_between_the_passes_is_refused(backend, method):
    params, optimizer = make_scripted(method, "SGD momentum", backend)
    set_gradients(params, random_gradients(params, 0))
    optimizer.first_step()
    with pytest.raises(RuntimeError, match="second_step"):
        optimizer.state_dict()
    optimizer.second_step()
    optimizer.state_dict()
    with optimizer.perturbed(), pytest.raises(RuntimeError, match="perturbed"):
        optimizer.state_dict()
    optimizer.state_dict()


ALLOWED_KEYS = {
    "SAM": set(),
    "ASAM": set(),
    "F-SAM sigma=0.5 lmbda=0.9": {"momentum"},
    "Eigen-SAM given v": {"eigenvector"},
}
BASE_KEYS = {
    "SGD momentum": {"momentum_buffer"},
    "AdamW": {"step", "exp_avg", "exp_avg_sq"},
    "RMSprop": {"step", "square_avg", "momentum_buffer"},
}


@pytest.mark.parametrize("base", SOME_BASES)
@pytest.mark.parametrize("method", SOME_METHODS)
def test_the_state_of_a_finished_step_has_no_backup(backend, method, base):
    params, optimizer = make_scripted(method, base, backend)
    scripted_steps(optimizer, params, [random_gradients(params, k) for k in range(4)])
    state = optimizer.state_dict()["state"]
    assert set(state) == set(range(len(params)))
    for entry in state.values():
        assert set(entry) == ALLOWED_KEYS[method] | BASE_KEYS[base]


# ---- NaN and infinity ----------------------------------------------------------------------------

BAD_PASSES = {"first pass": [0], "second pass": [1], "both passes": [0, 1]}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize("bad", BAD_PASSES)
@pytest.mark.parametrize("base", SOME_BASES)
@pytest.mark.parametrize("method", SOME_METHODS)
def test_an_overflow_skips_the_step_and_training_goes_on(backend, method, base, bad, steps_before, value):
    runs = []
    for overflows in (True, False):
        params, optimizer = make_scripted(method, base, backend)
        good = [random_gradients(params, 20 * k) for k in range(2 * steps_before + 4)]
        scripted_steps(optimizer, params, good[: 2 * steps_before])
        if overflows:
            before = everything(optimizer, params)
            passes = [random_gradients(params, 500 + k) for k in range(2)]
            for k in BAD_PASSES[bad]:
                passes[k][3][17] = value
            scripted_steps(optimizer, params, passes)
            assert everything(optimizer, params) == before
            assert isinstance(optimizer.found_inf, torch.Tensor) and optimizer.found_inf.shape == ()
            assert optimizer.found_inf == 1
            optimizer.state_dict()
        scripted_steps(optimizer, params, good[2 * steps_before :])
        assert optimizer.found_inf == 0
        runs.append(everything(optimizer, params))
    assert runs[0] == runs[1], "a skipped step must leave no trace in the steps after it"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("place", [0, 1, 70_000, 99_999])
def test_an_overflow_is_found_wherever_it_is(backend, dtype, place):
    params, optimizer = make_scripted("SAM", "SGD momentum", backend, dtype, shapes=((3,), (100_000,), (5,)))
    start = bits(params)
    for bad_pass in (0, 1):
        passes = [random_gradients(params, k) for k in range(2)]
        passes[bad_pass][1][place] = float("inf")
        scripted_steps(optimizer, params, passes)
        assert optimizer.found_inf == 1
        assert bits(params) == start


def test_an_overflow_in_an_unperturbed_group_is_found_where_its_gradient_is_used(backend):
    """The first pass does not look at such a group's gradient, so only the second can be spoilt by it."""
    params = [torch.nn.Parameter(noise((9,), i)) for i in range(2)]
    groups = [{"params": params[:1]}, {"params": params[1:], "perturb": False}]
    optimizer = fastsam.SAM(groups, torch.optim.SGD, lr=0.1, momentum=0.9, backend=backend)
    start = bits(params)
    passes = [random_gradients(params, k) for k in range(2)]
    passes[1][1][3] = float("nan")
    scripted_steps(optimizer, params, passes)
    assert optimizer.found_inf == 1
    assert bits(params) == start


@pytest.mark.parametrize(
    ("dtype", "size"),
    [(torch.float64, 1e150), (torch.float32, 1e15), (torch.bfloat16, 1e15), (torch.float16, 1e4)],
    ids=str,
)
def test_large_finite_gradients_are_not_an_overflow(backend, dtype, size):
    """In float16 the squares of these gradients overflow, the gradients themselves do not."""
    params, optimizer = make_scripted("SAM", "SGD", backend, dtype, rho=1.0, lr=0.0)
    gradients = [(g.clamp(-3, 3) * size).to(dtype) for g in random_gradients(params, 0)]
    start = copies(params)
    perturbed = scripted_steps(optimizer, params, [gradients, gradients])[0]
    assert optimizer.found_inf == 0
    moved = torch.cat([(a.double() - b.double()).flatten() for a, b in zip(perturbed, start, strict=True)])
    assert moved.norm().item() == pytest.approx(1.0, rel=0.02)
