"""The stochastic differential equations of benchmarks.papers.sde: their terms, and moments that are known exactly."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.papers.sde import discrete, euler_maruyama, expansion, moments, network_loss, sam_gradient


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def small_network():
    """Loss, four mini-batches of five images, a point."""
    torch.manual_seed(0)
    parameters, _, loss = network_loss(hidden=4, features=3, classes=3)
    images = torch.randn(4, 5, 3)
    one_hot = torch.nn.functional.one_hot(torch.randint(3, (4, 5)), 3).to(images)
    return loss, (images, one_hot), torch.randn(parameters)


def test_terms_are_the_derivatives_that_autograd_finds(double):
    loss, batches, x = small_network()
    first, second, third = expansion(loss, batches, x, order=2)
    for c in range(4):
        batch = tuple(b[c] for b in batches)
        w = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(loss(w, batch), w, create_graph=True)
        u = (g / g.norm()).detach()
        (hu,) = torch.autograd.grad(g @ u, w, create_graph=True)
        (tuu,) = torch.autograd.grad(hu @ u, w)
        torch.testing.assert_close(first[c], g.detach())
        torch.testing.assert_close(second[c], hu.detach())
        torch.testing.assert_close(third[c], tuu)


def test_the_second_term_is_the_gradient_of_the_gradient_norm(double):
    """What both papers write in the drift: H u = grad ||grad f||."""
    loss, batches, x = small_network()
    batch = tuple(b[0] for b in batches)
    w = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(loss(w, batch), w, create_graph=True)
    (norm_gradient,) = torch.autograd.grad(g.norm(), w)
    torch.testing.assert_close(expansion(loss, batches, x, order=1)[1][0], norm_gradient)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_error_of_mean_and_covariance_falls_with_the_order_in_rho(double, order):
    """Halving rho divides what an expansion of order k leaves out by 2^(k+1)."""
    loss, batches, x = small_network()
    errors = []
    for rho in (0.02, 0.01):
        exact = torch.stack([sam_gradient(loss, tuple(b[c] for b in batches), x, rho) for c in range(4)])
        mean, centred = moments(loss, batches, x, rho, order)
        of_mean = (exact.mean(0) - mean).norm()
        exact_centred = exact - exact.mean(0)
        of_covariance = (exact_centred.T @ exact_centred - centred.T @ centred).norm()
        errors.append((of_mean, of_covariance))
    for coarse, fine in zip(*errors, strict=True):
        assert math.log2(coarse / fine) == pytest.approx(order + 1, abs=0.1)


def shifted(x, batch):
    """f_c = (x - s_c)' A (x - s_c) / 2 with one matrix A for all batches."""
    a, s = batch
    return 0.5 * (x - s) @ a @ (x - s)


def test_on_a_quadratic_one_step_has_the_mean_and_covariance_of_a_step_of_sam(double):
    """Closed form: h_c = A (x - s_c) + rho A u_c. With dt = lr both SDEs have its moments over eta without error."""
    a = torch.tensor([[2.0, 0.3], [0.3, 0.5]])
    s = torch.tensor([[0.1, 0.2], [-0.3, 0.4], [0.5, -0.1]])
    x, lr, rho = torch.tensor([1.0, -2.0]), 0.05, 0.2
    g = (x - s) @ a
    h = g + rho * (g / g.norm(dim=1, keepdim=True)) @ a
    for order in (1, 2):
        mean, centred = moments(shifted, (a.expand(3, 2, 2), s), x, rho, order)
        torch.testing.assert_close(mean, h.mean(0))
        torch.testing.assert_close(centred.T @ centred / 3, torch.cov(h.T, correction=0))
        generator = torch.Generator().manual_seed(0)
        options = dict(lr=lr, rho=rho, order=order, dt=lr, generator=generator)
        paths = euler_maruyama(shifted, (a.expand(3, 2, 2), s), x.expand(20_000, 2), **options)
        torch.testing.assert_close(paths.mean(0), x - lr * h.mean(0), atol=1e-3, rtol=0)
        torch.testing.assert_close(torch.cov(paths.T), lr**2 * torch.cov(h.T, correction=0), atol=0, rtol=0.05)


def test_the_path_on_a_quadratic_has_the_moments_of_an_ornstein_uhlenbeck_process(double):
    """In one dimension, on one side of every minimum s_c, u_c = 1 and dX = -a (X - m + rho) dt + sqrt(eta) a s dW:

    E X(t) = m - rho + (x - m + rho) exp(-a t)       Var X(t) = eta a s^2 (1 - exp(-2 a t)) / 2
    """
    a, lr, rho, time = 0.5, 0.02, 0.3, 1.0
    s = torch.tensor([-0.2, 0.0, 0.4, 0.6])
    x, steps = torch.full((8_000, 1), 5.0), 50
    generator = torch.Generator().manual_seed(1)
    batches = (torch.full((4, 1, 1), a), s[:, None])
    for _ in range(steps):
        x = euler_maruyama(shifted, batches, x, lr=lr, rho=rho, order=2, dt=time / steps, generator=generator)
    m, variance = s.mean(), s.var(correction=0)
    decay = math.exp(-a * time)
    assert x.mean().item() == pytest.approx(
        (m - rho + (5 - m + rho) * decay).item(), abs=0.02
    )  # Euler's own error is a time^2 / steps = 0.01
    expected = lr * a * variance.item() / 2 * (1 - decay**2)
    assert x.var().item() == pytest.approx(expected, rel=0.07)


def cubic(x, batch):
    a, b = batch
    return (a * x**3 / 6 + b * x**2 / 2).sum()


def test_on_a_cubic_the_third_order_drift_is_exact_and_the_second_misses_half_rho_squared_a(double):
    a, b, x, rho = torch.tensor([[1.0], [3.0]]), torch.tensor([[2.0], [1.0]]), torch.tensor([1.5]), 0.4
    exact = torch.stack([sam_gradient(cubic, (a[c], b[c]), x, rho) for c in range(2)]).mean(0)
    third, second = (moments(cubic, (a, b), x, rho, order)[0] for order in (2, 1))
    torch.testing.assert_close(third, exact)
    torch.testing.assert_close(exact - second, rho**2 / 2 * a.mean(0))


def test_discrete_process_draws_batches_with_replacement_and_takes_sams_step(double):
    loss, batches, x = small_network()
    steps = [x - 0.1 * sam_gradient(loss, tuple(b[c] for b in batches), x, 0.05) for c in range(4)]
    generator = torch.Generator().manual_seed(0)
    drawn = [discrete(loss, batches, x, lr=0.1, rho=0.05, generator=generator) for _ in range(40)]
    found = [next(c for c in range(4) if torch.equal(steps[c], y)) for y in drawn]
    assert set(found) == {0, 1, 2, 3} and len(set(found[:4])) < 4
