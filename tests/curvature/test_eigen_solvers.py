"""Power iteration and Lanczos against dense eigendecompositions, on matrices and on the Hessians of networks."""

import functools
import math

import pytest
import torch
from reference import convnet, mlp
from torch.func import functional_call

from fastsam.curvature import Hessian, lanczos, power_iteration, top_eigenpairs
from fastsam.curvature.solvers import Krylov


def symmetric(eigenvalues, seed=0):
    """A dense matrix with these eigenvalues, in float64, and its eigenvectors as rows."""
    values = torch.as_tensor(eigenvalues, dtype=torch.float64)
    noise = torch.randn(len(values), len(values), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    q = torch.linalg.qr(noise).Q
    return q @ torch.diag(values) @ q.T, q.T


def noise(n, seed=1):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@functools.cache
def dense_eigenpairs(make):
    return torch.linalg.eigh(dense_hessian(make()))


def dense_hessian(problem):
    """The full Hessian, in the order of the parameters."""
    shapes = {name: p.shape for name, p in problem.model.named_parameters()}
    buffers = dict(problem.model.named_buffers())

    def loss(flat):
        parts = flat.split([s.numel() for s in shapes.values()])
        params = {name: part.view(s) for part, (name, s) in zip(parts, shapes.items(), strict=True)}
        out = functional_call(problem.model, {**params, **buffers}, (problem.inputs[problem.batch],))
        return torch.nn.functional.cross_entropy(out, problem.targets[problem.batch])

    return torch.autograd.functional.hessian(loss, problem.weights())


def deep(dtype=torch.float64):
    """About 2,700 weights, and a spectrum with negative eigenvalues."""
    problem = mlp(dtype)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        problem.model = torch.nn.Sequential(
            torch.nn.Linear(8, 40), torch.nn.Tanh(), torch.nn.Linear(40, 40), torch.nn.GELU(),
            torch.nn.Linear(40, 16), torch.nn.Softplus(), torch.nn.Linear(16, 4),
        ).to(dtype)  # fmt: skip
    return problem


def convnet_in_eval_mode():
    problem = convnet()
    problem.model.eval()
    return problem


@pytest.mark.parametrize("method", ["exact", "finite-difference"])
@pytest.mark.parametrize("make", [mlp, convnet_in_eval_mode, deep], ids=["mlp", "convnet", "deep"])
def test_lanczos_finds_what_dense_eigh_finds_at_both_ends(make, method):
    problem = make()
    assert sum(p.numel() for p in problem.params()) <= 3000
    values, vectors = dense_eigenpairs(make)
    pairs = top_eigenpairs(problem.loss, problem.model, 5, which="both", products=400, tolerance=1e-7, method=method)
    expected = torch.cat([values.flip(0)[:5], values[:5]])
    torch.testing.assert_close(pairs.eigenvalues, expected, rtol=1e-4, atol=1e-4 * float(values.abs().max()))
    rows = torch.cat([vectors.T.flip(0)[:5], vectors.T[:5]])
    for i, (v, value) in enumerate(zip(pairs.vectors, expected, strict=True)):
        flat = torch.cat([x.reshape(-1) for x in v])
        assert abs(flat.norm() - 1) < 1e-6
        gap = (values - value).abs().sort().values[1] / values.abs().max()
        if gap > 1e-3:  # a vector beside an equal eigenvalue is not determined
            assert abs(flat @ rows[i]) > 1 - 1e-4


@pytest.mark.parametrize("which", ["largest", "smallest", "both", "magnitude"])
def test_each_end_is_found_in_its_order(which):
    eigenvalues = [*torch.linspace(-1, 1, 40).tolist(), 9.0, 7.0, 5.0, -8.0, -6.0]
    matrix, _ = symmetric(eigenvalues)
    pairs = lanczos(lambda x: matrix @ x, noise(45), 3 if which != "both" else 2, which, tolerance=1e-8)
    expected = {
        "largest": [9.0, 7.0, 5.0],
        "smallest": [-8.0, -6.0, -1.0],
        "both": [9.0, 7.0, -8.0, -6.0],
        "magnitude": [9.0, -8.0, 7.0],
    }[which]
    torch.testing.assert_close(pairs.eigenvalues, torch.tensor(expected, dtype=torch.float64), rtol=1e-8, atol=0)
    assert pairs.converged and pairs.products <= 45


@pytest.mark.parametrize("solver", [power_iteration, lanczos])
def test_reported_residuals_are_those_of_the_pairs(solver):
    matrix, _ = symmetric([10.0, 8.0, *range(7)])
    pairs = solver(lambda x: matrix @ x, noise(9), products=6, tolerance=None)
    before = solver(lambda x: matrix @ x, noise(9), products=5, tolerance=None).vectors[0]
    v = pairs.vectors[0] if solver is lanczos else before  # power iteration measures before its last step
    value = float(pairs.eigenvalues[0])
    assert value == pytest.approx(float(v @ matrix @ v), rel=1e-10)
    assert float(pairs.residuals[0]) == pytest.approx(float((matrix @ v - value * v).norm() / abs(value)), rel=1e-6)
    assert 1e-4 < pairs.residuals[0] < 1 and not pairs.converged and pairs.products in (5, 6)


def test_the_vectors_stay_orthonormal_long_after_pairs_have_converged():
    matrix, _ = symmetric([1000.0, 500.0, *torch.linspace(0, 1, 198).tolist()])
    matrix = matrix.float()
    space = Krylov(lambda x: matrix @ x, noise(200).float(), 100)
    for _ in range(100):
        space.extend()
    gram = space.vectors.double() @ space.vectors.double().T
    assert (gram - torch.eye(100, dtype=torch.float64)).abs().max() < 1e-5
    values, _ = space.ritz()
    assert (values > 400).sum() == 2, "copies of converged eigenvalues"


def test_restarts_bound_the_basis_and_reach_the_same_pairs():
    matrix, _ = symmetric(torch.linspace(-3, 3, 300))
    longest = []

    def product(x):
        longest.append(x)
        return matrix @ x

    pairs = lanczos(product, noise(300), 3, "both", products=3000, tolerance=1e-6, basis=16)
    expected = torch.linalg.eigvalsh(matrix)
    expected = torch.cat([expected.flip(0)[:3], expected[:3]])
    torch.testing.assert_close(pairs.eigenvalues, expected, rtol=1e-6, atol=0)
    assert pairs.converged and pairs.products == len(longest) > 32


def test_a_warm_start_needs_fewer_products():
    matrix, rows = symmetric([5.0, *torch.linspace(-4, 4, 200).tolist()])
    cold = lanczos(lambda x: matrix @ x, noise(201), tolerance=1e-3)
    warm = lanczos(lambda x: matrix @ x, rows[0] + 1e-3 * noise(201), tolerance=1e-3)
    assert cold.converged and warm.converged and warm.products < cold.products / 2


def test_lanczos_needs_at_most_half_the_products_of_power_iteration():
    matrix, _ = symmetric([*torch.linspace(0, 10, 400).tolist(), 11.0])
    power = power_iteration(lambda x: matrix @ x, noise(401), products=2000, tolerance=1e-2)
    krylov = lanczos(lambda x: matrix @ x, noise(401), tolerance=1e-2)
    assert power.converged and krylov.converged and krylov.products <= power.products / 2


def test_power_iteration_follows_the_largest_magnitude_and_lanczos_the_largest_value():
    matrix, _ = symmetric([-9.0, 4.0, 1.0, 0.5, 0.1])
    power = power_iteration(lambda x: matrix @ x, noise(5), tolerance=1e-6)
    assert float(power.eigenvalues[0]) == pytest.approx(-9.0, rel=1e-6)
    assert float(lanczos(lambda x: matrix @ x, noise(5), tolerance=1e-6).eigenvalues[0]) == pytest.approx(4.0, rel=1e-6)


def test_equal_eigenvalues_are_all_found():
    pairs = lanczos(lambda x: 2 * x, noise(20), 4, tolerance=1e-6)
    assert pairs.eigenvalues.tolist() == pytest.approx([2.0] * 4)
    gram = pairs.vectors @ pairs.vectors.T
    torch.testing.assert_close(gram, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-10)


@pytest.mark.parametrize("solver", ["power", "lanczos"])
def test_a_linear_loss_has_eigenvalue_zero_with_residual_zero(solver):
    w = torch.nn.Parameter(torch.randn(30))
    for method in ("exact", "finite-difference"):
        pairs = top_eigenpairs(lambda: (3 * w).sum(), [w], which="magnitude", solver=solver, method=method)
        assert pairs.eigenvalues.tolist() == [0.0] and pairs.residuals.tolist() == [0.0] and pairs.converged


@pytest.mark.parametrize("solver", [power_iteration, lanczos])
def test_a_product_that_is_not_finite_is_an_error(solver):
    with pytest.raises(FloatingPointError, match="not finite"):
        solver(lambda x: x * math.nan, noise(4))


@pytest.mark.parametrize(
    "arguments",
    [
        {"k": 0}, {"k": 11}, {"which": "top"}, {"products": 0}, {"k": 3, "products": 2}, {"tolerance": 0.0},
        {"tolerance": math.nan}, {"k": 3, "basis": 4},
    ],
    ids=str,
)  # fmt: skip
def test_arguments_out_of_range_are_refused_before_any_product(arguments):
    with pytest.raises(ValueError, match="|".join(arguments)):
        lanczos(lambda x: pytest.fail("a product was made"), noise(10), **arguments)


def test_power_iteration_is_refused_for_more_than_it_can_find():
    problem = mlp()
    for arguments in ({"k": 2, "which": "magnitude"}, {"which": "largest"}):
        with pytest.raises(ValueError, match="lanczos"):
            top_eigenpairs(problem.loss, problem.model, solver="power", **arguments)
    with pytest.raises(ValueError, match="solver"):
        top_eigenpairs(problem.loss, problem.model, solver="qr")


@pytest.mark.parametrize("start", [torch.zeros(5), torch.full((5,), math.inf)])
def test_lanczos_refuses_a_start_without_a_direction(start):
    with pytest.raises(ValueError, match="start vector"):
        lanczos(lambda x: x, start)


def test_a_start_of_the_wrong_shape_is_refused():
    problem = mlp()
    with pytest.raises(ValueError, match=r"vector\[0\]"):
        top_eigenpairs(problem.loss, problem.model, start=[torch.zeros(3)] * len(problem.params()))
    with Hessian(problem.loss, problem.model) as hessian, pytest.raises(ValueError, match="one flat vector"):
        lanczos(hessian.product, torch.zeros(3, 3))
