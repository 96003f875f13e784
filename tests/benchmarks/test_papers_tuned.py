"""Tables whose numbers are chosen first: what is tried, what is run again, what a run counts, what the report says."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from run_here import Here

pytest.importorskip("datasets")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("scipy")

from benchmarks.papers import results, tables, train, tuned, tuned_command, tuned_report, tuned_run
from benchmarks.papers.__main__ import main
from benchmarks.papers.tuned import Tuned, execute, with_needed
from benchmarks.papers.tuned_run import Job
from benchmarks.resumable import Records

ROOT = Path(__file__).parents[2]
TABLE = tables.read("elpv", "digits")
LINE, LONG = "small ResNet", "small ResNet, 32 epochs"
#: Where the made-up accuracy of a run is highest; the table's factors reach all of it.
BEST = {"lr": 0.1 * 0.5, "weight_decay": 1e-3 * 5.0, "rho": 0.1 * 2.0, "sigma": 0.5}


@pytest.fixture
def runs(monkeypatch):
    """The jobs that are run, with results made up from their numbers; a method is worth 0.05."""
    seen: list[Job] = []

    def run(job):
        seen.append(job)
        numbers = tuned_run.numbers_of(job.settings)
        distance = sum(abs(math.log(numbers[name] / BEST[name])) for name in BEST if name in numbers)
        accuracy = 0.8 - 0.02 * distance + 0.05 * (job.settings.method != "SGD") + 0.001 * (job.seed % 7)
        return {
            "key": job.key(), "row": job.row, "phase": job.phase, "seed": job.seed, "numbers": numbers,
            "accuracy": accuracy, "balanced": accuracy, "loss": 1.0, "gradients": 2.0, "seconds": 3.0,
        }  # fmt: skip

    monkeypatch.setattr(tuned, "run", run)
    monkeypatch.setattr(tuned, "pool", lambda workers: contextlib.nullcontext(Here()))
    monkeypatch.setattr(tuned, "seconds_of", lambda settings, data_dir: 1.0)
    return seen


def rows(*methods: str, line: str = LINE) -> list[tables.Row]:
    wanted = [f"{line}/{method}" for method in methods]
    return [row for row in TABLE.rows if row.name in wanted]


def made(tmp_path, *chosen: tables.Row, seeds: int | None = None) -> Tuned:
    found = Tuned(TABLE, Records(tmp_path / "runs.jsonl"), seeds)
    assert execute(found, with_needed(found, list(chosen)), 1, lambda text: None) == []
    return found


# ---- the search --------------------------------------------------------------------------------------------


def test_every_method_has_the_same_budget_on_validation_images_and_starts_from_the_best_base(runs, tmp_path):
    found = made(tmp_path, *rows("F-SAM"))
    base, method = (found.chosen(row) for row in rows("SGD", "F-SAM"))
    assert (base.lr, base.weight_decay) == pytest.approx((BEST["lr"], BEST["weight_decay"]))
    assert tuned_run.numbers_of(method) == pytest.approx({**BEST, "lmbda": 0.9})
    for name in ("SGD", "F-SAM"):
        mine = [job for job in runs if job.row == f"{LINE}/{name}"]
        tuning, tests = [j for j in mine if j.phase != "test"], [j for j in mine if j.phase == "test"]
        assert len(tuning) == 6 and {j.settings.validation for j in tuning} == {394}
        assert [j.seed for j in tests] == [1, 2, 3, 4, 5] and {j.settings.validation for j in tests} == {0}
        assert {j.seed for j in tuning} == {1001}
    order = [(job.row.rpartition("/")[2], job.phase) for job in runs]
    assert order.index(("F-SAM", "first")) == 6, "methods come after the base's search"


def test_every_row_of_elpv_has_a_base_a_budget_of_six_and_the_split_of_the_photographs():
    table = tables.read("elpv")
    found = Tuned(table, Records(ROOT / "no such file"))
    split = json.loads((ROOT / "fastsam" / "commands" / "training" / "elpv_split.json").read_text())
    kept = split["cells"] - len(split["test"]) - len(split["validation"])
    assert table.search.validation == len(split["validation"]) and not set(split["test"]) & set(split["validation"])
    for row in table.rows:
        assert found.base(row).settings.method == "SGD" and row.settings.train_size == kept
        if row.numbers_of is None:
            rule = found.rule(row)
            assert (len(rule["first"]), len(rule["second"])) == (4, 2), row.name
            own = tuned_run.numbers_of(row.settings)
            assert {name for change in (*rule["first"], *rule["second"]) for name in change} <= set(own), row.name


def test_a_row_with_the_numbers_of_another_has_no_search_and_shares_its_runs(runs, tmp_path):
    line = f"{LONG}, what the perturbation follows"
    found = made(tmp_path, *rows("noise only", "F-SAM", line=line), seeds=2)
    source = found.chosen(rows("F-SAM", line=LONG)[0])
    noise = found.chosen(rows("noise only", line=line)[0])
    assert (noise.rho, noise.lmbda, noise.lr) == (source.rho, source.lmbda, source.lr)
    assert [job.row for job in runs if line in job.row] == [f"{line}/noise only"] * 2  # the others' are there already
    assert len(found.records.of(found.jobs(rows("F-SAM", line=line)[0], "test"))) == 2
    assert found.count(rows("noise only", line=line)[0], "first") == 0


def test_rows_that_a_change_makes_the_same_keep_the_numbers_of_the_one_that_is_left():
    table = tables.read("elpv", changes={"epochs": 1})
    assert LONG not in tuned.lines(table.rows)
    (noisy,) = (row for row in table.rows if row.name == f"{LONG}, 40 % of the labels drawn anew/SAM")
    assert noisy.numbers_of == f"{LINE}/SAM"


def test_a_row_may_have_fewer_or_more_seeds_than_its_table():
    found = Tuned(TABLE, Records(ROOT / "no such file"))
    (curvature,) = rows("SAM", line="EfficientNet-Lite0, curvature")
    assert (found.seeds(curvature), found.seeds(rows("SAM")[0])) == (2, 5)
    (quarter,) = rows("SAM", line="EfficientNet-Lite0, a quarter of the images")
    assert found.seeds(quarter) == 10
    fewer = Tuned(TABLE, Records(ROOT / "no such file"), 3)
    assert (fewer.seeds(curvature), fewer.seeds(quarter)) == (2, 3)


def test_a_row_may_train_on_every_fourth_image():
    settings = rows("SGD", line="EfficientNet-Lite0, a quarter of the images")[0].settings
    every = dataclasses.replace(settings, train_every=0)
    quarter, whole = (train.start(s, 1, "cpu", None).batches._train for s in (settings, every))
    assert torch.equal(quarter.images, whole.images[::4]) and len(quarter) == 150


def test_a_killed_command_loses_the_run_at_hand_and_repeats_none(runs, tmp_path, monkeypatch):
    whole, count = tuned.run, 0

    def killed(job):
        nonlocal count
        count += 1
        if count == 9:
            raise KeyboardInterrupt
        return whole(job)

    one_by_one = lambda executor, run, jobs: ((job, run(job)) for job in jobs)  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(tuned, "run", killed)
        patch.setattr(tuned, "outcomes", one_by_one)
        with pytest.raises(KeyboardInterrupt):
            made(tmp_path, *rows("SAM"))
    assert len(Records(tmp_path / "runs.jsonl").by_key) == 8
    runs.clear()
    made(tmp_path, *rows("SAM"))
    assert len(runs) == 2 * (6 + 5) - 8
    runs.clear()
    made(tmp_path, *rows("SAM"))
    assert runs == []


def test_a_run_that_fails_is_named_and_its_row_is_not_reported(runs, tmp_path, monkeypatch):
    whole = tuned.run

    def run(job):
        if job.row == f"{LINE}/SAM" and job.phase == "test" and job.seed == 2:
            raise FloatingPointError("nothing left")
        return whole(job)

    monkeypatch.setattr(tuned, "run", run)
    found = Tuned(TABLE, Records(tmp_path / "runs.jsonl"))
    (failed,) = execute(found, with_needed(found, rows("SAM")), 1, lambda text: None)
    assert f"{LINE}/SAM, test, seed 2" in failed and "FloatingPointError: nothing left" in failed
    text = tuned_report.markdown(tuned_report.summary(found, TABLE.rows, {"cpu": "some", "date": "2026-01-01"}))
    assert "SAM (10 of 11 runs)" in text and "| SAM |" not in text


def test_a_record_is_known_by_what_a_run_depends_on():
    row = rows("SAM")[0]
    job = Job(row.name, "test", row.settings, 1)
    assert job.key() == dataclasses.replace(job, row="another", phase="first").key()
    changed = [dataclasses.replace(row.settings, rho=0.3), dataclasses.replace(row.settings, validation=394)]
    others = [dataclasses.replace(job, settings=s) for s in changed] + [dataclasses.replace(job, seed=2)]
    assert len({j.key() for j in [job, *others]}) == 4


# ---- one run -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "gradients"),
    [("Momentum-SAM", 1.0), ("F-SAM, first pass on a quarter", 1.25), ("Eigen-SAM", 2.0 + (2 * 5 + 1) * 1 / 2)],
)
def test_a_run_counts_its_gradients_and_averages_its_classes(method, gradients):
    """Eigen-SAM here estimates before the second of two steps: one more gradient, and five products of two."""
    (row,) = rows(method, line="small ViT")
    small = dict(epochs=1, train_size=64, batch_size=32, freq=1, rho=0.05, measure_every=2, measure_size=8)
    job = Job(row.name, "test", dataclasses.replace(row.settings, **small), 1)
    record = tuned_run.run(job)
    assert record["gradients"] == pytest.approx(gradients)
    assert record["key"] == job.key() and 0 <= record["balanced"] <= 1 and record["loss"] > 0
    assert [point[0] for point in record["curve"]] == [0, 2] and all(0 <= p[2] <= 1 for p in record["curve"])
    if method == "Momentum-SAM":
        again = tuned_run.run(job)
        assert {**record, "seconds": 0} == {**again, "seconds": 0}


# ---- the report --------------------------------------------------------------------------------------------


def test_the_report_says_what_is_told_apart_and_what_has_not_run(runs, tmp_path):
    found = made(tmp_path, *rows("SAM", "ASAM"), seeds=3)
    for record in found.records.by_key.values():  # ASAM's lead is as large in one seed and missing in the others
        if record["row"] == f"{LINE}/ASAM" and record["phase"] == "test":
            record["accuracy"] -= 0.02 * record["seed"]
    summed = tuned_report.summary(found, TABLE.rows, {"cpu": "some", "date": "2026-01-01"})
    base, sam, asam = summed["lines"][LINE]["rows"]
    assert sam["accuracy over base"] == pytest.approx([0.05, 0.0], abs=1e-9)
    gains = [a - b for a, b in zip(asam["accuracy"], base["accuracy"], strict=True)]
    centre, spread = sum(gains) / 3, 0.02  # equidistant by 0.02
    assert asam["accuracy over base"] == pytest.approx([centre, 4.302653 * spread / 3**0.5], rel=1e-5)
    text = tuned_report.markdown(summed)
    assert "Above SGD by accuracy: SAM." in text
    assert "Not told apart from it (the interval contains 0): ASAM." in text
    assert "F-SAM (0 of 9 runs)" in text and "Not run yet: EfficientNet-Lite0." in text
    cells = next(line for line in text.splitlines() if line.startswith("| SAM |")).split(" | ")
    assert cells[1].startswith(f"{100 * sum(sam['accuracy']) / 3:.1f} ± ") and cells[3] == "+5.0 ± 0.0"
    short = tuned_report.short(summed).splitlines()
    assert short[0] == f"| | gradients a step | {LINE} |"
    assert short[3] == f"| SAM | 2.00 | {100 * sum(sam['accuracy']) / 3:.1f} (**+5.0 ± 0.0**) |"
    assert short[2].endswith(f"| {100 * sum(base['accuracy']) / 3:.1f} |") and "**" not in short[4]
    assert [path.name for path in tuned_report.draw(summed, tmp_path)] == ["elpv-differences.png"]


def test_curvature_is_a_table_and_a_picture_of_its_own(runs, tmp_path):
    line = "EfficientNet-Lite0, curvature"
    found = made(tmp_path, *rows("SAM", line=line), seeds=1)
    for record in found.records.by_key.values():
        record["curve"] = [[0, 9.0, 0.1], [10, 4.0, 0.3]]
    summed = tuned_report.summary(found, rows("SGD", "SAM", line=line), {"cpu": "some", "date": "2026-01-01"})
    assert "| SAM | 4 | 0.200 |" in tuned_report.markdown(summed)
    assert [path.name for path in tuned_report.draw(summed, tmp_path)] == ["elpv-curvature.png"]


def test_the_command_writes_its_report_and_the_page_between_its_marks(runs, tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text("before <!-- elpv:begin --><!-- elpv:end --> after")
    (readme := tmp_path / "readme.md").write_text("of us <!-- elpv:begin --><!-- elpv:end -->")
    monkeypatch.setattr(tuned_command, "DOCUMENT", page)
    monkeypatch.setattr(tuned_command, "README", readme)
    monkeypatch.setattr(tuned_command, "ROOT", tmp_path)
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(tuned_command, "open_dataset", lambda *a, **k: None)
    assert main(["elpv", "--rows", f"{LINE}/SAM", "--seeds", "2", "--workers", "1"]) == 0
    there = len(runs)
    assert main(["elpv", "--report", "--seeds", "2"]) == 0 and len(runs) == there
    folder = tmp_path / "benchmarks" / "results"
    text = page.read_text()
    assert (folder / "elpv.md").read_text().rstrip() in text and text.startswith("before") and text.endswith("after")
    assert "](../benchmarks/results/elpv-differences.png)" in text
    assert f"| | gradients a step | {LINE} |" in readme.read_text() and readme.read_text().startswith("of us <!--")
    assert len((folder / "elpv.jsonl").read_text().splitlines()) == 2 * (6 + 2)


def test_the_page_shows_what_the_committed_runs_say():
    folder = ROOT / "benchmarks" / "results"
    table = tables.read("elpv")
    committed = json.loads((folder / "elpv.json").read_text())
    found = Tuned(table, Records(folder / "elpv.jsonl"))
    assert tuned_report.summary(found, table.rows, committed["machine"]) == committed
    assert tuned_report.markdown(committed).rstrip() in (ROOT / "docs" / "evidence.md").read_text()
    assert tuned_report.short(committed) in (ROOT / "README.md").read_text()
