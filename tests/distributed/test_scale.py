"""The small end of the cost model in benchmarks/scale.py, counted on real optimizers and process groups."""

import functools
from pathlib import Path

import pytest
import rank_scale

from benchmarks import scale

METHODS = {method.name: method for method in scale.METHODS}
ONE_PASS = {method.name for method in scale.METHODS if method.passes == 1}
MODEL = scale.Model("small", rank_scale.PARAMETERS, rank_scale.LAYERS, rank_scale.WIDTH)
LAYOUTS = {
    ("DDP", 2): scale.Layout("DDP", 2, 1),
    ("DDP, m-sharpness", 2): scale.Layout("DDP, m-sharpness", 2, 1, m_sharpness=True),
    ("FSDP2", 2): scale.Layout("FSDP2", 1, 2),
    ("FSDP2", 4): scale.Layout("FSDP2", 1, 4),
    ("HSDP", 4): scale.Layout("HSDP", 2, 2),
}
#: How torch calls them, and the bytes that its arguments have for each byte of the whole tensor.
NAMES = {
    "all-gather": ("_allgather_base_", lambda ranks: 1 + 1 / ranks),
    "reduce-scatter": ("_reduce_scatter_base_", lambda ranks: 1 + 1 / ranks),
    "all-reduce": ("allreduce_", lambda ranks: 1),
}


@pytest.fixture(scope="module")
def measured(ranks):
    """What each rank measured: all methods of a layout in one call, as processes cost more than the steps."""
    every = functools.cache(lambda layout, n, methods: ranks(n, rank_scale.measure_all, layout, methods))
    return lambda layout, n, method: [found[method] for found in every(layout, n, tuple(methods_of(layout)))]


def methods_of(layout):
    return [m for m in METHODS if not (m in ONE_PASS and layout == "DDP, m-sharpness")]


def cases():
    return [(*key, method) for key in LAYOUTS for method in methods_of(key[0])]


@pytest.mark.parametrize(("layout", "n", "method"), cases())
def test_an_optimizer_keeps_the_bytes_of_the_model(measured, layout, n, method):
    expected = scale.state_bytes(METHODS[method], LAYOUTS[layout, n].local(MODEL))
    for state, _, _ in measured(layout, n, method):
        assert state == pytest.approx(expected, rel=0.03)  # step counts, alignment, a few scalars


@pytest.mark.parametrize(("layout", "n", "method"), [c for c in cases() if not c[2].startswith("Eigen-SAM")])
def test_a_step_makes_the_collectives_of_the_model(measured, layout, n, method):
    where = LAYOUTS[layout, n]
    expected = dict.fromkeys((name for name, _ in NAMES.values()), 0)
    buckets = 0
    for passes, reduced in scale.passes(where, METHODS[method]):
        for c in scale.collectives(where, MODEL, 0, reduced):
            name, factor = NAMES[c.kind]
            if layout.startswith("DDP"):
                buckets += passes * c.size
            else:
                expected[name] += passes * c.size * factor(c.ranks)
    agreements = scale.agreements(where, METHODS[method])
    for _, seen, reduced in measured(layout, n, method):
        assert seen.count(("allreduce_", scale.GRAM)) == agreements
        found = dict.fromkeys(expected, 0)
        for name, size in seen:
            if (name, size) != ("allreduce_", scale.GRAM):
                found[name] += size
        if layout.startswith("DDP"):
            found["allreduce_"] = 0  # of the buckets, which are counted where DDP hands them over
        assert found == pytest.approx(expected)
        assert sum(reduced) == buckets


def test_the_document_has_the_tables_that_the_script_computes():
    document = Path(scale.__file__).resolve().parent.parent / "docs" / "scale.md"
    assert scale.main(["--document", str(document), "--check"]) == 0
