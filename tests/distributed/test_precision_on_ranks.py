"""State in bfloat16 and stochastic rounding under FSDP2."""

import pytest
import rank_precision as cases
import torch


@pytest.mark.parametrize("n", [2, 4])
def test_shards_draw_what_the_whole_parameter_draws(ranks, n):
    expected = cases.stochastic_weights(sharded=False)
    for found in ranks(n, cases.stochastic_weights, True):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", cases.OWN)
@pytest.mark.parametrize(
    ("before", "after"),
    [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)],
    ids=lambda dtype: str(dtype).removeprefix("torch."),
)
def test_a_distributed_checkpoint_is_cast_to_the_state_dtype_that_loads_it(ranks, tmp_path, name, before, after):
    for same, any_value, kept in ranks(2, cases.cast_by_a_checkpoint, str(tmp_path), name, before, after):
        assert same and any_value and kept == {after}
