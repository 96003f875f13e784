"""The frontier of accuracy against cost: how numbers are chosen, what is run again, what a run counts."""

import contextlib
import json
import math

import pytest
import torch
from run_here import Here

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from benchmarks.frontier import __main__ as command
from benchmarks.frontier import problems, protocol, report, training
from benchmarks.frontier.experiments import MomentumEigenSAM
from benchmarks.frontier.protocol import Plan, Records, Search
from benchmarks.frontier.table import BASE, BY_NAME, ROWS, Row, resolved
from benchmarks.frontier.training import Job
from benchmarks.marks import rewrite
from benchmarks.papers import tables, train
from fastsam.commands.training.data import ImageSet

SAM = BY_NAME["SAM"]
#: Where the made-up accuracy of a run is highest: reached by factors of the table, none of them at an edge.
BEST = {"lr": 0.1 * 1.2, "weight_decay": 0.001 * 3.0, "rho": 0.2 * 2.0 * 0.78}


@pytest.fixture
def runs(monkeypatch):
    """The jobs that are run, with results made up from their numbers."""
    seen = []

    def run(job):
        seen.append(job)
        numbers = dict(job.numbers)
        names = ("lr", "weight_decay") if job.row == "SGD" else ("rho",)
        distance = sum(abs(math.log(numbers[name] / BEST[name])) for name in names)
        accuracy = 0.9 - 0.05 * distance + 0.05 * (job.row != "SGD") + 0.001 * (job.seed % 7)
        gradients = 2.0 if job.row == "SAM" else 1.0
        return {
            "network": job.network, "row": job.row, "phase": job.phase, "numbers": numbers, "seed": job.seed,
            "key": job.key(), "accuracy": accuracy, "loss": 1.0, "seconds": 0.0, "gradients": gradients,
            "price": gradients + 0.1,
        }  # fmt: skip

    monkeypatch.setattr(protocol, "run", run)
    monkeypatch.setattr(protocol, "pool", lambda workers: contextlib.nullcontext(Here()))
    monkeypatch.setattr(protocol, "estimate", lambda plan, workers: "")
    return seen


def plan(*rows, seeds=3):
    return Plan(("ResNet",), (BASE, *rows), tuning_seeds=2, seeds=seeds, quick=False)


def test_numbers_are_chosen_on_validation_runs_and_every_row_starts_from_the_best_base(runs, tmp_path):
    records = Records(tmp_path / "runs.jsonl")
    assert protocol.execute(plan(SAM), records, 1, lambda text: None) == []
    base, sam = (Search(plan(SAM), records, "ResNet", row).chosen()["numbers"] for row in (BASE, SAM))
    assert (base["lr"], base["weight_decay"]) == pytest.approx((BEST["lr"], BEST["weight_decay"]))
    assert sam == pytest.approx({**BEST})
    tested = [job for job in runs if job.phase == "test" and job.row == "SAM"]
    assert {job.seed for job in tested} == {0, 1, 2}
    assert all(dict(job.numbers) == sam for job in tested)
    assert {job.seed for job in runs if job.phase != "test"}.isdisjoint(
        {job.seed for job in runs if job.phase == "test"}
    )


def test_every_row_has_the_same_budget_and_knows_its_numbers():
    assert {(len(row.first), len(row.second)) for row in ROWS} == {(4, 3)}
    start = {"lr": 0.1, "weight_decay": 1e-3, "rho": 0.2}
    assert resolved(start, {"rho": 2.0, "alpha": 2.0}) == {**start, "rho": 0.4, "alpha": 2.0}
    for row in ROWS:
        tried = [json.dumps(resolved(start, change), sort_keys=True) for change in (*row.first, *row.second)]
        assert len(set(tried)) == 7, row.name


def test_an_interrupted_command_makes_only_the_runs_that_are_missing(runs, tmp_path):
    path = tmp_path / "runs.jsonl"
    protocol.execute(plan(SAM), Records(path), 1, lambda text: None)
    everything = len(runs)
    assert everything == 2 * (7 * 2 + 3)
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines) == everything
    for torn in (lines[20][:15], lines[20][:-1]):  # killed while it wrote the line after the 20th
        path.write_bytes(b"".join(lines[:20]) + torn)
        runs.clear()
        protocol.execute(plan(SAM), Records(path), 1, lambda text: None)
        assert len(runs) == everything - 20
        again = [json.loads(line)["key"] for line in path.read_bytes().splitlines()]
        assert sorted(again) == sorted(json.loads(line)["key"] for line in lines)


def test_a_run_that_fails_is_named_and_the_others_go_on(runs, tmp_path, monkeypatch):
    whole = protocol.run

    def run(job):
        if job.row == "SAM" and job.phase == "test" and job.seed == 1:
            raise FloatingPointError("nothing left")
        return whole(job)

    monkeypatch.setattr(protocol, "run", run)
    records = Records(tmp_path / "runs.jsonl")
    failed = protocol.execute(plan(SAM), records, 1, lambda text: None)
    assert len(failed) == 1 and "SAM, test, seed 1" in failed[0] and "nothing left" in failed[0]
    assert [row["name"] for row in report.summary(plan(SAM), records)["ResNet"]["rows"]] == ["SGD"]


def test_what_is_asked_of_cheap_methods_is_answered_by_the_best_on_validation(runs, tmp_path):
    cheap = Row("cheap", "SAM", 1.0)
    records = Records(tmp_path / "runs.jsonl")
    asked = Plan(("ResNet",), (BASE, SAM, cheap), 2, 3, False)
    protocol.execute(asked, records, 1, lambda text: None)
    found = report.summary(asked, records)["ResNet"]
    assert found["best_of_two_gradients"] == "SAM"
    assert [entry["gain"] for entry in found["rows"]] == pytest.approx([0.0, 0.05, 0.05])
    assert [(a["method"], a["reached"]) for a in found["asked"]] == [("cheap", True), ("cheap", True)]
    found["rows"][2]["price"] = 1.2
    lucky = {**found["rows"][2], "name": "lucky", "test_accuracies": [1.0] * 3, "validation_accuracy": 0.0}
    again = report._compared([*found["rows"], lucky])["asked"]
    assert [(a["method"], a["reached"]) for a in again] == [(None, False), ("cheap", True)]


def test_the_interval_is_students():
    assert report.half_interval([1.0, 2.0, 3.0, 4.0]) == pytest.approx(3.182446 * 1.290994 / 2)
    assert math.isnan(report.half_interval([1.0]))


def test_nothing_cheaper_is_as_accurate_as_what_the_line_joins():
    rows = [{"name": name, "price": p, "test_accuracy": a} for name, p, a in
            (("a", 2.0, 0.95), ("b", 1.0, 0.9), ("c", 1.5, 0.85), ("d", 1.2, 0.93), ("e", 1.2, 0.92))]  # fmt: skip
    assert [row["name"] for row in report.undominated(rows)] == ["b", "d", "a"]


def test_the_splits_share_no_image_and_only_training_labels_are_wrong():
    from sklearn.datasets import load_digits

    digits = load_digits()
    right = {
        tuple(image.ravel().astype(int)): int(label) for image, label in zip(digits.images, digits.target, strict=True)
    }
    given, seen = training.problem("ResNet"), set()
    low, high = given.train[0].min(), given.train[0].max()
    wrong = []
    for images, labels in (given.train, given.validation, given.test):
        pixels = ((images - low) * 16 / (high - low)).round().int().flatten(1).tolist()  # 0 to 16, as they were
        wrong.append(sum(right[tuple(p)] != label for p, label in zip(pixels, labels.tolist(), strict=True)))
        assert seen.isdisjoint(map(tuple, pixels))
        seen.update(map(tuple, pixels))
    assert len(seen) == len(right) == 768 + 400 + 629
    assert wrong == [round(0.2 * 768), 0, 0]


@pytest.mark.parametrize(("row", "low", "high"), [
    ("SGD", 1.0, 1.0), ("SAM", 2.0, 2.0), ("SAM, every 2nd step", 1.5, 1.5), ("SAM, last half", 1.5, 1.5),
    ("AE-SAM", 1.0, 2.0),
])  # fmt: skip
def test_a_run_counts_its_gradients_and_is_the_same_again(row, low, high):
    given = training.problem("ResNet", quick=True)
    job = Job("ResNet", row, "test", tuple(sorted(given.numbers.items())), 0, quick=True)
    first, second = training.run(job), training.run(job)
    assert low <= first["gradients"] <= high
    assert first["price"] > 0
    assert (first["accuracy"], first["loss"]) == (second["accuracy"], second["loss"])
    json.dumps(first, allow_nan=False)


def test_tuning_never_sees_the_test_set(monkeypatch):
    given, seen, evaluate = training.problem("ResNet", quick=True), [], training.evaluate
    monkeypatch.setattr(
        training, "evaluate", lambda model, same, sets: seen.extend(x for x, _ in sets) or evaluate(model, same, sets)
    )
    for phase, images in (("first", given.validation[0]), ("second", given.validation[0]), ("test", given.test[0])):
        training.run(Job("ResNet", "SGD", phase, tuple(sorted(given.numbers.items())), 0, quick=True))
        assert torch.equal(seen.pop(), images)


def test_the_command_writes_json_table_and_picture_and_says_what_it_left_out(runs, tmp_path, monkeypatch, capsys):
    missing = Row("not there", "NoSuchSAM", 1.0)
    monkeypatch.setattr(command, "ROWS", (BASE, SAM, missing))
    document = tmp_path / "which.md"
    document.write_text("before\n<!-- frontier:begin -->\nold\n<!-- frontier:end -->\nafter\n")
    arguments = ["--rows", "SAM", "--networks", "ResNet", "--seeds", "3", "-o", str(tmp_path), "--document"]
    monkeypatch.setitem(BY_NAME, "not there", missing)
    assert command.main([*arguments, str(document), "--rows", "SAM", "not there"]) == 0
    results = json.loads((tmp_path / "frontier.json").read_text())
    assert results["skipped"] == {"not there": "fastsam has no NoSuchSAM"}
    assert [row["name"] for row in results["networks"]["ResNet"]["rows"]] == ["SGD", "SAM"]
    text = document.read_text()
    assert text.startswith("before\n<!-- frontier:begin -->\n**ResNet**") and "old" not in text
    assert text.endswith("<!-- frontier:end -->\nafter\n")
    assert "not there is left out: fastsam has no NoSuchSAM" in capsys.readouterr().out
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")


def test_photographs_have_the_split_and_the_numbers_of_the_papers_table_and_files_of_their_own(
    runs, tmp_path, monkeypatch, capsys
):
    def images_of(data, data_dir, size):
        assert (data, size) == ("elpv", 64)
        pixels = torch.arange(470 + 10).view(-1, 1, 1, 1).expand(-1, 1, 64, 64) / 2
        both = ImageSet(pixels.to(torch.uint8), torch.arange(480) % 2, ["functional", "defective"])
        return both[:470], both[470:]

    monkeypatch.setattr(train, "images_of", images_of)
    problems.problem.cache_clear()
    small = problems.problem("small ResNet on elpv", quick=True)
    assert [len(labels) for _, labels in (small.train, small.validation, small.test)] == [64, 394, 10]
    settings = next(row.settings for row in tables.read("elpv").rows if row.name == "small ResNet/SAM")
    assert small.numbers == {name: getattr(settings, name) for name in ("lr", "weight_decay", "rho")}
    assert small.build()(small.test[0]).shape == (10, 2)
    # the brightest are those of the test, which is normalised as the training set is
    assert small.train[0].mean().abs() < 1e-5 and small.test[0].min() > small.validation[0].min() > 0

    only_sam = ["--data", "elpv", "--rows", "SAM", "--seeds", "3", "-o", str(tmp_path), "--networks"]
    assert command.main([*only_sam, "small ResNet"]) == 0
    assert {job.network for job in runs} == {"small ResNet on elpv"}
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"frontier-elpv.{end}" for end in ("json", "jsonl", "md", "png")
    ]
    with pytest.raises(SystemExit):
        command.main([*only_sam, "ViT"])
    assert "'ViT' is none of those on elpv: small ViT, small ResNet, EfficientNet-Lite0" in capsys.readouterr().err

    def missing(data, data_dir, size):
        raise ImportError("elpv is the package elpv-dataset, which is not installed")

    monkeypatch.setattr(train, "images_of", missing)
    problems.problem.cache_clear()
    assert command.main([*only_sam, "small ViT"]) == 2
    assert "elpv-dataset, which is not installed" in capsys.readouterr().out


def test_a_document_without_markers_is_left_as_it_is(tmp_path):
    (tmp_path / "a.md").write_text("<!-- frontier:begin -->\n")
    with pytest.raises(ValueError, match="frontier:end"):
        rewrite(tmp_path / "a.md", "frontier", "x")
    assert (tmp_path / "a.md").read_text() == "<!-- frontier:begin -->\n"


def test_momentum_with_an_eigenvector_climbs_down_the_momentum_and_along_what_is_orthogonal_to_it():
    w = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))
    optimizer = MomentumEigenSAM([w], torch.optim.SGD, rho=0.1, alpha=0.5, freq=100, lr=0.1, momentum=0.9)

    def closure():
        loss = (w * w.new_tensor([3.0, 0.0, 4.0])).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    optimizer.eigenvector = [torch.tensor([0.6, 0.8, 0.0], dtype=torch.float64)]
    before = w.detach().clone()
    optimizer.first_step()
    b, v = before.new_tensor([0.6, 0.0, 0.8]), before.new_tensor([0.6, 0.8, 0.0])
    assert torch.allclose(w.detach() - before, -0.1 * (b + 0.5 * (v - (b @ v) * b)), rtol=0, atol=1e-12)
    optimizer.restore()


def test_a_report_runs_nothing_and_names_what_is_left(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "ROWS", (BASE, SAM, BY_NAME["GSAM"]))
    asked = ["--networks", "ResNet", "--seeds", "2", "-o", str(tmp_path)]
    assert command.main([*asked, "--rows", "SAM"]) == 0
    machine = json.loads((tmp_path / "frontier.json").read_text())["machine"]
    runs.clear()
    assert command.main([*asked, "--rows", "SAM", "GSAM", "--report"]) == 0
    found = json.loads((tmp_path / "frontier.json").read_text())
    assert not runs and found["machine"] == machine
    assert [row["name"] for row in found["networks"]["ResNet"]["rows"]] == ["SGD", "SAM"]
    assert found["skipped"] == {"on the ResNet: GSAM": "not all of their runs are finished"}
    assert "Not run: on the ResNet: GSAM" in (tmp_path / "frontier.md").read_text()
