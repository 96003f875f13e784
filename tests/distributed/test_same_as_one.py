"""N ranks take the steps that one takes: the same weights and losses."""

import functools

import pytest
import torch
from rank_training import BASES, FAMILY, METHODS, clipped, trajectories, trajectory

SPREADS = [("DDP", 2), ("FSDP2", 4), ("FSDP2 x TP", 4)]
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5}
CASES = [(method, base) for method in METHODS for base in ("SGD", "AdamW")]
#: RMSprop has no fused update: torch's own step() gets DTensors.
OTHER_CASES = [(method, "RMSprop") for method in METHODS]
FAMILY_CASES = [
    *((method, "SGD") for method in FAMILY),
    ("Momentum-SAM", "AdamW"),
    ("GSAM", "RMSprop"),
    ("LookSAM", "AdamW"),
]


@functools.cache
def on_one(method, base, steps, dtype):
    return trajectory("one", method, base, steps, dtype)


@pytest.fixture(scope="module")
def on_ranks(ranks):
    """All cases of one way to spread in one call: processes cost more than the training."""
    return functools.cache(lambda n, how, cases, steps, dtype: ranks(n, trajectories, how, cases, steps, dtype))


def check(results, case, steps, dtype):
    weights, losses = on_one(*case, steps, dtype)
    for found in results:
        torch.testing.assert_close(found[case][0], weights, rtol=0, atol=TOLERANCES[dtype])
        torch.testing.assert_close(found[case][1], losses, rtol=0, atol=TOLERANCES[dtype])


@pytest.mark.parametrize("case", CASES, ids=" over ".join)
@pytest.mark.parametrize(("dtype", "steps"), [(torch.float64, 16), (torch.float32, 10)], ids=str)
@pytest.mark.parametrize(("how", "n"), SPREADS)
def test_ranks_take_the_steps_of_one_process(on_ranks, how, n, dtype, steps, case):
    check(on_ranks(n, how, tuple(CASES), steps, dtype), case, steps, dtype)


@pytest.mark.parametrize("case", OTHER_CASES, ids=" over ".join)
@pytest.mark.parametrize(("how", "n"), [("FSDP2", 2), ("FSDP2 x TP", 4)])
def test_a_base_optimizer_without_a_fused_update_takes_the_same_steps(on_ranks, how, n, case):
    check(on_ranks(n, how, tuple(OTHER_CASES), 10, torch.float64), case, 10, torch.float64)


@pytest.mark.parametrize("case", FAMILY_CASES, ids=" over ".join)
@pytest.mark.parametrize(("how", "n"), SPREADS)
def test_the_rest_of_the_family_takes_the_same_steps(on_ranks, how, n, case):
    check(on_ranks(n, how, tuple(FAMILY_CASES), 8, torch.float64), case, 8, torch.float64)


@pytest.mark.parametrize("method", METHODS)
def test_replicas_of_shards_take_the_same_steps(on_ranks, method):
    cases = tuple((m, "SGD") for m in METHODS)
    check(on_ranks(4, "HSDP", cases, 10, torch.float64), (method, "SGD"), 10, torch.float64)


@pytest.mark.parametrize("base", BASES)
def test_clipping_is_by_the_norm_over_all_shards(ranks, base):
    expected = clipped("one", base)
    assert (expected - trajectory("one", "F-SAM", base, 10)[0]).abs().max() > 1e-4  # it does clip
    for found in ranks(4, clipped, "FSDP2", base):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_every_base_is_in_the_table():
    assert {base for _, base in CASES + OTHER_CASES} == set(BASES)
