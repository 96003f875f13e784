"""The reproduction harness: its tables, methods, runs that are killed, and what it says of wrong input."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("datasets")
from benchmarks.marks import with_block
from benchmarks.papers import methods, networks, results, tables, train
from benchmarks.papers.__main__ import main
from benchmarks.papers.settings import TrainSettings
from benchmarks.papers.variants import GradientComponent, ReverseSAM
from fastsam.commands.training.loop import take_step

ROOT = Path(__file__).parents[2]
TINY = ["epochs=2", "train_size=96", "batch_size=32"]


def run(*arguments: str | Path) -> int:
    return main([str(a) for a in arguments])


# ---- rows end to end -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "row"),
    [
        ("f_sam", "digits/resnet18/F-SAM"),
        ("eigen_sam", "digits/ViT-B_16 fine-tuned/Eigen-SAM"),
        ("f_sam_ablation", "digits/noise only"),
    ],
)
def test_a_row_of_each_paper_from_the_command_to_the_table(tmp_path, table, row):
    pattern = row.replace("B_16", "B/16")
    workers = 2 if table == "f_sam" else 1
    arguments = (table, "--data", "digits", "--rows", pattern, "--seeds", 2, "--workers", workers, "--output", tmp_path)
    assert run(*arguments, "--set", *TINY) == 0
    record = json.loads((tmp_path / "results.json").read_text())
    (entry,) = record["rows"]
    accuracies = [r["test_accuracy"] for r in entry["runs"]]
    assert entry["name"] == pattern and [r["seed"] for r in entry["runs"]] == [1, 2]
    assert entry["test_accuracy"]["mean"] == pytest.approx(sum(accuracies) / 2)
    assert entry["test_accuracy"]["std"] == pytest.approx(abs(accuracies[0] - accuracies[1]) / 2**0.5)
    for report in ("results.md", "report.html"):
        assert f"{sum(accuracies) / 2:.1f} ± " in (tmp_path / report).read_text()
    curve = (tmp_path / row.replace("/", "_").replace(" ", "_") / "seed-2" / "metrics.csv").read_text().splitlines()
    assert len(curve) == 3 and float(curve[2].split(",")[4]) == accuracies[1]


def test_the_sde_table_draws_its_six_panels(tmp_path):
    small = ["steps=4", "measure_every=2", "batches=4", "train_size=64", "hidden=3"]
    rows = ("--rows", "network/*SAM", "network/t*", "--seeds", 2, "--workers", 1)
    assert run("sde", *rows, "--output", tmp_path, "--set", *small) == 0
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [r["name"] for r in rows] == ["network/SAM", "network/third-order SDE"]
    columns, *lines = (tmp_path / "network_SAM" / "seed-1" / "metrics.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["0", "2", "4"]
    assert columns == "step,train_loss,test_loss,test_accuracy,parameter_norm,gradient_norm,top_eigenvalue"
    assert (tmp_path / "panels-network.png").stat().st_size > 20_000


def test_analysis_rows_measure_alignment_and_draw_it(tmp_path):
    small = ["epochs=1", "train_size=96", "batch_size=32", "measure_every=2", "measure_size=16", "freq=1"]
    rows = ("digits/*/Eigen-SAM", "digits/*/EGR", "digits/*/Reverse-SAM")
    arguments = ("eigen_sam_analysis", "--data", "digits", "--rows", *rows, "--seeds", 1, "--workers", 1)
    assert run(*arguments, "--output", tmp_path, "--set", *small) == 0
    for entry in json.loads((tmp_path / "results.json").read_text())["rows"]:
        assert 0 <= entry["alignment"]["mean"] <= 1 and entry["top_eigenvalue"]["runs"] == 1
    assert list(tmp_path.glob("curvature-*.png"))


# ---- killed and resumed ----------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from benchmarks.papers import train
from benchmarks.papers.__main__ import main
one_epoch = train.Training.one_epoch
def killed(self, *arguments, **options):
    row = one_epoch(self, *arguments, **options)
    if self.epoch == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return row
train.Training.one_epoch = killed
main(sys.argv[1:])
"""


def test_a_killed_run_ends_with_the_weights_of_an_undisturbed_one(tmp_path):
    """Eigen-SAM, momentum, augmentation and wrong labels: everything that has state."""
    small = ["epochs=3", "train_size=96", "batch_size=32", "freq=2", "cutout=3", "flip=true", "label_noise=0.2"]
    small += ["measure_every=4", "measure_size=8", "network=small ResNet", "network_options={}"]
    row = ("--rows", "digits/resnet18/Eigen-SAM", "--data", "digits", "--seeds", "1", "--workers", "1")
    arguments = ("eigen_sam", *row, "--save-seconds", "0", "--set", *small)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    killed = [sys.executable, "-c", KILLED, *arguments, "--output", str(tmp_path / "killed")]
    assert subprocess.run(killed, env=environment, cwd=ROOT).returncode == -signal.SIGKILL
    folders = [tmp_path / name / "digits_resnet18_Eigen-SAM" / "seed-1" for name in ("killed", "whole")]
    assert torch.load(folders[0] / "checkpoint.pt")["step"] == 6 and not (folders[0] / "result.json").exists()
    for name in ("killed", "whole"):
        assert run(*arguments, "--output", tmp_path / name) == 0
    ours, undisturbed = (torch.load(f / "checkpoint.pt")["payload"] for f in folders)
    for part in ("model", "optimizer"):
        torch.testing.assert_close(ours[part], undisturbed[part], rtol=0, atol=0)
    curvature = [(f / "curvature.csv").read_text() for f in folders]
    assert curvature[0] == curvature[1] and len(curvature[0].splitlines()) == 1 + 3 + 1
    curves = [(f / "metrics.csv").read_text().splitlines() for f in folders]
    assert [line.rsplit(",", 1)[0] for line in curves[0]] == [line.rsplit(",", 1)[0] for line in curves[1]]


def test_a_path_of_an_sde_goes_on_with_the_same_noise(tmp_path, monkeypatch):
    from benchmarks.papers import sde_runs

    small = ["steps=6", "measure_every=2", "batches=4", "train_size=64", "hidden=3"]
    arguments = ("sde", "--rows", "network/second*", "--seeds", 1, "--workers", 1, "--save-seconds", 0, "--set", *small)
    advance = sde_runs.ProcessPath.advance

    def interrupted(self):
        if self.step == 5:
            raise KeyboardInterrupt
        advance(self)

    with monkeypatch.context() as patch:
        patch.setattr(sde_runs.ProcessPath, "advance", interrupted)
        assert run(*arguments, "--output", tmp_path / "a") == 1
    for name in ("a", "b"):
        assert run(*arguments, "--output", tmp_path / name) == 0
    a, b = (tmp_path / n / "network_second-order_SDE" / "seed-1" / "metrics.csv" for n in ("a", "b"))
    assert a.read_text() == b.read_text()


def test_finished_runs_are_not_repeated_and_changed_settings_are_refused(tmp_path, monkeypatch, capsys):
    arguments = ("f_sam", "--data", "digits", "--rows", "digits/resnet18/SGD", "--seeds", 1, "--output", tmp_path)
    assert run(*arguments, "--set", *TINY) == 0
    monkeypatch.setattr(train, "Training", None)  # a run that trains fails
    assert run(*arguments, "--set", *TINY) == 0
    assert run(*arguments, "--set", *TINY, "lr=0.5") == 1
    assert "holds a run with lr=0.05, and this one has lr=0.5" in capsys.readouterr().err


# ---- tables ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", tables.names())
def test_every_row_has_its_own_name_and_a_network_that_fits_the_digits(name):
    table = tables.read(name, "digits")
    assert len({row.name for row in table.rows}) == len(table.rows)
    if table.kind == "sde":
        return
    for row in {json.dumps([r.settings.network, r.settings.network_options]): r for r in table.rows}.values():
        side = row.settings.image_size or 8
        network = networks.build(row.settings, 10, 1, side).eval()
        assert network(torch.randn(2, 1, side, side)).shape == (2, 10)
        assert sum(p.numel() for p in network.parameters()) < 500_000


def test_rows_of_the_papers_have_the_authors_settings_and_figures():
    row = next(r for r in tables.read("eigen_sam").rows if r.name == "cifar100/resnet18/Eigen-SAM")
    s = row.settings
    assert (s.epochs, s.batch_size, s.lr, s.weight_decay, s.rho, s.alpha, s.freq) == (
        200,
        256,
        0.1,
        5e-4,
        0.1,
        0.2,
        100,
    )
    assert row.reported["value"] == 78.51
    rows = {r.name: r for r in tables.read("f_sam").rows}
    s = rows["cifar100/resnet18/F-SAM"].settings
    assert (s.epochs, s.batch_size, s.lr, s.weight_decay, s.rho, s.lmbda) == (200, 128, 0.05, 1e-3, 0.2, 0.6)
    reported = [rows[f"cifar100/resnet18/{m}"].reported["value"] for m in ("SAM", "F-SAM", "F-SAM, lmbda 0.95")]
    assert reported == [80.78, 81.19, 81.32]


BAD = [
    (["f_samm"], "there is no table 'f_samm'; did you mean f_sam"),
    ([], "name a table"),
    (["f_sam", "--rows", "cifar10/resnet18/FSAM"], "did you mean cifar10/resnet18/F-SAM"),
    (["f_sam", "--set", "method=FSAM"], "unknown method 'FSAM'; did you mean F-SAM"),
    (["f_sam", "--set", "network=resnet19"], "did you mean resnet18"),
    (["f_sam", "--set", "learning_rate=1"], "unknown key 'learning_rate'"),
    (["f_sam", "--set", "rh=0.1"], "unknown key 'rh'; did you mean rho"),
    (["f_sam", "--set", "epochs=many"], "epochs='many' must be of type int"),
    (["f_sam", "--set", "rho"], "--set 'rho' must be NAME=VALUE"),
    (["f_sam", "--set", "rho=-1"], "rho=-1 must be at least 0"),
    (["f_sam", "--set", "batch_size=0"], "batch_size=0 must be at least 1"),
    (["f_sam", "--data", "digitz"], "did you mean digits"),
    (["f_sam", "--data-dir", "/nowhere"], "data_dir=/nowhere is not a folder"),
    (["sde", "--set", "process=SAN"], "unknown process 'SAN'"),
    (["f_sam", "--set", "ascent_share=0.0"], "ascent_share=0.0 must be above 0, and 1 at most"),
    (["f_sam", "--rows", "*/SGD", "--set", "ascent_share=0.5"], "ascent_share=0.5: SGD has one pass"),
    (["f_sam", "--report"], "--report is for tables with a search"),
    (["elpv", "--set", "epochs=1"], "benchmarks/results holds the runs of elpv as it is: name an --output"),
    (["f_sam", "--data", "digits", "--workers", "0"], "workers=0 must be at least 1"),
    (["f_sam", "--data", "digits", "--seeds", "-1"], "seeds=-1 must be at least 1"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=lambda a: " ".join(a) if isinstance(a, list) else "")
def test_wrong_input_is_named_and_nothing_runs(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[default]\nlr = 1", "unknown key 'default'; did you mean defaults"),
        ("[[override]]\nwhere = {}\nsets = {}", "unknown key 'sets'; did you mean set"),
        ('[[reported]]\nrow = "SAN"\nvalue = 1', "reported row 'SAN'; did you mean SAM"),
        ('[defaults]\nmethod = "SAM"\n[defaults]', "is no TOML"),
        ("", "lr is missing"),
        ("[defaults]\nlr = 1\n[search]\nseeds = 1", "the search has seeds, validation and rules"),
        ('[defaults]\nlr = 1\nnumbers_of = "SAN"', "row SAM has the numbers of 'SAN'; did you mean SAM"),
    ],
)
def test_a_table_file_with_a_mistake_is_refused(tmp_path, capsys, line, message):
    rows = (
        '[[rows]]\nname = "SAM"\nmethod = "SAM"\ndata = "digits"\nnetwork = "small ViT"\nepochs = 1\nbatch_size = 32\n'
    )
    (tmp_path / "own.toml").write_text(f"{rows}\n{line}\n")
    assert run(tmp_path / "own.toml", "--output", tmp_path / "out") == 1
    assert message in capsys.readouterr().err


def test_a_run_that_fails_does_not_stop_the_others(tmp_path, capsys):
    """One network has no such size; the message and the exit status say so, the other row is there."""
    table = tmp_path / "two.toml"
    common = 'data = "digits"\nmethod = "SGD"\nepochs = 1\nbatch_size = 32\ntrain_size = 32\nlr = 0.1\n'
    table.write_text(
        f'[[rows]]\nname = "fits/SGD"\nnetwork = "small ViT"\nimage_size = 12\n{common}'
        f'[[rows]]\nname = "not/SGD"\nnetwork = "small ViT"\nimage_size = 11\n{common}'
    )
    assert run(table, "--seeds", 1, "--workers", 1, "--output", tmp_path / "out") == 1
    assert "not/SGD, seed 1: image=11 is no multiple of patch=2" in capsys.readouterr().err
    assert [r["name"] for r in json.loads((tmp_path / "out" / "results.json").read_text())["rows"]] == ["fits/SGD"]


# ---- methods ---------------------------------------------------------------------------------------------------


class Quartic(nn.Module):
    """A loss whose second and third derivatives are not zero, in float64."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.w = nn.Parameter(torch.randn(3, dtype=torch.float64))
        self.b = nn.Parameter(torch.randn(2, dtype=torch.float64))

    def forward(self):
        return (self.w**4).sum() / 4 + (self.w[:2] * self.b**3).sum()


def flat(tensors) -> torch.Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


def gradient_at(model: Quartic, offset: torch.Tensor) -> torch.Tensor:
    other = Quartic()
    with torch.no_grad():
        for p, q, o in zip(other.parameters(), model.parameters(), offset.split([3, 2]), strict=True):
            p.copy_(q + o)
    return flat(torch.autograd.grad(other(), list(other.parameters())))


def settings_of(method: str, **changes) -> TrainSettings:
    base = TrainSettings(data="", network="", method=method, epochs=1, batch_size=1, lr=1.0, momentum=0.0)
    return dataclasses.replace(base, rho=0.1, **changes)


@pytest.mark.parametrize("method", ["SAM", "Reverse-SAM", "EGR"])
def test_sam_reverse_sam_and_egr_descend_along_what_they_are_defined_by(method):
    model = Quartic()
    settings = settings_of(method)
    optimizer = methods.build(settings, model.parameters())
    before, rho = flat(model.parameters()), settings.rho
    g = gradient_at(model, torch.zeros(5, dtype=torch.float64))
    u = g / g.norm()
    w = list(model.parameters())
    gradients = torch.autograd.grad(model(), w, create_graph=True)
    norm = torch.cat([x.flatten() for x in gradients]).norm()
    wanted = {
        "SAM": gradient_at(model, rho * u),
        "Reverse-SAM": 2 * g - gradient_at(model, -rho * u),
        "EGR": g + rho * flat(torch.autograd.grad(norm, w)),
    }[method]

    def closure():
        loss = model()
        methods.backward(settings, loss, model)
        return loss

    take_step(optimizer, closure, model)
    torch.testing.assert_close(before - flat(model.parameters()), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("method", "numbers", "evaluations"),
    [
        ("Momentum-SAM", {}, 6),
        ("GSAM", {"alpha": 0.3}, 12),
        ("WSAM", {"gamma": 0.7}, 12),
        ("LookSAM", {"alpha": 0.3, "k": 3}, 8),
        ("Stable SAM", {}, 12),
        ("VaSSO", {"theta": 0.2}, 12),
    ],
)
def test_the_rest_of_the_family_has_its_numbers_and_its_evaluations(method, numbers, evaluations):
    model, calls = Quartic(), []
    optimizer = methods.build(settings_of(method, **numbers, momentum=0.9, lr=1e-3), model.parameters())
    start = flat(model.parameters())

    def closure():
        calls.append(1)
        loss = model()
        loss.backward()
        return loss

    for _ in range(6):
        take_step(optimizer, closure, model)
    assert len(calls) == evaluations
    assert {name: optimizer.param_groups[0][name] for name in numbers} == numbers
    assert optimizer.param_groups[0]["rho"] == 0.1
    assert not torch.equal(flat(model.parameters()), start)


@pytest.mark.parametrize("component", ["full", "noise"])
def test_the_ablation_climbs_along_one_component_of_the_gradient(component, backend):
    model = Quartic()
    optimizer = GradientComponent(
        model.parameters(), torch.optim.SGD, rho=0.1, lmbda=0.8, component=component, lr=0.0, backend=backend
    )
    before, average = flat(model.parameters()), None
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        g = torch.randn(5, generator=generator, dtype=torch.float64)
        for p, part in zip(model.parameters(), g.split([3, 2]), strict=True):
            p.grad = part.clone()
        direction = g
        if average is not None:
            along = average * (g @ average) / (average @ average)
            direction = along if component == "full" else g - along
        with optimizer.perturbed():
            moved = flat(model.parameters()) - before
        torch.testing.assert_close(moved, 0.1 * direction / direction.norm(), rtol=1e-7, atol=1e-9)
        average = g if average is None else 0.8 * average + 0.2 * g


def test_the_ablations_vector_is_never_estimated():
    model = Quartic()
    settings = settings_of("noise only")
    optimizer = methods.build(settings, model.parameters())
    optimizer.param_groups[0].update(lr=0.0, freq=1)

    def closure():
        loss = model()
        loss.backward()
        return loss

    g = gradient_at(model, torch.zeros(5, dtype=torch.float64))
    for _ in range(3):
        take_step(optimizer, closure, model)
        torch.testing.assert_close(flat(optimizer.eigenvector), g)


def test_reverse_sam_restores_the_weights_after_an_error():
    model = Quartic()
    optimizer = ReverseSAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=1.0)
    before = flat(model.parameters())
    model().backward()
    optimizer.first_step(zero_grad=True)
    model().backward()
    model.w.grad[0] = float("nan")
    optimizer.second_step()
    assert torch.equal(flat(model.parameters()), before) and optimizer.found_inf


def test_the_exact_full_gradient_is_that_of_the_whole_training_set():
    row = tables.read("f_sam_ablation", "digits", {"train_size": 300, "batch_size": 128}).rows[-1]
    training = train.start(row.settings, 1, "cpu", None)
    training.model.eval()
    images, labels = (torch.cat(parts) for parts in zip(*training.batches.whole(), strict=True))
    loss = nn.functional.cross_entropy(training.model(images), labels)
    wanted = torch.autograd.grad(loss, list(training.model.parameters()))
    methods.before_step(row.settings, training, 0)
    torch.testing.assert_close(training.optimizer.eigenvector, list(wanted), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("count_in_epoch, due", [(False, [2, 4, 6, 8]), (True, [2, 4, 7, 9])])
def test_freq_counts_the_run_or_each_epoch(count_in_epoch, due, monkeypatch):
    """Every 2 steps of two epochs of 5; the authors start anew at 0 in each epoch."""
    row = tables.read("digits").rows[4]
    changes = {"epochs": 2, "train_size": 160, "batch_size": 32, "freq": 2, "count_in_epoch": count_in_epoch}
    settings = dataclasses.replace(row.settings, **changes)
    training = train.start(settings, 1, "cpu", None)
    vectors = []

    def note(optimizer, closure, model):
        loss = take_step(optimizer, closure, model)
        vectors.append(optimizer.eigenvector and [v.clone() for v in optimizer.eigenvector])
        return loss

    list(training.epochs(lambda step, place: methods.before_step(settings, training, place), note))
    before = [None, *vectors]
    changed = [i for i, v in enumerate(vectors) if (v is None) != (before[i] is None) or (v and not same(v, before[i]))]
    assert changed == due
    assert training.optimizer.estimate.eval_mode


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ---- pre-trained networks, and the committed result --------------------------------------------------------------


def test_a_checkpoint_gets_a_new_head_and_a_pickle_is_refused(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=16, patch_size=8
    )
    model = transformers.ViTForImageClassification(config)
    model.save_pretrained(tmp_path / "safe")
    network = networks.build(settings_of("SGD", network="pretrained", checkpoint=str(tmp_path / "safe")), 7, 1, 16)
    assert network(torch.randn(2, 1, 16, 16)).shape == (2, 7)
    torch.testing.assert_close(network.model.vit.state_dict(), model.vit.state_dict())
    (tmp_path / "pickle").mkdir()
    config.save_pretrained(tmp_path / "pickle")
    torch.save(model.state_dict(), tmp_path / "pickle" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot be opened"):
        networks.build(settings_of("SGD", network="pretrained", checkpoint=str(tmp_path / "pickle")), 7, 1, 16)


def test_the_document_shows_the_committed_result_of_the_settings_that_the_search_chose():
    folder = ROOT / "benchmarks" / "results"
    record = json.loads((folder / "digits_table.json").read_text())
    document = (ROOT / "docs" / "papers.md").read_text()
    assert with_block(document, "digits", results.markdown(record)) == document
    best = {row["name"]: row["best"] for row in json.loads((folder / "digits_search.json").read_text())["rows"]}
    for row in tables.read("digits").rows:
        assert {name: getattr(row.settings, name) for name in best[row.name]} == best[row.name]
        entry = next(e for e in record["rows"] if e["name"] == row.name)
        assert len(entry["runs"]) == 5 and results.settings_of(row) == entry["settings"]
