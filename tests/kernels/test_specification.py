"""Every backend does what the `torch` backend does, within the rounding of the weights' dtype."""

import itertools

import pytest
import torch
from conftest import require_backend
from reference import METHODS, SOME_METHODS, build_optimizer, build_reference, mlp, second_side
from reference.scripted import (
    assert_same_rounding,
    bits,
    copies,
    like,
    noise,
    random_gradients,
    scripted_steps,
)

import fastsam
from fastsam import kernels

FAST_BACKENDS = ["cpu"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SOME_BASES = ["SGD momentum", "AdamW"]
FUSED = [*SOME_BASES, "SGD", "SGD nesterov", "SGD dampening", "SGD maximize", "Adam", "AdamW maximize"]


def dense(*shapes):
    return lambda dtype: [noise(shape, 100 + i, dtype) for i, shape in enumerate(shapes)]


def permuted_layouts(dtype):
    return [
        noise((4, 3, 5, 5), 1, dtype).to(memory_format=torch.channels_last),
        noise((33, 17), 2, dtype).t(),
        noise((3, 4, 5), 3, dtype).permute(2, 0, 1),
        noise((2, 3, 4, 3, 2), 4, dtype).to(memory_format=torch.channels_last_3d),
    ]


def slices_of_one_buffer(dtype):
    """Neighbours in memory, as after flattening, and one that starts off any vector boundary."""
    buffer = noise((3000,), 5, dtype)
    return [buffer[:1000].view(10, 100), buffer[1000:1007], buffer[1007:2500], buffer[2601:2999]]


TENSORS = {
    "odd sizes": dense((1,), (3,), (17,), (1023,), (5, 7), (4097,), (65537,)),
    "empty, 0-dim, one element": dense((0,), (), (3, 0, 2), (1,), (1, 1, 1), ()),
    "only empty": dense((0,), (2, 0)),
    "many small": dense(*[(1 + i % 9,) for i in range(300)]),
    "permuted layouts": permuted_layouts,
    "slices of one buffer": slices_of_one_buffer,
}


def parameters(make_tensors, dtype):
    return [torch.nn.Parameter(t) for t in make_tensors(dtype)]


def give_eigenvector(optimizer, method, params):
    if METHODS[method].eigenvector == "given":
        optimizer.eigenvector = [like(p.detach(), 900 + i) * 0.02 for i, p in enumerate(params)]
    return optimizer


def compare(
    backend, method, base, dtype, make_tensors, edit=lambda gradients: gradients, groups=lambda p: p, **options
):
    """Run three scripted steps on a backend and on the specification, and hold one against the other."""
    records = []
    for name in (backend, "torch"):
        params = parameters(make_tensors, dtype)
        optimizer = build_optimizer(method, base, groups(params), name, **options)
        give_eigenvector(optimizer, method, params)
        passes = edit([random_gradients(params, 1000 * k) for k in range(6)])
        records.append(scripted_steps(optimizer, params, passes))
    assert_same_rounding(*records, dtype)
    return records[0]


@pytest.fixture(params=FAST_BACKENDS)
def fast(request):
    return require_backend(request.param)


@pytest.mark.parametrize("tensors", TENSORS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("base", SOME_BASES)
@pytest.mark.parametrize("method", SOME_METHODS)
def test_backend_equals_the_specification(fast, method, base, dtype, tensors):
    compare(fast, method, base, dtype, TENSORS[tensors])


@pytest.mark.parametrize("tensors", TENSORS)
@pytest.mark.parametrize("base", SOME_BASES)
@pytest.mark.parametrize("method", SOME_METHODS[2:])
def test_backend_equals_the_specification_with_vectors_in_bfloat16(fast, method, base, tensors):
    compare(fast, method, base, torch.float32, TENSORS[tensors], groups=several_or_one, state_dtype=torch.bfloat16)


def several_or_one(params):
    return several_groups(params) if len(params) > 3 else params


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "base", ["SGD", "SGD nesterov", "SGD dampening", "SGD maximize", "AdamW maximize", "Adam", "RMSprop"]
)
def test_backend_equals_the_specification_for_every_base(fast, base, dtype):
    compare(fast, "F-SAM sigma=1.0 lmbda=0.9", base, dtype, TENSORS["odd sizes"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("base", SOME_BASES)
@pytest.mark.parametrize("method", SOME_METHODS)
def test_steps_are_near_the_authors_loop_in_float64(backend, method, base, dtype):
    """The weights are rounded once for every time they are written, not once for every operation."""
    low = parameters(TENSORS["odd sizes"], dtype)
    high = [torch.nn.Parameter(p.detach().to(torch.float64, copy=True)) for p in low]
    # away from zero, where float16 cannot hold Adam's mean of squares
    passes = [[g + g.sign() / 2 for g in random_gradients(low, 1000 * k)] for k in range(4)]
    optimizer = give_eigenvector(build_optimizer(method, base, low, backend), method, low)
    reference = build_reference(method, base, high)
    if METHODS[method].eigenvector:
        reference.eigenvector = [v.double() for v in optimizer.eigenvector]
    actual = scripted_steps(optimizer, low, passes)
    expected = scripted_steps(reference, high, [[g.double() for g in p] for p in passes])
    assert_same_rounding(actual, expected, dtype, slack=16 if dtype == torch.float64 else 2)


def drop(gradients, which):
    """Take parameter 1's gradient away in the passes that `which` names, and parameter 3's everywhere."""
    return [
        [None if i == 3 or (i == 1 and (k % 2 == 0) in which) else g for i, g in enumerate(one_pass)]
        for k, one_pass in enumerate(gradients)
    ]


@pytest.mark.parametrize("which", [{True}, {False}, {True, False}], ids=["first pass", "second pass", "both passes"])
@pytest.mark.parametrize("base", [*SOME_BASES, "RMSprop"])
@pytest.mark.parametrize("method", SOME_METHODS)
def test_missing_gradients(method, base, which, backend):
    make = dense((5, 3), (7,), (), (4, 4), (130,))
    records = compare(backend, method, base, torch.float64, make, edit=lambda passes: drop(passes, which))
    params = parameters(make, torch.float64)
    start, perturbed, updated = copies(params), records[0], records[1]
    assert torch.equal(perturbed[3], start[3]) and torch.equal(updated[3], start[3])
    assert torch.equal(perturbed[1], start[1]) == (True in which)
    assert torch.equal(updated[1], start[1]) == (False in which)
    optimizer = give_eigenvector(build_reference(method, base, params), method, params)
    passes = drop([random_gradients(params, 1000 * k) for k in range(6)], which)
    assert_same_rounding(records, scripted_steps(optimizer, params, passes), torch.float64, slack=16)


def test_a_step_without_any_gradient_changes_nothing_and_says_so(backend):
    params = parameters(TENSORS["odd sizes"], torch.float32)
    optimizer = build_optimizer("F-SAM sigma=1.0 lmbda=0.9", "SGD momentum", params, backend)
    start, nothing = bits(params), [None] * len(params)
    with pytest.warns(RuntimeWarning, match="no parameter has a gradient") as warned:
        records = scripted_steps(optimizer, params, [nothing, nothing])
    assert len(warned) == 2 and [bits(record) for record in records] == [start, start]


def several_groups(params):
    return [
        {"params": params[:2], "rho": 0.3, "lr": 0.01, "momentum": 0.0},
        {"params": params[2:3], "perturb": False},
        {
            "params": params[3:],
            "weight_decay": 0.1,
            "adaptive": True,
            "sigma": 0.2,
            "lmbda": 0.5,
            "alpha": 0.9,
        },
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", SOME_METHODS)
def test_several_groups(fast, method, dtype):
    compare(fast, method, "SGD momentum", dtype, TENSORS["odd sizes"], groups=several_groups)


def test_weights_of_several_dtypes_share_one_norm(backend):
    params = [torch.nn.Parameter(noise((50,), i, dtype)) for i, dtype in enumerate(DTYPES)]
    start, gradients = copies(params), random_gradients(params, 10)
    optimizer = fastsam.SAM(params, torch.optim.SGD, lr=0.1, rho=0.5, backend=backend)
    perturbed = scripted_steps(optimizer, params, [gradients, gradients])[0]
    norm = torch.cat([g.double() for g in gradients]).norm()
    for after, before, gradient in zip(perturbed, start, gradients, strict=True):
        exact = before.double() + 0.5 * gradient.double() / norm
        torch.testing.assert_close(after.double(), exact, rtol=torch.finfo(after.dtype).eps, atol=1e-7)


OTHER_STRIDES = {
    "transposed": lambda g: g.t().contiguous().t(),
    "every second column of a wider one": lambda g: torch.stack([g, -g], dim=-1).flatten(-2)[..., ::2],
    "one value expanded": lambda g: g[:1, :1].expand(g.shape),
}


@pytest.mark.parametrize("strides", OTHER_STRIDES)
@pytest.mark.parametrize("method", SOME_METHODS)
@pytest.mark.parametrize("base", [*SOME_BASES, "RMSprop"])
def test_a_gradient_with_other_strides_than_its_weight(backend, base, method, strides):
    weights = [noise((6, 9), 1), noise((8, 8), 2).t()]
    passes = [[OTHER_STRIDES[strides](noise(w.shape, k + i)) for i, w in enumerate(weights)] for k in range(6)]
    records = []
    for gradients in (passes, [[like_layout(g, w) for g, w in zip(p, weights, strict=True)] for p in passes]):
        params = [torch.nn.Parameter(w.clone()) for w in weights]
        optimizer = give_eigenvector(build_optimizer(method, base, params, backend), method, params)
        seen = []
        for first, second in zip(gradients[::2], gradients[1::2], strict=True):
            for one_pass, step in ((first, optimizer.first_step), (second, optimizer.second_step)):
                for p, g in zip(params, one_pass, strict=True):
                    p.grad = g
                step()
                seen.append(copies(params))
        records.append(seen)
    assert_same_rounding(*records, torch.float64)


def like_layout(gradient, weight):
    return torch.empty_like(weight).copy_(gradient)


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(11, 6)
        self.head = torch.nn.Linear(6, 11)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.embedding(tokens))


@pytest.mark.parametrize("method", SOME_METHODS)
def test_tied_parameters_are_taken_once(backend, method):
    ends = []
    for build, extra in ((build_optimizer, (backend,)), (build_reference, ())):
        torch.manual_seed(0)
        model = Tied().double()
        params = list(model.parameters())
        optimizer = give_eigenvector(build(method, "SGD momentum", params, *extra), method, params)
        tokens = torch.arange(11)
        for _ in range(10):
            for step in (optimizer.first_step, optimizer.second_step):
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(model(tokens), tokens.flip(0)).backward()
                step()
        assert model.head.weight is model.embedding.weight
        ends.append(copies(params))
    assert_same_rounding(ends[:1], ends[1:], torch.float64, slack=100)


@pytest.mark.parametrize("method", SOME_METHODS[:3])
@pytest.mark.parametrize("base", [*SOME_BASES, "RMSprop"])
def test_a_group_added_later_joins_in(backend, base, method):
    records = []
    for build, extra in ((build_optimizer, (backend,)), (build_reference, ())):
        params = parameters(dense((4, 3), (9,), (5,)), torch.float64)
        optimizer = build(method, base, params[:1], *extra)
        passes = [random_gradients(params, 50 * k) for k in range(8)]
        seen = scripted_steps(optimizer, params[:1], [p[:1] for p in passes[:4]])
        target = optimizer if extra else optimizer.base_optimizer
        target.add_param_group({"params": params[1:], "rho": 0.2})
        assert optimizer.param_groups is optimizer.base_optimizer.param_groups
        seen += scripted_steps(optimizer, params, passes[4:])
        records.append(seen)
    assert_same_rounding(*records, torch.float64, slack=16)


@pytest.mark.parametrize("base", ["SGD momentum", "AdamW", "RMSprop"])
@pytest.mark.parametrize("method", SOME_METHODS)
def test_parameters_are_frozen_and_unfrozen_between_steps(backend, base, method):
    trained_at = [[1, 2], [1, 2], [0, 1, 2], [0, 2], [0, 1, 2], [2]]  # of every three parameters, by step
    ends = []
    for build, extra in ((build_optimizer, (backend,)), (build_reference, ())):
        problem = mlp()
        params = problem.params()
        optimizer = build(method, base, params, *extra)
        for k, trained in enumerate(trained_at):
            for i, p in enumerate(params):
                p.requires_grad_(i % 3 in trained)
            if k == 0 and "Eigen-SAM" in method:
                optimizer.eigenvector = [like(p.detach(), i) * 0.02 * p.requires_grad for i, p in enumerate(params)]
            for step in (optimizer.first_step, optimizer.second_step):
                for p in params:
                    p.grad = None
                problem.closure()
                step()
        ends.append(copies(params))
    assert_same_rounding(ends[:1], ends[1:], torch.float64, slack=100)


def test_a_parameter_unfrozen_between_the_passes_is_an_error_and_the_weights_are_back(backend):
    problem = mlp()
    first, *_ = problem.params()
    first.requires_grad_(False)
    start = problem.weights()
    optimizer = build_optimizer("SAM", "SGD", problem.params(), backend)
    problem.closure()
    optimizer.first_step()
    first.requires_grad_(True)
    problem.closure()
    with pytest.raises(RuntimeError, match="frozen in the first pass"):
        optimizer.second_step()
    assert torch.equal(problem.weights(), start)


@pytest.mark.parametrize("method", ["SAM", "F-SAM sigma=1.0 lmbda=0.9"])
def test_flatten_parameters_changes_nothing_but_the_memory(backend, method):
    plain, flat = mlp(), mlp()
    fastsam.flatten_parameters(flat.model)
    addresses = sorted((p.data_ptr(), p.nbytes) for p in flat.params())
    assert all(a + size == b for (a, size), (b, _) in itertools.pairwise(addresses))
    assert torch.equal(plain.weights(), flat.weights())
    for problem in (plain, flat):
        optimizer = build_optimizer(method, "SGD momentum", problem.params(), backend)
        for _ in range(20):
            for step in (optimizer.first_step, optimizer.second_step):
                optimizer.zero_grad(set_to_none=False)
                problem.closure()
                step()
    assert addresses == sorted((p.data_ptr(), p.nbytes) for p in flat.params())
    torch.testing.assert_close(flat.weights(), plain.weights(), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("method", SOME_METHODS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_zero_gradient_perturbs_nothing(backend, method, dtype):
    params = parameters(TENSORS["odd sizes"], dtype)
    start = copies(params)
    optimizer = give_eigenvector(build_optimizer(method, "SGD", params, backend), method, params)
    zeros = [torch.zeros_like(p) for p in params]
    for record in scripted_steps(optimizer, params, [zeros, zeros, zeros, zeros]):
        assert all(torch.equal(a, b) for a, b in zip(record, start, strict=True))


# ---- the second side: a descent with a mixture of the second gradient and a stored vector -----------------------


@pytest.mark.parametrize("mixture", second_side.MIXTURES)
@pytest.mark.parametrize("base", FUSED)
def test_the_second_side_follows_its_formulas(backend, base, mixture):
    records = []
    for side, which in ((second_side.SecondSide, (backend,)), (second_side.PlainSecondSide, ())):
        params = parameters(dense((5, 3), (7,), (), (4, 4), (130,)), torch.float64)
        passes = drop([random_gradients(params, 1000 * k) for k in range(6)], {False})
        options = dict(groups=second_side.several_groups, grad_scale=0.5, clip_value=0.4)
        records.append(second_side.steps_of(side(*which, base, mixture, params, **options), passes))
    assert_same_rounding(*records, torch.float64, slack=16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("base", SOME_BASES)
def test_the_second_side_is_near_its_formulas_in_every_dtype(backend, base, dtype):
    low = parameters(TENSORS["odd sizes"], dtype)
    high = [torch.nn.Parameter(p.detach().to(torch.float64, copy=True)) for p in low]
    # away from zero, where float16 cannot hold Adam's mean of squares
    passes = [[g + g.sign() / 2 for g in random_gradients(low, 1000 * k)] for k in range(4)]
    actual = second_side.steps_of(second_side.SecondSide(backend, base, "everything", low), passes)
    expected = second_side.steps_of(second_side.PlainSecondSide(base, "everything", high), passes)
    assert_same_rounding(actual, expected, dtype, slack=16 if dtype == torch.float64 else 2)


@pytest.mark.parametrize("flattened", [False, True], ids=["", "flattened"])
@pytest.mark.parametrize("tensors", TENSORS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("base", SOME_BASES)
def test_second_side_equals_the_specification(fast, base, dtype, tensors, flattened):
    second_side.compare(fast, base, "everything", dtype, TENSORS[tensors], flattened=flattened)


@pytest.mark.parametrize("flattened", [False, True], ids=["", "flattened"])
@pytest.mark.parametrize("tensors", TENSORS)
@pytest.mark.parametrize("base", SOME_BASES)
def test_second_side_equals_the_specification_with_s_in_bfloat16(fast, base, tensors, flattened):
    options = dict(flattened=flattened, state_dtype=torch.bfloat16)
    second_side.compare(fast, base, "everything", torch.float32, TENSORS[tensors], **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mixture", second_side.MIXTURES)
@pytest.mark.parametrize("base", FUSED)
def test_second_side_equals_the_specification_for_every_base_and_mixture(fast, base, mixture, dtype):
    options = dict(groups=second_side.several_groups, grad_scale=0.5)
    if dtype != torch.float16:  # cannot hold Adam's mean of smaller squares
        options["clip_value"] = 0.4
    second_side.compare(fast, base, mixture, dtype, dense((1,), (17,), (1023,), (5, 7), (4097,)), **options)


@pytest.mark.parametrize("base", SOME_BASES)
def test_without_a_stored_vector_there_are_the_gradients_coefficients(backend, base, monkeypatch):
    def of_both(sums, group):
        return kernels.Mixture(1 / sums[0] ** 0.5, 7.0, 0.01, 7.0, 2.0, 7.0)

    monkeypatch.setitem(second_side.MIXTURES, "own", (of_both, True))
    params = parameters(TENSORS["odd sizes"], torch.float32)
    passes = [random_gradients(params, 1000 * k) for k in range(2)]
    kept = second_side.compare(backend, base, "own", torch.float32, TENSORS["odd sizes"], steps=1, stored=False)[-1]
    assert bits(kept[len(params) : 2 * len(params)]) == bits([2 * g for g in passes[1]])


@pytest.mark.parametrize("gradients", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_second_side_with_gradients_of_another_dtype(fast, weights, gradients):
    if not hasattr(torch.Tensor, "grad_dtype"):
        pytest.skip("this torch gives no parameter a gradient of another dtype")

    def edit(passes):
        return [[g.to(gradients) if i % 2 else g for i, g in enumerate(p)] for p in passes]

    second_side.compare(fast, "SGD nesterov", "everything", weights, dense((5,), (3000,), (130,)), edit=edit)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", [0, 1, "s"], ids=["first gradient", "second gradient", "s"])
@pytest.mark.parametrize("base", SOME_BASES)
def test_a_second_side_that_overflows_writes_nothing(backend, base, where, bad):
    before, after = second_side.spoiled(backend, base, where, bad)
    assert before == after


def test_without_direct_coefficients_and_learning_rate_no_bit_changes(backend):
    before, after = second_side.without_a_step(backend)
    assert before == after


def test_the_direct_part_does_not_ask_for_the_learning_rate(backend, monkeypatch):
    params = parameters(dense((65,)), torch.float64)
    [start], [g], [s] = copies(params), random_gradients(params, 1), random_gradients(params, 2)
    monkeypatch.setitem(second_side.MIXTURES, "own", (lambda *_: kernels.Mixture(1.0, 0.0, 0.25, -0.5), False))
    side = second_side.SecondSide(backend, "AdamW", "own", params, groups=lambda _: [{"lr": 0.0}])
    second_side.steps_of(side, [[s], [g]])
    assert torch.equal(params[0].detach(), start - (g * 0.25 + s * -0.5))


def test_the_rules_step_and_the_direct_part_are_rounded_together(backend, monkeypatch):
    """Below 1 bfloat16 has steps of 2^-8: two of 0.0015 are one of these, and each alone is none."""
    monkeypatch.setitem(second_side.MIXTURES, "own", (lambda *_: kernels.Mixture(1.0, 0.0, 0.0015, 0.0), False))
    params = [torch.nn.Parameter(torch.ones(50, dtype=torch.bfloat16))]
    side = second_side.SecondSide(backend, "SGD", "own", params, groups=lambda _: [{"lr": 0.0015}])
    second_side.steps_of(side, [[torch.zeros(50, dtype=torch.bfloat16)], [torch.ones(50, dtype=torch.bfloat16)]])
    assert params[0].eq(1 - 2**-8).all()


def test_a_mixture_has_its_clipping_to_a_norm_in_its_coefficients(backend):
    ends = []
    for max_norm in (None, 1e-3):
        params = parameters(dense((65,)), torch.float64)
        side = second_side.SecondSide(backend, "SGD", "GSAM", params, max_norm=max_norm)
        ends.append(second_side.steps_of(side, [random_gradients(params, k) for k in range(2)])[-1])
    assert list(map(bits, ends[:1])) == list(map(bits, ends[1:]))
