"""torch.distributed.checkpoint: saved on N ranks, loaded on M, and the training goes on as if nothing had happened."""

import functools

import pytest
import rank_checkpoints as cases
import torch
from rank_training import BASES, METHODS, Training, trajectory

BEFORE, AFTER = 4, 4
TABLE = tuple((method, base) for method in METHODS for base in BASES)


@functools.cache
def undisturbed(method, base):
    return trajectory("one", method, base, BEFORE + AFTER)[0]


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        ((1, "one"), (2, "FSDP2")),
        ((2, "FSDP2"), (1, "one")),
        ((4, "FSDP2 x TP"), (2, "FSDP2")),
        ((2, "DDP"), (4, "FSDP2")),
    ],
    ids=lambda spread: f"{spread[1]} on {spread[0]}",
)
def test_training_goes_on_over_another_number_of_ranks(ranks, tmp_path, saved, loaded):
    ranks(saved[0], cases.save, tmp_path, saved[1], TABLE, BEFORE)
    for weights in ranks(loaded[0], cases.resume, tmp_path, loaded[1], TABLE, BEFORE, AFTER):
        for case in TABLE:
            torch.testing.assert_close(weights[case], undisturbed(*case), rtol=0, atol=1e-10, msg=" ".join(case))


def test_a_checkpoint_from_before_the_first_estimate_of_the_eigenvector_loads(ranks, tmp_path):
    ranks(2, cases.save_before_the_first_estimate, tmp_path, BEFORE)
    training = Training()
    expected = training.run(training.optimizer("Eigen-SAM", "SGD"), BEFORE + AFTER)
    for weights in ranks(2, cases.resume_without_an_eigenvector, tmp_path, BEFORE, AFTER):
        torch.testing.assert_close(weights, expected, rtol=0, atol=1e-10)


def test_a_rank_without_elements_counts_the_steps_that_it_may_save(ranks):
    counts = [pair for found in ranks(4, cases.step_counts, BEFORE) for pair in found]
    assert 0 in [elements for _, elements in counts]
    assert {count for count, _ in counts} == {BEFORE}


def test_state_that_was_only_looked_at_is_no_state(ranks):
    for weights in ranks(2, cases.look_and_train, "FSDP2", AFTER):
        expected = trajectory("one", "F-SAM", "AdamW", AFTER)[0]
        torch.testing.assert_close(weights, expected, rtol=0, atol=1e-10)


# ---- F-SAM in m-sharpness, where m differs from rank to rank ----------------------------------------------


def test_each_rank_gets_its_own_average_back(ranks, tmp_path):
    saved = ranks(2, cases.save_per_rank, tmp_path, BEFORE, AFTER)
    assert not torch.allclose(saved[0][0], saved[1][0]), "the averages differ"
    resumed = ranks(2, cases.resume_per_rank, tmp_path, BEFORE, AFTER)
    for (m, weights), (same_m, same_weights) in zip(saved, resumed, strict=True):
        assert torch.equal(m, same_m)
        assert torch.equal(weights, same_weights)


@pytest.mark.parametrize(("saved", "loaded"), [(2, 1), (1, 2)])
def test_averages_of_another_number_of_ranks_are_refused_with_the_remedy(ranks, tmp_path, saved, loaded):
    ranks(saved, cases.save_per_rank, tmp_path, 2, 0)
    for message in ranks(loaded, cases.load_raises, tmp_path):
        assert "average_momentum(optimizer) before saving" in message


def test_averages_made_one_load_on_any_number_of_ranks(ranks, tmp_path):
    saved = ranks(2, cases.save_averaged, tmp_path, BEFORE)
    mean = (saved[0][0] + saved[1][0]) / 2
    for m in [saved[0][1], saved[1][1], *ranks(4, cases.resume_averaged, tmp_path)]:
        torch.testing.assert_close(m, mean, rtol=0, atol=1e-15)


def test_a_rank_without_an_average_does_not_count_in_the_mean(ranks):
    (_, first), (m, second) = ranks(2, cases.average_where_one_rank_has_none)
    assert torch.equal(first, m)
    assert torch.equal(second, m)


def test_averages_are_loaded_after_the_optimizer(ranks, tmp_path):
    ranks(2, cases.save_per_rank, tmp_path, 2, 0)
    for failure in ranks.outcomes(2, cases.load_in_the_wrong_order, tmp_path):
        assert "call set_state_dict first" in failure.message


@pytest.mark.parametrize(
    ("kind", "words"), [("sharded", "m is sharded like them"), ("without m", "SAM keeps no average of gradients")]
)
def test_an_average_for_each_rank_is_refused_where_there_is_none(ranks, kind, words):
    for failure in ranks.outcomes(2, cases.refused, kind):
        assert words in failure.message
