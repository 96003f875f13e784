"""Accelerate, Transformers and Lightning on two processes take the steps of one process on the whole batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from rank_frameworks import METHODS, STEPS, batches, flat, network
from torch import nn

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory):
    """What every case of ``rank_frameworks.py`` left on each rank: (weights, reductions), or the error as text."""
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("torch was built without torch.distributed's gloo")
    for name in ("accelerate", "transformers", "lightning"):
        pytest.importorskip(name)
    folder = tmp_path_factory.mktemp("frameworks")
    script = Path(__file__).with_name("rank_frameworks.py")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, script, folder], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900
    )
    assert run.returncode == 0, run.stderr
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]


def mean_loss(model, pairs):
    return sum(nn.functional.cross_entropy(model(x), y) for x, y in pairs) / len(pairs)


def first_of_each(pairs, part):
    return [(x[: len(x) // part], y[: len(y) // part]) for x, y in pairs]


def on_one(method, micro_batches, part=1):
    """One process, and the whole batch of every step; the first of two passes takes 1 / part of each micro-batch."""
    model = network()
    optimizer = METHODS[method](model.parameters())
    for ranks in batches(micro_batches):
        whole = [pair for rank in ranks for pair in rank]
        if optimizer.evaluations == 2:
            mean_loss(model, first_of_each(whole, part)).backward()
        if optimizer.evaluations == 2 or method == "Momentum-SAM":
            optimizer.first_step(zero_grad=True)
        mean_loss(model, whole).backward()
        optimizer.second_step(zero_grad=True)
    return flat(model)


def m_sharp_by_hand(micro_batches, part=1, rho=0.1):
    """SAM in which every rank climbs along the gradient of its own part of the batch; the second gradients' mean."""
    model = network()
    params = list(model.parameters())
    base = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    for ranks in batches(micro_batches):
        second = []
        for mine in ranks:
            g = torch.autograd.grad(mean_loss(model, first_of_each(mine, part)), params)
            norm = torch.cat([x.reshape(-1) for x in g]).norm()
            w = [p.detach().clone() for p in params]
            with torch.no_grad():
                for p, x in zip(params, g, strict=True):
                    p.add_(x, alpha=float(rho / norm))
            second.append(torch.autograd.grad(mean_loss(model, mine), params))
            with torch.no_grad():
                for p, x in zip(params, w, strict=True):
                    p.copy_(x)
        for p, *gradients in zip(params, *second, strict=True):
            p.grad = sum(gradients) / len(gradients)
        base.step()
    return flat(model)


@pytest.mark.parametrize(
    ("case", "method", "micro_batches", "part"),
    [
        ("accelerate, SAM", "SAM", 1, 1),
        ("accelerate, F-SAM, 2 micro-batches", "F-SAM", 2, 1),
        ("accelerate, model prepared later, F-SAM, 2 micro-batches", "F-SAM", 2, 1),
        ("accelerate, fsdp2, F-SAM, 2 micro-batches", "F-SAM", 2, 1),
        ("accelerate, fsdp2, Momentum-SAM", "Momentum-SAM", 1, 1),
        ("accelerate, Momentum-SAM, 2 micro-batches", "Momentum-SAM", 2, 1),
        ("accelerate, LookSAM, 2 micro-batches, a third", "LookSAM", 2, 3),
        ("accelerate without SAMOptimizer, SAM", "SAM", 1, 1),
        ("transformers, F-SAM, 2 micro-batches", "F-SAM", 2, 1),
        ("transformers, Momentum-SAM, 2 micro-batches", "Momentum-SAM", 2, 1),
        ("transformers, GSAM, a third", "GSAM", 1, 3),
        ("lightning, SAM", "SAM", 1, 1),
        ("lightning, F-SAM, 2 micro-batches", "F-SAM", 2, 1),
        ("lightning, LookSAM, 2 micro-batches", "LookSAM", 2, 1),
        ("lightning, fsdp2, F-SAM, 2 micro-batches", "F-SAM", 2, 1),
        ("lightning, fsdp2, Momentum-SAM, 2 micro-batches", "Momentum-SAM", 2, 1),
        ("lightning, fsdp2, GSAM, a third", "GSAM", 1, 3),
        ("lightning without callback, SAM", "SAM", 1, 1),
    ],
)
def test_two_processes_take_the_steps_of_one_on_the_whole_batch(on_ranks, case, method, micro_batches, part):
    expected = on_one(method, micro_batches, part)
    for found in on_ranks:
        torch.testing.assert_close(found[case][0], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("case", "micro_batches", "part"),
    [
        ("accelerate, SAM, 2 micro-batches, m-sharpness", 2, 1),
        ("transformers, SAM, m-sharpness", 1, 1),
        ("lightning, SAM, 2 micro-batches, m-sharpness", 2, 1),
        ("lightning, SAM, m-sharpness, a third", 1, 3),
    ],
)
def test_m_sharpness_climbs_on_each_process_by_itself(on_ranks, case, micro_batches, part):
    expected = m_sharp_by_hand(micro_batches, part)
    for found in on_ranks:
        torch.testing.assert_close(found[case][0], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("case", "passes"),
    [
        ("accelerate, SAM", 2),
        ("accelerate, F-SAM, 2 micro-batches", 2),
        ("accelerate, SAM, 2 micro-batches, m-sharpness", 1),
        ("lightning, F-SAM, 2 micro-batches", 2),
        ("lightning, SAM, 2 micro-batches, m-sharpness", 1),
        ("accelerate, Momentum-SAM, 2 micro-batches", 1),
        ("lightning, LookSAM, 2 micro-batches", 1.5),
    ],
)
def test_a_pass_is_reduced_once_however_many_micro_batches_it_has(on_ranks, case, passes):
    assert [found[case][1] for found in on_ranks] == [passes * STEPS] * 2


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("accelerate, model prepared later, SAM, m-sharpness", "use model = accelerator.prepare(model), then"),
        ("accelerate without SAMOptimizer, SAM, 2 micro-batches", "fastsam.integrations.accelerate.SAMOptimizer"),
        ("lightning, static graph, SAM, m-sharpness", "m_sharpness=True with static_graph=True"),
        ("lightning without callback, SAM, 2 micro-batches", "use fastsam.integrations"),
        ("lightning without callback, SAM, m-sharpness", "m_sharpness=True: give the DistributedDataParallel model"),
    ],
)
def test_what_would_go_wrong_is_refused_on_every_process(on_ranks, case, words):
    for found in on_ranks:
        assert words in found[case]
