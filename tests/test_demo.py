"""The demo in its quick form: it writes what it promises, repeats itself, uses fastsam's optimizers."""

import csv
import json
import math
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

import fastsam
from benchmarks.demo import with_demo_block
from fastsam import demo
from fastsam.curvature import hessian_vector_product
from fastsam.demo import experiment, report, settings
from fastsam.demo.data import load
from fastsam.demo.models import ResNet, VisionTransformer
from fastsam.demo.train import Run, build_optimizer, measure_sharpness, train

PAIRS = {(model, method) for model in settings.MODELS for method in settings.METHODS}


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """One quick run of everything, shared by the tests that look at what came out."""
    output = tmp_path_factory.mktemp("demo") / "new" / "folder"
    return output, demo.run(output, quick=True)


@pytest.fixture(scope="module")
def digits():
    return load(settings.QUICK_DATA)


def _train(method, digits, seed=0, model="ResNet"):
    return train(model, settings.QUICK_MODELS[model], method, settings.QUICK_METHODS[method], digits, seed)


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


def test_the_readme_has_the_rows_of_the_kept_result():
    root = Path(__file__).parent.parent
    results = json.loads((root / "benchmarks" / "results" / "demo.json").read_text())
    table = (root / "README.md").read_text().split("<!-- demo:begin -->")[1].split("<!-- demo:end -->")[0]
    lines = [tuple(line.strip("| ").split(" | ")) for line in table.splitlines() if line.startswith("| ")]
    assert lines[2:] == report.rows(results)


def test_a_new_result_replaces_the_table_of_the_readme_alone(quick):
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
    assert [sum(f"{method:10s} seed 0:" in line for line in printed.splitlines()) for method in settings.METHODS] == [
        1
    ] * len(settings.METHODS)


# ---- training ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", settings.METHODS)
def test_a_seed_gives_the_same_run_again_whatever_the_global_generator_says(method, digits):
    torch.manual_seed(1)
    first = _train(method, digits)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = _train(method, digits)
    assert torch.equal(torch.get_rng_state(), state)
    for name in ("train_loss", "test_accuracy", "top_eigenvalue", "loss_rise"):
        assert getattr(first, name) == getattr(second, name), name
    assert _train(method, digits, seed=1).train_loss != first.train_loss


def test_processes_give_the_same_runs_as_this_process(monkeypatch, quick, tmp_path):
    """Runs are spread over processes when there are several: the numbers must not depend on it."""
    from rich.console import Console

    monkeypatch.setattr(settings, "MODELS", {"ResNet": settings.QUICK_MODELS["ResNet"]})
    monkeypatch.setattr(settings, "METHODS", {m: settings.QUICK_METHODS[m] for m in ("SGD", "Eigen-SAM")})
    monkeypatch.setattr(settings, "DATA", settings.QUICK_DATA)
    monkeypatch.setattr(experiment, "_processors", lambda: 2)
    spread = experiment.run(Console(), seeds=1, epochs=None, quick=False, folder=tmp_path)
    assert spread["settings"]["runs_at_once"] == 2
    assert [run["method"] for run in spread["runs"]] == ["SGD", "Eigen-SAM"]
    alone = {run["method"]: run for run in quick[1]["runs"] if run["model"] == "ResNet"}
    for there in spread["runs"]:
        here = alone[there["method"]]
        assert here["train_loss"] == there["train_loss"]
        assert here["test_accuracy"] == there["test_accuracy"]


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
    ],
)
def test_optimizers_are_fastsams_with_the_settings_of_the_table(method, kind):
    chosen = settings.MODELS["ResNet"]
    optimizer = build_optimizer(ResNet(), method, chosen, settings.METHODS[method])
    assert type(optimizer) is kind
    group = optimizer.param_groups[0]
    expected = {"lr": chosen.lr, "momentum": chosen.momentum, "weight_decay": chosen.weight_decay}
    expected |= settings.METHODS[method] if method == "SGD" else {"rho": chosen.rho, **settings.METHODS[method]}
    assert {key: group[key] for key in expected} == expected


@pytest.mark.parametrize("method", settings.METHODS)
def test_batch_norm_counts_each_step_once(method, digits, monkeypatch):
    models = []
    monkeypatch.setattr(
        ResNet, "train", lambda self, mode=True: models.append(self) or torch.nn.Module.train(self, mode)
    )
    run = _train(method, digits)
    norms = [m for m in models[-1].modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms and all(norm.track_running_stats for norm in norms)
    assert {int(norm.num_batches_tracked) for norm in norms} == {len(run.step_ms)}


def test_second_pass_leaves_running_statistics_alone():
    from fastsam.demo.train import batch_norm_statistics_frozen

    model, images = ResNet().train(), torch.randn(8, 1, 8, 8)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with batch_norm_statistics_frozen(model):
        frozen = model(images)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    torch.testing.assert_close(model(images), frozen)  # normalised by the batch, as in training
    assert any(not torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


# ---- data, models, sharpness -------------------------------------------------------------------------------


def test_split_is_fixed_and_only_training_labels_are_noisy():
    clean = load(settings.DataSettings(label_noise=0.0))
    noisy = load(settings.DataSettings(label_noise=0.2))
    assert torch.equal(clean.train_images, noisy.train_images)
    assert torch.equal(clean.test_labels, noisy.test_labels)
    size = settings.DATA.train_size
    assert int((clean.train_labels != noisy.train_labels).sum()) == round(0.2 * size)
    assert len(clean.train_labels) + len(clean.test_labels) == 1797
    std, mean = torch.std_mean(clean.train_images)
    assert abs(mean) < 1e-5 and abs(std - 1) < 1e-5


@pytest.mark.parametrize("build", [VisionTransformer, ResNet])
def test_models_are_small_and_can_be_differentiated_twice(build):
    model = build().eval()
    assert 60_000 < sum(p.numel() for p in model.parameters()) < 200_000
    images, labels = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 3])
    assert model(images).shape == (4, 10)
    loss = torch.nn.functional.cross_entropy(model(images), labels)
    v = [torch.randn_like(p) for p in model.parameters()]
    product = hessian_vector_product(lambda: loss, model, v, method="exact")
    assert all(h.isfinite().all() for h in product) and any(h.any() for h in product)


def test_final_sharpness_is_that_of_the_final_weights_in_eval_mode(digits):
    torch.manual_seed(0)
    model, run = ResNet(), Run("ResNet", "SGD", 0)
    measure_sharpness(model, digits, run)
    params, (x, y) = list(model.eval().parameters()), digits.sharpness_subset()
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
    with pytest.raises(ImportError, match=r"scikit-learn: pip install 'fastsam\[demo\]'"):
        demo.run(tmp_path)
