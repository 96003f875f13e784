"""The benchmark measures what it says: the right shapes, the same mathematics everywhere, the right bytes."""

import contextlib
import copy
import importlib.util
import json
import math
import signal

import pytest
import torch

pytest.importorskip("rich")

from benchmarks import report
from benchmarks.optimizer_step import main
from fastsam.commands.bench import rivals
from fastsam.commands.bench.bandwidth import bytes_per_parameter, cycle_passes, passes
from fastsam.commands.bench.compiled import CompileLimit, compile_limit
from fastsam.commands.bench.gradients import GradientSequence
from fastsam.commands.bench.optimizer_step import Cell
from fastsam.commands.bench.parameter_sets import ParameterSet, even_set, host_only_set, parameter_set, scaled_set
from fastsam.commands.bench.settings import BASES, METHODS

SMALL = ParameterSet("small", "small", ((4, 3), (5,), (1,), (2, 3, 3, 2)))
EAGER = [name for name in rivals.implementation_names() if name != "compiled"]


@pytest.mark.parametrize(
    ("name", "tensors", "parameters"),
    [
        ("resnet18", 62, 11_689_512),
        ("resnet50", 161, 25_557_032),
        ("wrn28-10", 80, 36_479_194),
        ("vit-b16", 152, 86_567_656),
        ("vit-l16", 296, 304_326_632),
        ("gpt-1.3b", 292, 1_315_723_264),
        ("tiny2000", 2000, 100_000),
        ("demo-resnet", 29, 77_754),
        ("demo-vit", 43, 112_138),
    ],
)
def test_parameter_sets_have_the_published_sizes(name, tensors, parameters):
    assert (parameter_set(name).tensors, parameter_set(name).parameters) == (tensors, parameters)


def test_unknown_parameter_set_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match=r"resnet19.*resnet18"):
        parameter_set("resnet19")


def test_host_only_set_has_tensors_of_one_or_two_elements():
    shapes = host_only_set(152)
    assert shapes.tensors == 152
    assert {math.prod(shape) for shape in shapes.shapes} == {1, 2}


def test_sets_of_the_curves_have_the_size_that_was_asked():
    for parameters in (100_000, 3_000_000_000):
        shapes = scaled_set(parameters)
        assert shapes.tensors == 152 and shapes.parameters == pytest.approx(parameters, rel=1e-3)
    for tensors in (1, 7, 4096):
        assert (even_set(tensors, 100_000).tensors, even_set(tensors, 100_000).parameters) == (tensors, 100_000)


@pytest.mark.parametrize(
    ("method", "base", "expected"),
    [
        ("sam", "sgd", [4, 16, 4, 20]),
        ("fsam", "sgd", [8, 24, 4, 20]),
        ("eigensam", "sgd", [8, 20, 4, 20]),
        ("fsam", "adamw", [8, 24, 4, 28]),
        ("momentumsam", "sgd", [4, 16, 4, 20]),
        ("gsam", "sgd", [4, 20, 8, 24]),
        ("wsam", "adamw", [4, 20, 8, 32]),
        ("stablesam", "sgd", [4, 16, 4, 20]),
        ("vasso", "sgd", [8, 24, 4, 20]),
    ],
)
def test_byte_floors(method, base, expected):
    assert [mix.bytes_per_parameter for mix in passes(method, base).values()] == expected
    assert bytes_per_parameter(method, base) == sum(expected)


def test_the_floor_of_looksam_is_the_mean_of_its_steps_in_turn():
    climbing, *between = cycle_passes("looksam", "sgd")
    assert [mix.bytes_per_parameter for mix in climbing.values()] == [4, 20, 8, 28]
    assert [step.keys() for step in between] == [{"guard", "descend"}] * 4
    assert [mix.bytes_per_parameter for mix in between[0].values()] == [8, 24]
    assert bytes_per_parameter("looksam", "sgd") == (60 + 4 * 32) / 5


def test_written_in_place_arrays_are_among_the_read_ones():
    for method in METHODS:
        for base in BASES:
            for mix in (mix for step in cycle_passes(method, base) for mix in step.values()):
                assert mix.in_place <= min(mix.reads, mix.writes)


@pytest.mark.parametrize("base", list(BASES))
@pytest.mark.parametrize("method", list(METHODS))
def test_every_implementation_takes_the_same_steps(method, base):
    cell = Cell(SMALL, base, method, EAGER, threads=1, limit=0)
    runners = cell.build(EAGER)
    expected = set(EAGER) - set(cell.notes)
    assert {"fastsam", "fastsam-flat", "foreach"} <= expected
    assert ("authors" in expected) is (method in ("sam", "fsam", "eigensam"))
    if importlib.util.find_spec("pytorch_optimizer"):
        assert ("pytorch_optimizer" in expected) is (method in ("sam", "fsam", "gsam", "wsam"))
    assert set(runners) == expected
    flat = [torch.cat([p.detach().reshape(-1) for p in runner.parameters]) for runner in runners.values()]
    for other in flat[1:]:
        torch.testing.assert_close(other, flat[0], rtol=1e-5, atol=1e-7)


def test_an_implementation_that_climbs_elsewhere_is_refused(monkeypatch):
    def wrong_way(self, gradients):
        torch._foreach_copy_(self.backup, self.parameters)
        torch._foreach_add_(self.parameters, gradients, alpha=-1.0)

    monkeypatch.setattr(rivals.Foreach, "_climb_sam", wrong_way)
    with pytest.raises(RuntimeError, match="foreach and authors do not compute the same thing"):
        Cell(SMALL, "sgd", "sam", [], threads=1, limit=0).build(["authors", "foreach"])


def test_an_implementation_that_updates_otherwise_is_refused(monkeypatch):
    monkeypatch.setattr(rivals.Foreach, "second_step", lambda self: self.base_optimizer.step())
    with pytest.raises(RuntimeError, match="do not compute the same thing"):
        Cell(SMALL, "sgd", "sam", [], threads=1, limit=0).build(["authors", "foreach"])


@pytest.mark.parametrize("base", list(BASES))
@pytest.mark.parametrize("method", list(METHODS))
def test_foreach_that_never_waits_for_the_device_takes_the_same_steps(method, base):
    """What it does on a GPU, here on the CPU."""
    weights, eigenvector = SMALL.random(0, 1.0), SMALL.random(1, 1.0)
    ends = []
    for waits in (True, False):
        runner = rivals.build("foreach", method, base, SMALL.module(weights), eigenvector)
        runner.optimizer.waits = waits
        sequence = GradientSequence(SMALL)
        for kind in 3 * runner.cycle:
            for step in (runner.optimizer.first_step, runner.optimizer.second_step)[not kind.climbs :]:
                if kind.first_gradient or step == runner.optimizer.second_step:
                    runner.load_gradients(sequence.next())
                step()
                ends.append(torch.cat([p.detach().reshape(-1) for p in runner.parameters]))
    half = len(ends) // 2
    for waited, queued in zip(ends[:half], ends[half:], strict=True):
        torch.testing.assert_close(queued, waited)


def test_gradients_are_new_tensors_each_pass_unless_the_implementation_keeps_them():
    weights, eigenvector = SMALL.random(0, 1.0), SMALL.random(1, 1.0)
    sequence = GradientSequence(SMALL)
    for name, kept in (("authors", False), ("fastsam-flat", True)):
        runner = rivals.build(name, "sam", "sgd", SMALL.module(weights), eigenvector)
        runner.load_gradients(sequence.next())
        first = [p.grad for p in runner.parameters]
        given = sequence.next()
        runner.load_gradients(given)
        for before, p, g in zip(first, runner.parameters, given, strict=True):
            assert (p.grad.data_ptr() == before.data_ptr()) is kept
            assert p.grad.data_ptr() != g.data_ptr()
            assert torch.equal(p.grad, g)


def test_a_missing_method_becomes_a_note_and_not_a_number():
    cell = Cell(SMALL, "sgd", "eigensam", ["authors", "pytorch_optimizer"], threads=1, limit=0).measure(2)
    assert cell["implementations"]["pytorch_optimizer"]["ms"] is None
    assert cell["implementations"]["pytorch_optimizer"]["note"]
    assert cell["implementations"]["authors"]["ms"] > 0


def test_compile_limit_stops_what_swallows_exceptions_and_is_disarmed_afterwards():
    with pytest.raises(CompileLimit, match="compile > 600 s"), compile_limit(600):
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 0
        with contextlib.suppress(Exception):
            signal.raise_signal(signal.SIGALRM)
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_the_command_writes_a_result_that_the_report_reads(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.optimizer_step.parameter_set", lambda name: SMALL)
    monkeypatch.setattr("fastsam.commands.bench.optimizer_step.SMALL_SET", 1)
    threads, output = torch.get_num_threads(), tmp_path / "result.json"
    try:
        command = "--sets resnet18 --methods fsam --bases sgd --rivals fastsam authors --repeats 2 --threads 1"
        main([*command.split(), "--output", str(output)])
    finally:
        torch.set_num_threads(threads)
    result = json.loads(output.read_text())
    assert result["machine"]["threads"] == 1
    (cell,) = result["cells"]
    assert cell["bytes_per_parameter"] == 56
    assert cell["floor"]["ms"] == pytest.approx(sum(cell["floor"]["passes_ms"].values()), abs=1e-3)
    assert set(cell["implementations"]) == {"fastsam", "authors"}
    assert cell["implementations"]["fastsam"]["share"] is not None
    assert result["host"][0]["tensors"] == 152
    assert "F-SAM" in report.markdown(result)


RESULT = {
    "machine": {
        "cpu": "Some CPU", "cores": 2, "isa": "AVX2", "memory_gib": 16.0, "threads": 2, "torch": "2.13.0",
        "pytorch_optimizer": "4.1.0", "date": "2026-01-01 00:00 UTC",
    },
    "settings": {"repeats": 15},
    "cells": [
        {
            "set": "vit-b16", "title": "ViT-B/16", "base": "sgd", "method": "fsam", "tensors": 152,
            "parameters": 86_567_656, "bytes_per_parameter": 56, "floor": None,
            "implementations": {
                "fastsam": {"ms": 100.0, "share": 0.853, "times_fastsam": 1.0},
                "authors": {"ms": 412.3, "share": 0.2, "times_fastsam": 4.12},
                "compiled": {"ms": None, "note": "compile > 600 s"},
            },
        }
    ],
    "host": [{"base": "sgd", "method": "fsam", "tensors": 152, "ms": 0.234}],
}  # fmt: skip


def test_markdown_table_has_times_shares_ratios_and_notes():
    header, _, row = report.markdown_table(RESULT).splitlines()
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert [cell.strip() for cell in header.strip("|").split("|")][-2:] == [
        "authors' code",
        "foreach, compiled",
    ]
    assert cells == [
        "ViT-B/16 (86.6 M, 152 tensors)",
        "SGD",
        "F-SAM",
        "100 ms",
        "85%",
        "412 ms (4.1×)",
        "compile > 600 s",
    ]
    assert "0.23 ms" in report.markdown(RESULT)


def test_readme_block_is_replaced_and_nothing_else(tmp_path):
    readme, result = tmp_path / "README.md", tmp_path / "result.json"
    readme.write_text("before\n<!-- benchmark:begin -->\nold\n<!-- benchmark:end -->\nafter\n")
    result.write_text(json.dumps(RESULT))
    arguments = [str(result), "--readme", str(readme)]
    assert report.main([*arguments, "--check"]) == 1
    assert "old" in readme.read_text()
    assert report.main(arguments) == 0
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text and "412 ms" in text
    assert report.main([*arguments, "--check"]) == 0
    other = copy.deepcopy(RESULT)
    other["cells"][0]["implementations"]["authors"]["ms"] = 99.0
    result.write_text(json.dumps(other))
    assert report.main([*arguments, "--check"]) == 1


def test_readme_without_marks_is_refused():
    with pytest.raises(ValueError, match="benchmark:begin"):
        report.with_benchmark_block("no marks here", RESULT)


def gpu_result():
    row = {"title": "ViT-B/16", "base": "sgd", "method": "fsam", "dtype": "fp32", "ms": 1.24}
    names = (("fastsam", 1.0, 0.91), ("foreach", 2.05, 0.4), ("compiled", None, None))
    return {
        "machine": {**RESULT["machine"], "gpu": "H200", "gpu_memory_gib": 140.0, "cuda": "13.0"},
        "optimizer": [
            {**row, "implementation": name, "ms": times and times * 1.24, "times_fastsam": times, "share": share}
            for name, times, share in names
        ],
        "training": [
            {**row, "batch": 8, "method": method, "implementation": name, "ms": ms, "times_plain": plain}
            for method, name, ms, plain in (("plain", "plain", 5.0, 1.0), ("sam", "fastsam-graph", 11.0, 2.2))
        ],
    }  # fmt: skip


def test_the_block_of_a_gpu_has_shares_ratios_and_plain_steps(tmp_path):
    readme, result = tmp_path / "README.md", tmp_path / "gpu.json"
    blocks = "<!-- benchmark:begin -->\nof the CPU\n<!-- benchmark:end -->\n<!-- gpu:begin -->\nold\n<!-- gpu:end -->\n"
    readme.write_text(blocks)
    result.write_text(json.dumps(gpu_result()))
    assert report.main([str(result), "--readme", str(readme)]) == 0
    text = readme.read_text()
    assert "of the CPU" in text and "old" not in text and "H200 (140.0 GiB, CUDA 13.0)" in text
    assert "| optimizer step | fastsam | foreach |" in text, "what was not measured has no column"
    assert "| ViT-B/16, F-SAM, SGD, fp32 | 1.24 ms (91% of a copy) | 2.54 ms (2.0×) |" in text
    assert "| ViT-B/16, SAM, SGD, fp32, batch 8 | 11.0 ms (2.20 plain) |" in text
    with pytest.raises(ValueError, match="gpu:begin"):
        report.with_benchmark_block("no marks here", gpu_result())


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_the_readme_table_is_the_committed_result(pytestconfig, name):
    """Once there is one of a GPU, the README has its table, between ``<!-- gpu:begin -->`` and ``<!-- gpu:end -->``."""
    readme = pytestconfig.rootpath / "README.md"
    result = pytestconfig.rootpath / "benchmarks" / "results" / f"{name}.json"
    if not readme.exists() or not result.exists():
        pytest.skip(f"no README, or no result of a {name.upper()}")
    assert report.main([str(result), "--readme", str(readme), "--check"]) == 0
