"""Curvature of the whole batch's loss, on shards and on replicas."""

import functools

import pytest
import rank_curvature as cases
import torch
from rank_training import Training

SPREADS = [("DDP", 2), ("FSDP2", 4), ("FSDP2 x TP", 4)]


@functools.cache
def dense():
    """Eigenvalues (ascending) and eigenvectors of the whole Hessian, on one process."""
    training = Training()
    params = dict(training.model.named_parameters())
    shapes, sizes = [p.shape for p in params.values()], [p.numel() for p in params.values()]

    def loss(flat):
        parts = {n: x.view(s) for n, x, s in zip(params, flat.split(sizes), shapes, strict=True)}
        logits = torch.func.functional_call(training.model, parts, training.inputs[0])
        return torch.nn.functional.cross_entropy(logits, training.targets[0])

    flat = torch.cat([p.detach().reshape(-1) for p in params.values()])
    return torch.linalg.eigh(torch.autograd.functional.hessian(loss, flat))


def cosine(a, b):
    return float(abs(a @ b) / (a.norm() * b.norm()))


@pytest.mark.parametrize(("how", "n"), SPREADS)
@pytest.mark.parametrize("solver", ["lanczos", "power"])
def test_eigenpairs_are_those_of_the_whole_hessian(ranks, how, n, solver):
    values, vectors = dense()
    expected = [values.abs().argmax()] if solver == "power" else [-1, -2, 0, 1]
    for eigenvalues, residuals, found, _ in ranks(n, cases.eigenpairs, how, solver, "auto"):
        assert float(residuals.max()) <= 1e-4
        for eigenvalue, v, i in zip(eigenvalues, found, expected, strict=True):
            assert abs(float(eigenvalue - values[i])) <= 1e-4 * float(values.abs().max())
            assert cosine(v, vectors[:, i]) >= 0.9999
            assert abs(float(v.norm()) - 1) <= 1e-4


@pytest.mark.parametrize(("how", "n"), SPREADS)
def test_weights_are_put_back_bit_for_bit(ranks, how, n):
    before = Training().weights()
    for *_, weights in ranks(n, cases.eigenpairs, how, "power", "finite-difference"):
        assert torch.equal(weights, before)


@pytest.mark.parametrize(("how", "n"), [("DDP", 2), ("FSDP2", 2)])
def test_the_trace_counts_every_weight_once(ranks, how, n):
    values, _ = dense()
    spread = float(2 * values.square().sum()) ** 0.5  # bounds a sample's standard deviation
    for found in ranks(n, cases.trace, how):
        assert abs(found - float(values.sum())) <= 4 * spread / 200**0.5


def test_replicas_estimate_the_exact_vector_of_the_whole_batch(ranks):
    weights, v, _ = cases.own_eigenvector("one", 10)
    for found, found_v, said in ranks(2, cases.own_eigenvector, "DDP", 10):
        torch.testing.assert_close(found, weights, rtol=0, atol=1e-10)
        torch.testing.assert_close(found_v, v, rtol=0, atol=1e-10)
        assert not any("finite differences" in text for text in said)


def test_shards_estimate_the_vector_of_the_whole_batch_by_differences_and_say_so_once(ranks):
    weights, v, _ = cases.own_eigenvector("one", 10)
    for found, found_v, said in ranks(4, cases.own_eigenvector, "FSDP2", 10):
        torch.testing.assert_close(found, weights, rtol=0, atol=1e-6)
        assert cosine(found_v, v) >= 1 - 1e-8
        assert sum("finite differences" in text for text in said) == 1
        assert not any("noise" in text for text in said)


@pytest.mark.parametrize(("how", "n"), [("DDP", 2), ("FSDP2", 2)])
def test_ranks_with_other_random_numbers_get_one_vector(ranks, how, n):
    (first, weights), *others = ranks(n, cases.first_estimates_agree, how)
    for v, w in others:
        assert torch.equal(v, first) and torch.equal(w, weights)


def test_a_monitor_on_shards_measures_what_one_process_does(ranks, tmp_path):
    values, vectors = dense()
    for row in ranks(2, cases.monitored, "FSDP2", str(tmp_path / "curvature")):
        assert abs(row["top_eigenvalue"] - float(values[-1])) <= 1e-2 * float(values[-1])
        training = Training()
        training.closure()
        g = torch.cat([p.grad.reshape(-1) for p in training.model.parameters()])
        assert abs(row["gradient_norm"] - float(g.norm())) <= 1e-8
        assert abs(row["perturbation_norm"] - 0.05) <= 1e-8
        assert abs(row["gradient_alignment"] - cosine(g, vectors[:, -1])) <= 0.02
