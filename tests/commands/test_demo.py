"""The demo in its quick form: it writes what it promises, repeats itself, uses fastsam's optimizers."""

import csv
import json
import math
import re
import sys
from base64 import b64encode
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

import fastsam
from benchmarks.demo import with_demo_block
from fastsam.commands import demo
from fastsam.commands.demo import experiment, report, settings
from fastsam.commands.demo import train as demo_train
from fastsam.commands.demo.train import Run, build_optimizer, measure_sharpness, train
from fastsam.commands.training.networks import small_resnet

PAIRS = {(model, method) for model in settings.MODELS for method in settings.METHODS}


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """One quick run of everything, shared by the tests that look at what came out."""
    output = tmp_path_factory.mktemp("demo") / "new" / "folder"
    return output, demo.run(output, quick=True)


@pytest.fixture(scope="module")
def digits():
    return demo_train.digits(settings.QUICK_DATA)


def _train(method, digits, seed=0):
    return train("ResNet", settings.QUICK_MODELS["ResNet"], method, settings.QUICK_METHODS[method], digits, seed)


# ---- what a run leaves behind ------------------------------------------------------------------------------


def test_picture_is_a_png_with_curves_in_every_axes(quick):
    from matplotlib.image import imread

    path = quick[0] / "training_curves.png"
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels = imread(path)
    height, width = pixels.shape[:2]
    assert height > 600 and width > 900
    for top in (0, height // 2):
        for left in (0, width // 2):
            quarter = pixels[top : top + height // 2, left : left + width // 2, :3]
            assert (quarter.max(axis=2) - quarter.min(axis=2) > 0.3).sum() > 500, "no coloured curves here"


def test_the_report_is_one_file_with_the_table_and_both_pictures(quick):
    output, results = quick
    html = (output / "report.html").read_text()
    for row in report.rows(results):
        assert re.search(r"<tr>" + "".join(f"<td[^>]*>{re.escape(cell)}</td>" for cell in row) + "</tr>", html)
    for picture in ("training_curves.png", "curvature.png"):
        assert b64encode((output / picture).read_bytes()).decode() in html
    assert not re.search(r"(?:src|href)=\"(?!data:)", html), "a file from elsewhere"


def test_the_first_models_table_comes_before_the_other_runs_are_done(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(settings, "QUICK_METHODS", {"SGD": {}})
    demo.run(tmp_path, epochs=1, quick=True)
    tables = re.split(r"Digits: accuracy, sharpness, time", capsys.readouterr().out)
    assert len(tables) == 3 and "ResNet" in tables[1] and "the other runs go on" in tables[1]
    assert tables[1].count("ViT") == 1, "only the line of the run that ends after the first table"
    assert tables[2].count("ViT") >= 1


def test_each_model_has_its_own_number_of_seeds_unless_one_is_asked_for(monkeypatch, tmp_path):
    from rich.console import Console

    asked = []
    monkeypatch.setattr(experiment, "processors", lambda: 2)
    monkeypatch.setattr(experiment, "_spread", lambda jobs, *_: asked.append([(j.model, j.seed) for j in jobs]) or ())
    monkeypatch.setattr(settings, "METHODS", {"SGD": {}})
    for seeds in (None, 2):
        experiment.run(Console(), seeds, None, False, tmp_path)
    assert asked == [
        [(model, seed) for model, count in settings.SEEDS.items() for seed in range(count)],
        [(model, seed) for model in settings.SEEDS for seed in range(2)],
    ]


def test_panels_show_alignment_and_eigenvalue_over_training(quick):
    from matplotlib.image import imread

    output, results = quick
    pixels = imread(output / "curvature.png")
    width = pixels.shape[1]
    for half in (pixels[:, : width // 2, :3], pixels[:, width // 2 :, :3]):
        assert (half.max(axis=2) - half.min(axis=2) > 0.3).sum() > 500, "no coloured curves here"
    chosen = settings.QUICK_CURVATURE
    steps = [0, 4, 8]  # every 4 of two epochs of four steps, the end with them
    watched = {(chosen.model, method) for method in chosen.methods}
    for run in results["runs"]:
        pair = run["model"], run["method"]
        assert [row["step"] for row in run["curvature"]] == (steps if pair in watched else [])
        if pair in watched:
            with open(output / "curvature" / f"{run['model']}-{run['method']}-{run['seed']}.csv", newline="") as file:
                written = list(csv.DictReader(file))
            assert [float(row["top_eigenvalue"]) for row in written] == [r["top_eigenvalue"] for r in run["curvature"]]
            assert all(0 <= row["perturbation_alignment"] <= 1 for row in run["curvature"])
    assert {(run["model"], run["method"]) for run in results["runs"] if run["curvature"]} == watched


def test_a_second_demo_may_have_the_same_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(settings, "QUICK_MODELS", {"ViT": settings.QUICK_MODELS["ViT"]})
    monkeypatch.setattr(settings, "QUICK_METHODS", {"SGD": {}})
    first, second = (demo.run(tmp_path, epochs=1, quick=True)["runs"][0] for _ in range(2))
    assert first["curvature"] == second["curvature"] and first["curvature"]


def test_the_demos_page_has_the_rows_of_the_kept_result():
    root = Path(__file__).parents[2]
    results = json.loads((root / "benchmarks" / "results" / "demo.json").read_text())
    table = (root / "docs" / "demo.md").read_text().split("<!-- demo:begin -->")[1].split("<!-- demo:end -->")[0]
    lines = [tuple(line.strip("| ").split(" | ")) for line in table.splitlines() if line.startswith("| ")]
    assert lines[2:] == report.rows(results)


def test_a_new_result_replaces_the_table_of_the_page_alone(quick):
    table = (quick[0] / "table.md").read_text()
    text = with_demo_block("before\n<!-- demo:begin -->\nold\n<!-- demo:end -->\nafter\n", quick[1])
    assert text == f"before\n<!-- demo:begin -->\n{table}<!-- demo:end -->\nafter\n"


def test_results_file_holds_every_model_and_method_with_its_numbers(quick):
    output, returned = quick
    results = json.loads((output / "results.json").read_text())
    assert results == json.loads(json.dumps(returned))
    assert {(run["model"], run["method"]) for run in results["runs"]} == PAIRS
    assert results["machine"]["torch"] == torch.__version__
    for run in results["runs"]:
        epochs = results["settings"]["models"][run["model"]]["epochs"]
        assert len(run["train_loss"]) == len(run["test_accuracy"]) == epochs
        assert all(math.isfinite(run[key]) for key in ("top_eigenvalue", "eigenvalue_residual", "loss_rise"))
        assert all(0 < o < s for o, s in zip(run["optimizer_ms"], run["step_ms"], strict=True))
        assert bool(run["eigenvector_ms"]) == (run["method"] == "Eigen-SAM")


def test_markdown_table_has_one_row_for_each_model_and_method(quick):
    output, results = quick
    text = demo.markdown_table(results)
    assert text == (output / "table.md").read_text()
    table = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert {len(row) for row in table} == {len(report.HEADERS)}
    assert {(row[0], row[1]) for row in table[2:]} == PAIRS


def test_table_shows_mean_and_spread_over_seeds():
    runs = [
        {
            "model": "ViT",
            "method": "SGD",
            "test_accuracy": [0.1, accuracy],
            "top_eigenvalue": 10.0,
            "loss_rise": 0.5,
            "step_ms": [4.0, 8.0, 6.0],
            "optimizer_ms": [1.0, 2.0, 3.0],
            "eigenvector_ms": [982.0],
        }
        for accuracy in (0.90, 0.94)
    ]
    results = {"settings": {"models": {"ViT": {}}, "methods": {"SGD": {}}}, "runs": runs}
    assert report.rows(results) == [("ViT", "SGD", "92.0 ± 2.8", "10.0 ± 0.0", "500.0 ± 0.0", "1.0", "6.0", "25.0")]


def test_terminal_table_shows_every_value_in_80_columns(quick):
    from io import StringIO

    from rich.console import Console

    shown = StringIO()
    results = {**quick[1], "runs": 2 * quick[1]["runs"]}  # as from two seeds, so that spreads are shown
    report.print_table(results, Console(file=shown, width=80))
    lines = [line.split() for line in shown.getvalue().splitlines()]
    assert all(" ".join(row).split() in lines for row in report.rows(results))


def test_without_a_terminal_every_finished_run_prints_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(settings, "QUICK_MODELS", {"ResNet": settings.QUICK_MODELS["ResNet"]})
    demo.run(tmp_path, epochs=1, quick=True)
    printed = capsys.readouterr().out
    assert "\x1b[" not in printed
    lines = [line.split()[:4] for line in printed.splitlines()]
    assert [lines.count(["ResNet", method, "seed", "0:"]) for method in settings.METHODS] == [1] * len(settings.METHODS)


# ---- training ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", settings.METHODS)
def test_a_seed_gives_the_same_run_again_whatever_the_global_generator_says(method, digits):
    torch.manual_seed(1)
    model, first = _train(method, digits)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    same, second = _train(method, digits)
    assert torch.equal(torch.get_rng_state(), state)
    assert (first.train_loss, first.test_accuracy) == (second.train_loss, second.test_accuracy)
    torch.testing.assert_close(model.state_dict(), same.state_dict(), rtol=0, atol=0)
    assert _train(method, digits, seed=1)[1].train_loss != first.train_loss


def test_processes_give_the_same_runs_as_this_process(monkeypatch, quick, tmp_path):
    """Runs are spread over processes when there are several: the numbers must not depend on it."""
    from rich.console import Console

    monkeypatch.setattr(settings, "MODELS", {"ResNet": settings.QUICK_MODELS["ResNet"]})
    monkeypatch.setattr(settings, "METHODS", {m: settings.QUICK_METHODS[m] for m in ("SGD", "Eigen-SAM")})
    monkeypatch.setattr(settings, "DATA", settings.QUICK_DATA)
    monkeypatch.setattr(experiment, "processors", lambda: 2)
    spread = experiment.run(Console(), seeds=1, epochs=None, quick=False, folder=tmp_path)
    assert spread["settings"]["runs_at_once"] == 2
    assert [run["method"] for run in spread["runs"]] == ["SGD", "Eigen-SAM"]
    alone = {run["method"]: run for run in quick[1]["runs"] if run["model"] == "ResNet"}
    for there in spread["runs"]:
        here = alone[there["method"]]
        for name in ("train_loss", "test_accuracy", "top_eigenvalue", "loss_rise"):
            assert here[name] == there[name], name


def test_methods_start_alike_and_then_differ(quick):
    for model in settings.MODELS:
        runs = {run["method"]: run for run in quick[1]["runs"] if run["model"] == model}
        losses = {method: run["train_loss"][-1] for method, run in runs.items()}
        assert len(set(losses.values())) == len(losses), f"two methods of {model} trained alike: {losses}"


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        ("SGD", torch.optim.SGD),
        ("SAM", fastsam.SAM),
        ("F-SAM", fastsam.FriendlySAM),
        ("Eigen-SAM", fastsam.EigenSAM),
        ("MomentumSAM", fastsam.MomentumSAM),
    ],
)
def test_optimizers_are_fastsams_with_the_settings_of_the_table(method, kind):
    chosen = settings.MODELS["ResNet"]
    optimizer = build_optimizer(small_resnet().parameters(), method, chosen, settings.METHODS[method])
    assert type(optimizer) is kind
    group = optimizer.param_groups[0]
    expected = {"lr": chosen.lr, "momentum": chosen.momentum, "weight_decay": chosen.weight_decay}
    rho = chosen.momentum_sam_rho if method == "MomentumSAM" else chosen.rho
    expected |= settings.METHODS[method] if method == "SGD" else {"rho": rho, **settings.METHODS[method]}
    assert {key: group[key] for key in expected} == expected


@pytest.mark.parametrize("method", settings.METHODS)
def test_batch_norm_counts_each_step_once(method, digits):
    model, run = _train(method, digits)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms and {int(norm.num_batches_tracked) for norm in norms} == {len(run.step_ms)}


def test_eigen_sam_estimates_when_it_is_due_and_in_eval_mode(digits):
    """With freq=3 before the steps 3 and 6 of 8."""
    optimizer = build_optimizer(small_resnet().parameters(), "Eigen-SAM", settings.MODELS["ResNet"], {"freq": 3})
    assert optimizer.estimate.eval_mode
    assert len(_train("Eigen-SAM", digits)[1].eigenvector_ms) == 2


# ---- sharpness ---------------------------------------------------------------------------------------------


def test_final_sharpness_is_that_of_the_final_weights_in_eval_mode(digits):
    torch.manual_seed(0)
    model, run = small_resnet(), Run("ResNet", "SGD", 0)
    x, y = digits[0][:32].pair()
    measure_sharpness(model, x, y, run)
    params = list(model.eval().parameters())
    before = [p.detach().clone() for p in params]
    loss = torch.nn.functional.cross_entropy(model(x), y)
    gradient = torch.autograd.grad(loss, params, create_graph=True)
    v = [torch.randn_like(p) for p in params]
    for _ in range(60):
        v = torch.autograd.grad(gradient, params, v, retain_graph=True)
        length = torch.stack([x.norm() for x in v]).norm()
        v = [x / length for x in v]
    hv = torch.autograd.grad(gradient, params, v)
    assert run.top_eigenvalue == pytest.approx(sum(float((a * b).sum()) for a, b in zip(v, hv, strict=True)), rel=1e-2)
    assert 0 < run.eigenvalue_residual <= settings.SHARPNESS_TOLERANCE
    length = torch.stack([g.norm() for g in gradient]).norm()
    with torch.no_grad():
        for p, g in zip(params, gradient, strict=True):
            p += settings.SHARPNESS_RHO / length * g
        rise = torch.nn.functional.cross_entropy(model(x), y) - loss
        for p, b in zip(params, before, strict=True):
            p.copy_(b)
    assert run.loss_rise == pytest.approx(float(rise), rel=1e-3)


# ---- bad input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [{"seeds": 0}, {"epochs": 0}])
def test_numbers_below_one_are_refused_before_anything_is_written(bad, tmp_path):
    with pytest.raises(ValueError, match=next(iter(bad))):
        demo.run(tmp_path / "out", **bad)
    assert not (tmp_path / "out").exists()


def test_a_missing_package_is_named_with_the_way_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None if name == "sklearn" else sys)
    with pytest.raises(ImportError, match=r"scikit-learn: pip install 'fastsam-optim\[demo\]'"):
        demo.run(tmp_path)
