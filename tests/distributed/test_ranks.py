"""Several processes: two modes under DDP, what is sent, faults, and bad input."""

import pytest
import rank_cases as cases
import torch
from rank_training import METHODS, trajectory
from torch.distributed.tensor import Partial, Replicate, Shard

import fastsam

DDP_OPTIONS = {
    "plain": {},
    "bucket views": dict(gradient_as_bucket_view=True),
    "static graph": dict(static_graph=True),
    "unused parameters": dict(find_unused_parameters=True),
}


def close(found, expected, tolerance=1e-10):
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


# ---- m-sharpness -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_m_sharpness_is_a_perturbation_for_each_rank(ranks, method):
    expected = cases.simulated_ranks(method, 20, 2)
    for found in ranks(2, cases.m_sharpness, method, 20, {}):
        close(found, expected)
    one_batch = trajectory("one", method, "SGD", 20)[0]
    assert (expected - one_batch).abs().max() > 1e-6  # another method than the synchronised one


@pytest.mark.parametrize("options", DDP_OPTIONS.values(), ids=DDP_OPTIONS)
def test_both_modes_work_with_every_option_of_ddp(ranks, options):
    expected = cases.simulated_ranks("SAM", 5, 2)
    for found in ranks(2, cases.m_sharpness, "SAM", 5, options):
        close(found, expected)
    expected = trajectory("one", "SAM", "SGD", 5)[0]
    for found in ranks(2, cases.synchronised, "SAM", options, {}):
        close(found, expected)


def test_m_sharpness_in_a_manual_loop(ranks):
    for found in ranks(2, cases.m_sharpness, "F-SAM", 5, {}, True):
        close(found, cases.simulated_ranks("F-SAM", 5, 2))


def test_accumulated_micro_batches_survive_ddps_buckets(ranks):
    """The gradients of the first micro-batch lie in the memory that the second's are reduced in."""
    for found in ranks(2, cases.accumulated, True):
        close(found, cases.accumulated_on_one(2))


# ---- what is sent ----------------------------------------------------------------------------------------------


def test_m_sharpness_reduces_the_gradients_once(ranks):
    for reduced, parameters in ranks(2, cases.collectives_of_m_sharpness):
        assert sum(reduced) == parameters


@pytest.mark.parametrize("method", METHODS)
def test_shards_add_the_sums_of_each_pass_and_nothing_else(ranks, method):
    for passes, added in ranks(2, cases.collectives, "FSDP2", method, {}):
        assert passes, "the counter saw no collective at all"
        assert added == [("allreduce_", 24)] * 2


def test_a_mesh_dimension_that_replicates_adds_nothing(ranks):
    for _, added in ranks(4, cases.collectives, "HSDP", "F-SAM", {}):
        assert added == [("allreduce_", 24)] * 2


def test_synchronised_ddp_adds_nothing(ranks):
    for _, added in ranks(2, cases.collectives, "DDP", "F-SAM", {}):
        assert added == []


# ---- placements and policies -----------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", [[Shard(0)], [Replicate()], [Partial()]], ids=str)
@pytest.mark.parametrize("parameter", [[Shard(0)], [Replicate()]], ids=str)
def test_each_element_counts_once_whatever_the_placement(ranks, parameter, gradient):
    weight = torch.arange(8, dtype=torch.float64) / 4
    first, second = torch.linspace(1, 2, 8, dtype=torch.float64), torch.linspace(-1, 1, 8, dtype=torch.float64) ** 2
    for climbed, descended in ranks(2, cases.placements_of_one_tensor, parameter, gradient):
        close(climbed, weight + 0.3 * first / first.norm())
        close(descended, weight - 0.1 * second)


def test_a_plain_parameter_beside_shards_counts_once(ranks):
    norm = (4 * 2.0**2 + 3 * 1.0**2) ** 0.5
    for sharded, plain in ranks(2, cases.plain_beside_sharded):
        close(sharded, torch.full((4,), 2 / norm, dtype=torch.float64))
        close(plain, torch.full((3,), 1 / norm, dtype=torch.float64))


def test_pipeline_stages_share_one_norm(ranks):
    norm = (2 * 3.0**2 + 2 * 4.0**2) ** 0.5
    for rank, found in enumerate(ranks(2, cases.pipeline)):
        close(found, torch.full((2,), (3 + rank) / norm, dtype=torch.float64))


def test_state_is_sharded_like_its_parameter(ranks):
    assert ranks(4, cases.sharded_state) == [(True, True, True)] * 4


def test_fsdp_in_mixed_precision_keeps_float32_shards(ranks):
    (before, after, dtype, state_dtype, state_type), (_, other, *_) = ranks(2, cases.mixed_precision)
    assert dtype == state_dtype == torch.float32 and state_type == "DTensor"
    assert torch.equal(after, other) and not torch.equal(before, after) and bool(after.isfinite().all())


def test_shards_kept_on_the_host(ranks):
    for found in ranks(2, cases.offloaded):
        close(found, trajectory("one", "F-SAM", "SGD", 10)[0])


def test_compiled_blocks(ranks):
    for found in ranks(2, cases.compiled_blocks):
        close(found, trajectory("one", "F-SAM", "SGD", 5)[0])


# ---- faults ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", [1, 2], ids=["first pass", "second pass"])
@pytest.mark.parametrize(("how", "options"), [("DDP", ()), ("DDP", (("m_sharpness", True),)), ("FSDP2", ())], ids=str)
def test_a_nan_on_one_rank_changes_nothing_on_any(ranks, how, options, where):
    for before, after, found_inf, goes_on in ranks(2, cases.nan_on_one_rank, how, where, options):
        assert found_inf == 1.0 and goes_on
        assert torch.equal(before[0], after[0])
        assert all(torch.equal(a, b) for a, b in zip(before[1], after[1], strict=True))


def test_a_nan_in_one_shard_changes_nothing_in_the_others(ranks):
    for before, after in ranks(2, cases.nan_in_one_shard):
        assert torch.equal(before, after)


@pytest.mark.parametrize("m_sharp", [False, True], ids=["synchronised", "m-sharpness"])
def test_an_overflow_on_one_rank_skips_on_all(ranks, m_sharp):
    for before, after, scale in ranks(2, cases.overflow_on_one_rank, m_sharp):
        assert torch.equal(before, after) and scale == 2.0**9


@pytest.mark.parametrize("how", ["DDP", "FSDP2"])
def test_a_rank_that_raises_in_the_second_pass_is_named_on_the_others(ranks, how):
    (told, restored), (own, its_own_restored) = ranks(2, cases.raised_on_one_rank, how)
    assert restored and its_own_restored
    assert own.startswith("the disk is full")
    assert "rank 1 failed before: RuntimeError: the disk is full" in told


@pytest.mark.parametrize("how", ["DDP", "FSDP2"])
def test_a_rank_killed_in_the_second_pass_leaves_no_perturbed_weights_and_no_hanging_rank(ranks, how):
    outcome, restored = ranks(2, cases.killed, how)[0]
    assert outcome == "raised" and restored


# ---- bad input -------------------------------------------------------------------------------------------------

REFUSED = {
    "different_rho": "rho of group 0 differs between processes: 0.05 on rank 0, 1.05 on rank 1",
    "different_methods": "the method differs between processes: 'FriendlySAM' on rank 0, 'SAM' on rank 1",
    "different_order": "the values of parameter 0 of group 0, of shape (8,), differs between processes",
    "excluded_rank": "membership of process_group differs between processes: True on rank 0, False on rank 1",
    "mixed_group": "a parameter of shape (4,) is a DTensor and a parameter of shape (3,) of the same group a plain",
    "partial_parameter": "a weight that is a sum over processes has no norm",
    "m_sharpness_of_shards": "m_sharpness=True, but a parameter of shape (8,) is sharded",
    "m_sharpness_without_model": "give the DistributedDataParallel model",
    "closure_under_no_sync": "a closure under no_sync()",
    "replicas_in_process_group": "process_group joins the ranks [0, 1], which hold replicas",
    "first_fsdp": "use torch.distributed.fsdp.fully_shard (FSDP2)",
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_trained_is_refused_on_every_rank(ranks, case):
    for outcome in ranks.outcomes(2, getattr(cases, case)):
        assert REFUSED[case] in outcome.message


@pytest.mark.parametrize("option", ["m_sharpness", "process_group"])
def test_without_torch_distributed(option):
    with pytest.raises(RuntimeError, match=f"{option}.* needs torch.distributed: call"):
        fastsam.SAM([torch.nn.Parameter(torch.ones(2))], torch.optim.SGD, lr=0.1, **{option: True})
