"""The tables that device backends read: rows, chunks, hyper-parameters, and what has to be uploaded when."""

import math

import pytest
import torch

from fastsam.flat.space import FlatSpace
from fastsam.kernels import Ascent, Descent, Mixture, device, launches


def space_of(*tensors, groups=None):
    params = [torch.nn.Parameter(t) for t in tensors]
    return FlatSpace(params, groups or [0] * len(params), perturbed=True)


def give_gradients(space, which=None, dtype=None):
    for i, p in enumerate(space.params):
        p.grad = torch.ones_like(p) if which is None or i in which else None
    space.collect_gradients()


def columns(rows, name):
    return [int(row[device.ROW.index(name)]) for row in rows]


def test_a_row_says_where_a_parameter_lies():
    space = space_of(torch.zeros(5), torch.zeros(7, 3), groups=[0, 1])
    give_gradients(space)
    rows = device.build_rows(space, space.gradient_addresses, merged=True)
    assert columns(rows, "weight") == [p.data_ptr() for p in space.params]
    assert columns(rows, "gradient") == [p.grad.data_ptr() for p in space.params]
    assert columns(rows, "size") == [5, 21]
    assert columns(rows, "offset") == [0, 16]
    assert columns(rows, "group") == [0, 1]
    assert columns(rows, "param") == [0, 1]


def test_parameters_without_gradient_or_backup_and_empty_ones_have_no_row():
    space = space_of(torch.zeros(5), torch.zeros(0), torch.zeros(6), torch.zeros(7))
    give_gradients(space, which=[0, 1])
    space.climbed[3] = True
    rows = device.build_rows(space, space.gradient_addresses, merged=True)
    assert columns(rows, "param") == [0, 3]
    assert columns(rows, "climbed") == [0, 1]
    assert columns(rows, "gradient")[1] == 0


def flattened(groups=None):
    weights, gradients = torch.zeros(300), torch.zeros(300)
    space = space_of(weights[:100], weights[100:200], weights[200:], groups=groups)
    for i, p in enumerate(space.params):
        p.grad = gradients[100 * i : 100 * (i + 1)]
    space.collect_gradients()
    return space


def test_adjacent_parameters_are_one_row():
    space = flattened()
    rows = device.build_rows(space, space.gradient_addresses, merged=True)
    assert columns(rows, "size") == [300]
    assert columns(device.build_rows(space, space.gradient_addresses, merged=False), "size") == [100, 100, 100]


@pytest.mark.parametrize("difference", ["group", "climbed", "gradient address", "missing gradient"])
def test_adjacent_parameters_that_differ_are_not_merged(difference):
    space = flattened(groups=[0, 1, 1] if difference == "group" else None)
    if difference == "climbed":
        space.climbed[0] = True
    if difference == "gradient address":
        space.params[0].grad = torch.zeros(100)
        space.collect_gradients()
    if difference == "missing gradient":
        space.climbed = [True] * 3
        space.params[0].grad = None
        space.collect_gradients()
    rows = device.build_rows(space, space.gradient_addresses, merged=True)
    assert columns(rows, "size") == [100, 200]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_adjacency_counts_in_bytes_of_the_dtype(dtype):
    weights = torch.zeros(64, dtype=dtype)
    space = space_of(weights[:24], weights[24:])
    gradients = torch.zeros(64, dtype=dtype)
    space.params[0].grad, space.params[1].grad = gradients[:24], gradients[24:]
    space.collect_gradients()
    rows = device.build_rows(space, space.gradient_addresses, merged=True)
    assert columns(rows, "size") == [64]
    assert columns(rows, "gradient_type") == [device.DTYPES[dtype]]


def test_chunks_cover_every_element_once():
    sizes = [1, 8192, 8193, 20000, 3]
    chunks = device.build_chunks(sizes, 8192).tolist()
    for row, size in enumerate(sizes):
        mine = [(begin, count) for r, begin, count in chunks if r == row]
        assert [begin for begin, _ in mine] == list(range(0, size, 8192))
        assert sum(count for _, count in mine) == size
        assert all(0 < count <= 8192 for _, count in mine)
    assert [r for r, _, _ in chunks] == sorted(r for r, _, _ in chunks)


@pytest.mark.parametrize("numel", [0, 1, 10**6, 86_600_000, 1_300_000_000, 70_000_000_000])
def test_partial_sums_stay_few_and_chunks_are_whole_blocks(numel):
    size = device.chunk_size(numel)
    assert size % 8192 == 0
    assert numel / size <= 16384


def test_tables_are_reused_while_addresses_stay_and_when_they_return():
    space = space_of(torch.zeros(100), torch.zeros(50))
    table = device.table_of(space)
    give_gradients(space)
    first_pass = [p.grad for p in space.params]
    first = table.layout(space)
    assert table.layout(space) is first
    give_gradients(space)
    second = table.layout(space)
    assert second is not first
    assert second.chunks is first.chunks
    for p, g in zip(space.params, first_pass, strict=True):
        p.grad = g
    space.collect_gradients()
    assert table.layout(space) is first


def test_a_climb_changes_the_table():
    space = space_of(torch.zeros(100), torch.zeros(50))
    table = device.table_of(space)
    give_gradients(space)
    before = table.layout(space)
    space.climbed = [True, False]
    assert columns(before.rows, "climbed") == [0, 0]
    assert columns(table.layout(space).rows, "climbed") == [1, 0]


def test_restore_needs_no_gradients():
    space = space_of(torch.zeros(100), torch.zeros(50))
    give_gradients(space)
    space.climbed = [True, False]
    rows = device.table_of(space).layout(space, gradients=False).rows
    assert columns(rows, "param") == [0]


def test_few_layouts_are_kept():
    space = space_of(torch.zeros(10))
    table = device.table_of(space)
    kept = []
    for _ in range(50):
        give_gradients(space)
        kept.append(space.params[0].grad)  # so that every address is a new one
        table.layout(space)
    assert len(table._layouts) == 8


def test_hyper_parameters_are_uploaded_when_they_change(monkeypatch):
    table = device.DeviceTable(space_of(torch.zeros(10)))
    uploads = []
    upload = table.upload
    monkeypatch.setattr(table, "upload", lambda *a: uploads.append(1) or upload(*a))
    first = table.hyper("sgd", [(0.1, 0.9)])
    again = table.hyper("sgd", [(0.1, 0.9)])
    assert again is first
    assert len(uploads) == 1
    changed = table.hyper("sgd", [(0.05, 0.9)])
    assert changed.data_ptr() == first.data_ptr()
    assert changed.tolist() == [[0.05, 0.9]]
    assert table.hyper("sgd", [(0.05, 0.9), (1.0, 0.0)]).tolist() == [[0.05, 0.9], [1.0, 0.0]]


def test_tensor_hyper_parameters_are_taken_as_they_are_at_each_call():
    table = device.DeviceTable(space_of(torch.zeros(10)))
    lr = torch.tensor(0.5)
    assert table.hyper("sgd", [(lr,)]).tolist() == [[0.5]]
    lr.fill_(0.25)
    assert table.hyper("sgd", [(lr,)]).tolist() == [[0.25]]


def test_a_table_for_another_number_of_groups_does_not_displace_the_first():
    """A captured graph goes on reading it, whatever a curvature estimate does in between."""
    table = device.DeviceTable(space_of(torch.zeros(10)))
    first = table.hyper("ascent", [(0.1, 0.9)])
    table.hyper("ascent", [(0.5, 0.5), (1.0, 0.0)])
    assert table.hyper("ascent", [(0.2, 0.9)]).data_ptr() == first.data_ptr()
    assert first.tolist() == [[0.2, 0.9]]


def test_partial_sums_have_room_for_rows_that_no_longer_merge():
    space = flattened()
    table = device.table_of(space)
    for merged in (True, False):
        assert 3 * table.layout(space, merged=merged).programs <= len(table.partials)


def test_tables_of_a_capture_are_filled_when_it_is_over():
    space = space_of(torch.zeros(100), torch.zeros(50))
    table = device.table_of(space)
    give_gradients(space)
    known = table.layout(space)
    recording = device.Recording(table, space)
    assert table.layout(space) is known
    give_gradients(space)
    space.climbed = [True, False]
    merged, single = table.layout(space), table.layout(space, merged=False)
    assert all(not t.any() for t in (merged.rows, single.rows)), "nothing is copied within a capture"
    recording.fill()
    for layout in (merged, single):
        assert columns(layout.rows, "gradient") == [p.grad.data_ptr() for p in space.params]
        assert columns(layout.rows, "climbed") == [1, 0]
    assert {id(known), id(merged), id(single)} <= set(map(id, recording.kept)), "a graph reads them all"
    assert all(t.data_ptr() % 16 == 0 for t in (merged.rows, single.rows)), "kernels are compiled for aligned tables"


def test_a_capture_has_room_for_the_tables_of_a_step_at_their_largest():
    space = flattened()
    table = device.table_of(space)
    table.chunk_size = 16  # as many chunks as there can be
    table.most_programs = sum(-(-p.numel() // 16) for p in space.params)
    recording = device.Recording(table, space)
    for climbed in ([False] * 3, [True, False, True]):
        space.climbed = climbed
        for merged in (True, False):
            table.layout(space, merged=merged)
    recording.fill()
    assert recording._used <= len(recording._room)


def test_tables_of_a_capture_that_failed_are_forgotten():
    space = space_of(torch.zeros(100))
    table = device.table_of(space)
    give_gradients(space)
    recording = device.Recording(table, space)
    unfilled = table.layout(space)
    recording.abandon()
    assert table.layout(space) is not unfilled
    assert columns(table.layout(space).rows, "size") == [100]


def test_a_capture_writes_no_hyper_parameters():
    space = space_of(torch.zeros(10))
    table = device.table_of(space)
    table.hyper("sgd", [(0.1, 0.9)])
    device.Recording(table, space)
    table.hyper("sgd", [(0.1, 0.9)])
    with pytest.raises(RuntimeError, match="changed within the captured step"):
        table.hyper("sgd", [(0.2, 0.9)])
    with pytest.raises(RuntimeError, match="first gradient within the captured step"):
        table.blank(space, torch.zeros(space.numel), [False], math.nan)


@pytest.fixture
def tensors_on_the_device(monkeypatch):
    """Takes every tensor for one on a GPU, which the host may not read."""
    monkeypatch.setattr(device, "on_device", lambda x: isinstance(x, torch.Tensor))


def test_a_capture_leaves_a_schedules_tensors_to_the_replay_and_repeats_what_is_computed(tensors_on_the_device):
    space = space_of(torch.zeros(10))
    table = device.DeviceTable(space)
    lr, coefficient = torch.tensor(0.5), torch.tensor(2.0)
    table.hyper("sgd", [(lr, 0.9)])
    table.hyper("coefficients", [(coefficient, 0.0)], repeated=True)
    recording = device.Recording(table, space)
    lr.fill_(0.25)
    coefficient.fill_(3.0)
    assert table.hyper("sgd", [(lr, 0.9)]).tolist() == [[0.5, 0.9]]
    assert table.hyper("coefficients", [(coefficient, 0.0)], repeated=True).tolist() == [[3.0, 0.0]]
    recording.fill()
    assert table.hyper("sgd", [(lr, 0.9)]).tolist() == [[0.25, 0.9]]


def test_numbers_beside_what_a_graph_computes_are_there_at_its_replay_whatever_was_there_in_between(
    tensors_on_the_device,
):
    space = space_of(torch.zeros(10))
    table = device.table_of(space)
    table.hyper("mixture", [(torch.tensor(2.0), 0.5)], repeated=True)
    recording = device.Recording(table, space)
    captured = table.hyper("mixture", [(torch.tensor(2.0), 0.5)], repeated=True)
    recording.fill()
    table.hyper("mixture", [(torch.tensor(4.0), 0.25)], repeated=True)
    table.numbers_as_captured()
    assert captured[0, 1] == 0.5


def test_mixtures_are_computed_on_the_device():
    sums = torch.tensor([2.0, 3.0, 5.0], dtype=torch.float64)
    descent = Descent([{"alpha": 0.5}, {"alpha": 1.0}], {}, [])
    descent.mixtures = lambda sums, group: Mixture(1 + group["alpha"] * sums[1] / sums[0], -group["alpha"])
    first, second = launches.mixture_lines(descent, sums)
    assert [float(x) for x in first] == [1.75, -0.5, 0.0, 0.0, 0.0, 0.0]
    assert [float(x) for x in second] == [2.5, -1.0, 0.0, 0.0, 0.0, 0.0]
    assert isinstance(first[0], torch.Tensor)


def test_a_number_in_the_place_of_a_tensor_is_uploaded(tensors_on_the_device):
    table = device.DeviceTable(space_of(torch.zeros(10)))
    for lr in (0.0, torch.tensor(0.5), 0.0):
        assert table.hyper("sgd", [(lr,)]).tolist() == [[float(lr)]]


def test_sums_lie_where_kernels_are_compiled_for():
    first, second = device.DeviceTable(space_of(torch.zeros(10))).sums
    assert all(sums.dtype == torch.float64 and sums.data_ptr() % 16 == 0 for sums in (first, second))
    assert abs(first.data_ptr() - second.data_ptr()) >= 24


def test_unstarted_parts_are_marked_once_and_again_after_they_were_written():
    space = space_of(torch.zeros(4), torch.zeros(4))
    table = device.table_of(space)
    flat = torch.zeros(space.numel)
    table.blank(space, flat, [True, False], math.nan)
    assert flat[:4].tolist() == [0.0] * 4
    assert flat[16:20].isnan().all()
    flat[16:20] = 1.0
    table.blank(space, flat, [True, False], math.nan)
    assert flat[16:20].tolist() == [1.0] * 4, "a part known to be marked is not filled again"
    table.written(flat, [True, True])
    table.blank(space, flat, [True, False], math.nan)
    assert flat[16:20].isnan().all()


def test_coefficients_are_computed_on_the_device_unless_they_are_of_the_closed_form():
    def own(dd, dv, vv, group):
        return group["rho"] * dd, dv + vv

    sums = torch.tensor([2.0, 3.0, 5.0], dtype=torch.float64)
    ascent = Ascent([{"rho": 0.5}], own, vector=torch.zeros(1))
    [line] = launches.ascent_lines(ascent, sums)
    assert [float(x) for x in line] == [1.0, 8.0, 0.0, 0.0, 0.0]
    own.closed_form = True
    assert launches.ascent_lines(ascent, sums) == [(0.5, 0.0, 0.0, 0.0, False)]


def test_powers_of_beta_are_exact_enough():
    group = dict(lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, decoupled_weight_decay=True, maximize=False)
    line = dict(zip(device.ADAM, launches.adam_lines([group])[0], strict=True))
    for t in (1, 2, 1000, 100_000):
        assert math.isclose(2 ** (t * line["log2_beta2"]), 0.999**t, rel_tol=1e-11)
    assert launches.adam_lines([{**group, "betas": (0.0, 0.9)}])[0][3] == -math.inf
