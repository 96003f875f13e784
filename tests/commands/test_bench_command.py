"""`fastsam bench` writes what it says, compares with what it wrote, and says no in words."""

import copy
import errno
import itertools
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")

from typer.testing import CliRunner

from benchmarks import gpu, gpu_targets
from fastsam.commands.bench import (
    clock,
    compare,
    curves,
    networks,
    rivals,
    step_time,
    tables,
    throughput,
    training_step,
)
from fastsam.commands.bench.gradients import GradientSequence
from fastsam.commands.bench.parameter_sets import ParameterSet
from fastsam.commands.bench.settings import METHODS, PRECISIONS, cycle
from fastsam.commands.bench.throughput import Plan
from fastsam.commands.cli import app

PICTURES = {"methods.png", "training.png", "parameters.png", "tensors.png"}
QUICK = "bench --quick --rounds 2 --model vit-b16 --method sam --method fsam --rival foreach --threads 1".split()


def command(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A quick run of everything for one small model: what was printed, and the folder."""
    folder = tmp_path_factory.mktemp("bench")
    return command(*QUICK, "--dtype", "fp32", "--dtype", "bf16-autocast", "--output", folder), folder


@pytest.fixture
def result(finished):
    return json.loads((finished[1] / "results.json").read_text())


def test_a_quick_run_writes_numbers_a_table_and_pictures(finished):
    outcome, folder = finished
    assert outcome.exit_code == 0, outcome.output
    assert {path.name for path in folder.iterdir()} == PICTURES | {"results.json", "table.md", "report.html"}
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") == len(PICTURES) and "Momentum" in page
    for name in PICTURES:
        picture = (folder / name).read_bytes()
        assert picture.startswith(b"\x89PNG") and 5_000 < len(picture) < 150_000, name
    assert "Training step: tiny ViT" in outcome.output and "parameters.png" in outcome.output


def test_the_result_has_a_row_for_everything_that_was_asked(result):
    assert set(result) == {
        "format", "machine", "settings", "bandwidth", "optimizer", "training", "parameters", "tensors", "lines",
        "left_out", "seconds",
    }  # fmt: skip
    assert (result["format"], result["left_out"]) == (1, [])
    both = {(m, i) for m in ("sam", "fsam") for i in ("fastsam", "foreach")}
    assert {(row["method"], row["implementation"]) for row in result["optimizer"]} == both
    trained = {(row["dtype"], row["method"], row["implementation"]) for row in result["training"]}
    assert trained == {(d, *v) for d in ("fp32", "bf16-autocast") for v in both | {("plain", "plain")}}
    assert len(result["parameters"]) == 2 * len(curves.QUICK_SIZES)
    assert len(result["tensors"]) == 2 * len(curves.QUICK_COUNTS)
    assert {(line["curve"], line["implementation"]) for line in result["lines"]} == {
        (curve, name) for curve in ("parameters", "tensors") for name in ("fastsam", "foreach")
    }
    for row in result["optimizer"] + result["training"] + result["parameters"] + result["tensors"]:
        assert 0 < row["q1_ms"] <= row["ms"] <= row["q3_ms"]
    for row in result["training"]:
        assert row["images_per_s"] == pytest.approx(row["batch"] / row["ms"] * 1e3, rel=1e-2)


def test_the_table_says_what_the_result_says(result):
    row = next(r for r in result["optimizer"] if (r["method"], r["implementation"]) == ("fsam", "foreach"))
    row |= {"ms": 12.345, "q1_ms": 11.0, "q3_ms": 14.0, "times_fastsam": 2.5, "gb_per_s": 7.0, "share": 0.5}
    result["left_out"] = [{"what": "a thing", "why": "a reason"}]
    text = tables.markdown(result)
    assert "| F-SAM | foreach | 12.3 | 11.0–14.0 | 2.50 | 7.0 | 50% |" in text
    assert "Bytes a parameter at least: SAM 44, F-SAM 56" in text
    assert "| plain | SGD alone |" in text and "- a thing: a reason" in text
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert [heading.split(":")[0] for heading in headings] == [
        "## Optimizer step", "## Training step", "## Training step", "## Cost against parameters",
        "## Cost against tensors", "## Not measured",
    ]  # fmt: skip


def changed(result, factor, ours=True):
    """The result with fastsam's times, or the others', multiplied."""
    other = copy.deepcopy(result)
    for part in ("optimizer", "training", "parameters", "tensors"):
        for row in other[part]:
            if row["implementation"].startswith("fastsam") == ours:
                row |= {key: row[key] * factor for key in ("ms", "q1_ms", "q3_ms")}
    return other


def steady(result):
    """The result with quartiles close to the medians, as on a quiet machine."""
    for part in ("optimizer", "training", "parameters", "tensors"):
        for row in result[part]:
            row |= {"q1_ms": row["ms"] * 0.99, "q3_ms": row["ms"] * 1.01}
    return result


def against(monkeypatch, tmp_path, now, earlier, *more):
    """The command where measuring gives `now`, against a file with `earlier`."""
    monkeypatch.setattr(throughput, "run", lambda plan, show, write: now)
    monkeypatch.setattr("fastsam.commands.bench.plots.draw", lambda result, folder: [])
    (tmp_path / "earlier.json").write_text(earlier if isinstance(earlier, str) else json.dumps(earlier))
    return command(*QUICK, "--output", tmp_path / "out", "--against", tmp_path / "earlier.json", *more)


def test_a_regression_past_the_threshold_fails_and_is_named(monkeypatch, tmp_path, result):
    now = steady(result)
    outcome = against(monkeypatch, tmp_path, now, changed(now, 1 / 1.5))
    assert outcome.exit_code == 1
    assert "slower by more than 10%" in outcome.output and "1.50" in outcome.output
    assert "not the same" not in outcome.output
    assert (tmp_path / "out" / "results.json").exists()


@pytest.mark.parametrize(
    ("factor", "ours", "more"),
    [(1.0, True, ()), (1.5, True, ()), (1 / 1.5, False, ()), (1 / 1.5, True, ("--threshold", "0.6"))],
    ids=["the same", "faster now", "a rival slower", "below the threshold"],
)
def test_what_is_no_regression_passes(monkeypatch, tmp_path, result, factor, ours, more):
    now = steady(result)
    outcome = against(monkeypatch, tmp_path, now, changed(now, factor, ours), *more)
    assert outcome.exit_code == 0, outcome.output


def test_another_torch_is_said_and_compared(monkeypatch, tmp_path, result):
    earlier = {**result, "machine": {**result["machine"], "torch": "1.0"}}
    outcome = against(monkeypatch, tmp_path, result, earlier)
    assert outcome.exit_code == 0 and "not the same: torch was 1.0" in outcome.output


def test_slower_within_the_quartiles_is_noise(monkeypatch, tmp_path, result):
    now = steady(result)
    earlier = changed(now, 1 / 1.5)
    for part in ("optimizer", "training", "parameters", "tensors"):
        for row in earlier[part]:
            row["q3_ms"] = row["ms"] * 2
    assert against(monkeypatch, tmp_path, now, earlier).exit_code == 0


@pytest.mark.parametrize(
    ("earlier", "message"),
    [
        ("{broken", "no JSON"),
        ('{"cells": []}', "no result of fastsam bench"),
        ('{"format": 7}', "format 7"),
        ('{"format": 1}', "lacks machine"),
        (lambda r: {**r, "machine": {**r["machine"], "cpu": "Another"}}, "another device: cpu was Another"),
        (lambda r: {**r, "machine": {**r["machine"], "threads": 64}}, "another device: threads was 64"),
    ],
)
def test_a_file_that_cannot_be_compared_is_refused_before_measuring(monkeypatch, tmp_path, result, earlier, message):
    outcome = against(monkeypatch, tmp_path, None, earlier(result) if callable(earlier) else earlier)
    assert outcome.exit_code == 1
    assert message in outcome.output and "Traceback" not in outcome.output


def test_a_missing_file_and_one_with_nothing_in_common_are_refused(tmp_path, result):
    outcome = command(*QUICK, "--output", tmp_path, "--against", tmp_path / "none.json")
    assert outcome.exit_code == 1 and "none.json" in outcome.output
    for row in result["optimizer"]:
        row["model"] = "another"
    empty = {**result, "training": [], "parameters": [], "tensors": []}
    with pytest.raises(ValueError, match="in common"):
        compare.changes({**empty, "optimizer": []}, empty, 0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "resnet19"), "did you mean 'resnet18'"),
        (("--method", "f-sam"), "did you mean 'fsam'"),
        (("--rival", "for-each"), "did you mean 'foreach'"),
        (("--dtype", "fp23"), "did you mean 'fp32'"),
        (("--base", "adam"), "did you mean 'adamw'"),
        (("--part", "training-step"), "did you mean 'training'"),
        (("--device", "tpu"), "choose cpu, cuda"),
        (("--device", "mps"), "cannot be timed"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(tmp_path, arguments, message):
    outcome = command("bench", "--quick", "--output", tmp_path / "out", *arguments)
    assert outcome.exit_code == 1 and message in outcome.output
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_refused_before_measuring(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    outcome = command(*QUICK, "--output", tmp_path / "file" / "out")
    assert outcome.exit_code == 1 and "cannot be written to (Not a directory)" in outcome.output

    def full(self, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    outcome = command(*QUICK, "--output", tmp_path / "out")
    assert outcome.exit_code == 1 and "No space left on device" in outcome.output


def test_what_does_not_fit_in_memory_is_left_out_and_said(monkeypatch, tmp_path):
    monkeypatch.setattr(clock, "free_memory", lambda device: 100_000)
    outcome = command(*QUICK, "--part", "optimizer", "--part", "training", "--output", tmp_path)
    assert outcome.exit_code == 0, outcome.output
    written = json.loads((tmp_path / "results.json").read_text())
    assert all(row["ms"] is None and "does not fit" in row["note"] for row in written["training"])
    assert "does not fit" in (tmp_path / "table.md").read_text()


def test_implementations_share_the_memory_in_groups(monkeypatch):
    monkeypatch.setattr(clock, "free_memory", lambda device: 100)
    groups, notes = clock.groups_that_fit({"a": 40, "b": 50, "c": 10, "d": 91}, 10, torch.device("cpu"))
    assert groups == [["a", "b"], ["c"]] and set(notes) == {"d"}


def test_torchs_own_error_about_memory_becomes_a_note():
    with pytest.raises(clock.OutOfMemory), clock.out_of_memory():
        torch.empty(1 << 60)
    with pytest.raises(RuntimeError, match="shape"), clock.out_of_memory():
        torch.ones(2) @ torch.ones(3, 3)


def test_when_the_time_is_over_the_rest_is_named():
    written = []
    plan = Plan(quick=True, seconds=0.0, parts=("optimizer", "tensors"), models=("vit-b16",), methods=("sam",))
    result = throughput.run(plan, lambda what, done: None, written.append)
    assert not written and not result["optimizer"]
    reasons = {each["why"] for each in result["left_out"]}
    assert len(result["left_out"]) == 1 + len(curves.QUICK_COUNTS) and reasons == {"the time was over"}


@pytest.mark.parametrize("samples", [[3.0], [1.0, 9.0], [1.0, 2.0, 30.0], list(range(1, 8))])
def test_quartiles_are_never_outside_the_samples(samples):
    lower, median, upper = clock.quartiles(samples)
    assert min(samples) <= lower <= median <= upper <= max(samples)
    assert median == statistics.median(samples)


def test_the_line_is_that_of_the_points():
    xs = [10.0**k for k in range(5, 10)]
    line = curves.line_through(xs, [0.3 + 1.2e-6 * x for x in xs])
    assert line.fixed_ms == pytest.approx(0.3) and line.slope_ms == pytest.approx(1.2e-6)
    assert line.worst < 1e-9
    bent = curves.line_through(xs, [0.3 + 1.2e-6 * x * (2 if x == 1e7 else 1) for x in xs])
    assert bent.worst > 0.3
    assert curves.line_through([1, 10, 100], [1.0, 20.0, 200.0]).fixed_ms == 0  # never a negative cost


def test_peak_memory_counts_what_was_held_at_once():
    with clock.PeakMemory(torch.device("cpu")) as peak:
        first = torch.ones(25_000_000)
        second = first * 2  # 200 MB together
        del first, second
    if peak.mib is None:
        pytest.skip("the system does not tell")
    assert 180 < peak.mib < 230


def test_activations_are_counted_without_computing():
    network = networks.SMALL_NETWORKS["resnet18"]
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    module = network.build()
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = module(network.batch(16, torch.device("cpu"))[0])
    measured = sum(count for address, count in kept.items() if address not in weights)
    del loss
    assert network.activation_bytes(16) == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("method", METHODS)
def test_training_steps_of_all_implementations_end_with_the_same_weights(method):
    """A gradient that is kept from one pass to the next, or one pass too few, would show."""
    network = networks.SMALL_NETWORKS["vit-b16"]
    torch.manual_seed(0)
    original = network.build()
    eigenvector = [torch.randn_like(p) / 50 for p in original.parameters()]
    images, labels = network.batch(4, torch.device("cpu"))
    ends = {}
    for name in ("fastsam", "fastsam-flat", "foreach", "authors"):
        module = copy.deepcopy(original)
        try:
            runner = rivals.build(name, method, "sgd", module, eigenvector)
        except rivals.NotOffered:
            continue
        step = training_step.whole_step(
            runner, lambda module=module: torch.nn.functional.cross_entropy(module(images), labels).backward()
        )
        for _ in range(3 * len(runner.cycle)):
            step()
        ends[name] = torch.cat([p.detach().reshape(-1) for p in module.parameters()])
    start = torch.cat([p.detach().reshape(-1) for p in original.parameters()])
    way = (ends["fastsam"] - start).norm()
    for name, end in ends.items():
        assert (end - ends["fastsam"]).norm() < 1e-3 * way, name


@pytest.mark.parametrize("queued", [False, True])
def test_each_pass_sees_a_gradient_of_its_own(queued):
    class Recorder:
        def __init__(self, parameter):
            self.parameter, self.seen = parameter, []

        def first_step(self):
            self.seen.append(("first", self.parameter.grad.clone()))

        def second_step(self):
            self.seen.append(("second", self.parameter.grad.clone()))

    parameter = torch.nn.Parameter(torch.zeros(5))
    recorder = Recorder(parameter)
    gradients = GradientSequence(ParameterSet("five", "five", ((5,),)))
    runner, cpu = rivals.Runner(recorder, [parameter]), torch.device("cpu")
    if queued:
        times = step_time.queued_steps(runner, gradients, 3, cpu)
    else:
        times = [sum(pair) for pair in zip(*(step_time.step(runner, gradients, cpu) for _ in range(3)), strict=True)]
    assert [name for name, _ in recorder.seen] == ["first", "second"] * 3
    for (_, before), (_, after) in itertools.pairwise(recorder.seen):
        assert not torch.equal(before, after)
    assert parameter.grad is None and all(seconds > 0 for seconds in times)


def test_every_precision_trains_in_its_dtype():
    network = networks.SMALL_NETWORKS["vit-b16"]
    for name, precision in PRECISIONS.items():
        cell = training_step.TrainingCell(network, "adamw", precision, 4, [training_step.Variant("sam", "fastsam")], 0)
        rows = cell.measure(2)
        assert [row["method"] for row in rows] == ["plain", "sam"], name
        assert rows[0]["times_plain"] == 1.0 and all(row["ms"] > 0 for row in rows)


@pytest.mark.parametrize(("method", "evaluations"), [("sam", 10), ("momentumsam", 5), ("looksam", 6)])
def test_a_training_step_evaluates_as_often_as_its_method_says(monkeypatch, method, evaluations):
    """LookSAM's sample has all of its k steps, and its time is their mean."""
    calls = []
    made = training_step.whole_step
    monkeypatch.setattr(
        training_step, "whole_step", lambda runner, backward: made(runner, lambda: calls.append(backward()))
    )
    network = networks.SMALL_NETWORKS["vit-b16"]
    variant = training_step.Variant(method, "fastsam")
    cell = training_step.TrainingCell(network, "sgd", PRECISIONS["fp32"], 2, [variant], 0)
    monkeypatch.setattr(cell, "_seconds", lambda step, count: step() or 5.0)
    row = cell.measure(2)[1]
    taken = training_step.WARM_UP + 2  # calls; the plain step is not counted
    assert len(calls) * 5 == taken * len(cycle(method)) * evaluations
    assert row["ms"] == pytest.approx(5e3 / len(cycle(method)))


RESULT = {
    "optimizer": [
        {
            "model": model, "base": "sgd", "dtype": "fp32", "method": method, "implementation": name, "ms": 1.0,
            "share": share, "times_fastsam": times,
        }
        for model, method, name, share, times in (
            ("vit-b16", "sam", "fastsam", 0.95, 1.0),
            ("vit-b16", "fsam", "fastsam", 0.93, 1.0),
            ("vit-b16", "eigensam", "fastsam", 0.94, 1.0),
            ("vit-l16", "sam", "fastsam", 0.89, 1.0),
            ("vit-b16", "sam", "foreach", 0.3, 1.7),
            ("vit-b16", "fsam", "foreach", 0.3, 2.1),
            ("vit-b16", "fsam", "compiled", 0.8, 0.96),
            ("resnet18", "sam", "authors", 0.1, 12.0),
        )
    ],
    "training": [
        {"model": model, "method": method, "batch": batch, "implementation": name, "ms": ms, "times_plain": steps}
        for model, method, batch, name, ms, steps in (
            ("vit-b16", "sam", 128, "fastsam", 204.0, 2.04), ("resnet18", "sam", 128, "fastsam", 20.6, 2.06),
            ("vit-b16", "momentumsam", 128, "fastsam", 107.0, 1.07),
            ("vit-b16", "sam", 8, "foreach", 16.0, 2.9), ("vit-b16", "sam", 8, "fastsam-graph", 10.0, 1.8),
        )
    ],
}  # fmt: skip


def test_targets_are_met_missed_or_not_measured():
    met = {target.what: (target.measured, target.met) for target in gpu_targets.targets(RESULT)}
    assert met["vit-b16 fp32: 90% of the copy bandwidth, every method"] == ("93.0%", True)
    assert met["vit-l16 fp32: 90% of the copy bandwidth, every method"] == ("89.0%, without Eigen-SAM, F-SAM", False)
    fewer = {**RESULT, "optimizer": [row for row in RESULT["optimizer"] if row["method"] != "eigensam"]}
    first = next(gpu_targets.targets(fewer))
    assert (first.measured, first.met) == ("93.0%, without Eigen-SAM", None), "no verdict on what was not measured"
    assert met["gpt-1.3b bf16: 85% of the copy bandwidth, every method"] == (None, None)
    against = "bytes a parameter against"
    assert met[f"vit-b16 SAM: 1.8 times faster than foreach (44 {against} 84)"] == ("1.70×", False)
    assert met[f"vit-b16 F-SAM: 2 times faster than foreach (56 {against} 108)"] == ("2.10×", True)
    assert met[f"vit-b16 Eigen-SAM: 2.5 times faster than foreach (52 {against} 112)"] == (None, None)
    assert met["vit-b16: no compiled rival more than 1.05 times faster than fastsam"] == ("F-SAM: 1.04×", True)
    assert met["resnet18 SAM: 10 times faster than authors"] == ("12.00×", True)
    sam, momentum = f"SAM step is at most 2.05 plain steps (44 {against} 20)", "Momentum-SAM step is at most 1.06 plain"
    assert met[f"vit-b16 batch 128: a {sam}"] == ("2.040", True)
    assert met[f"resnet18 batch 128: a {sam}"] == ("2.060", False)
    assert met[f"vit-b16 batch 128: a {momentum} steps (44 {against} 20)"] == ("1.070", False)
    assert met[f"resnet18 batch 128: a {momentum} steps (44 {against} 20)"] == (None, None)
    assert met["vit-b16 batch 8: the graph 1.5 times faster than foreach SAM"] == ("1.60×", True)
    assert met["resnet18 batch 8: the graph 1.5 times faster than foreach SAM"] == (None, None)


def test_the_gpu_report_gives_verdicts_for_a_gpu_only(result):
    assert "missed" not in gpu.report(result) and "| met |" not in gpu.report(result)
    row = next(r for r in result["optimizer"] if (r["method"], r["implementation"]) == ("fsam", "foreach"))
    result["machine"] |= {"gpu": "H200", "gpu_memory_gib": 140.0, "cuda": "13.0"}
    for times, verdict in ((1.9, "**missed**"), (2.1, "met")):
        row["times_fastsam"] = times
        assert f"against 108) | {times:.2f}× | {verdict} |" in gpu.report(result)
    assert "H200 (140.0 GiB, CUDA 13.0), host" in gpu.report(result)


def test_without_a_gpu_the_graph_says_that_it_needs_one():
    cell = training_step.TrainingCell(
        networks.SMALL_NETWORKS["vit-b16"], "sgd", PRECISIONS["fp32"], 2,
        [training_step.Variant("sam", training_step.GRAPHS["fastsam"])], 0,
    )  # fmt: skip
    assert "needs a CUDA GPU" in cell.measure(1)[1]["note"]


def test_the_measurements_need_torch_and_nothing_else():
    """As on a GPU machine with nothing else installed."""
    program = (
        "import sys\n"
        "for name in ('rich', 'typer', 'matplotlib', 'numpy', 'pytest', 'sklearn'): sys.modules[name] = None\n"
        "import benchmarks.gpu, fastsam.commands.bench.throughput"
    )
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    subprocess.run([sys.executable, "-c", program], check=True, cwd=root, env=environment)
