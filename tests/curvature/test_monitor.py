"""CurvatureMonitor, its picture, and `fastsam sharpness`."""

import contextlib
import csv
import importlib
import json
import math

import pytest
import torch
import torch.nn.functional as F
from reference import convnet, mlp
from torch import nn
from typer.testing import CliRunner

import fastsam
from fastsam import curvature
from fastsam.commands.sharpness import app
from fastsam.curvature import CurvatureMonitor, draw_panels
from fastsam.curvature.monitor import FIELDS

OPTIMIZERS = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.05),
    "SAM": lambda params: fastsam.SAM(params, torch.optim.SGD, lr=0.05, rho=0.1),
    "F-SAM": lambda params: fastsam.FriendlySAM(params, torch.optim.SGD, lr=0.05, rho=0.1, momentum=0.9),
    "Eigen-SAM": lambda params: fastsam.EigenSAM(params, torch.optim.SGD, lr=0.05, rho=0.1, freq=2),
}


def train(problem, optimizer, monitor=None, steps=6):
    rows = []
    for _ in range(steps):
        if monitor is not None:
            rows.append(monitor(problem.loss))
        if hasattr(optimizer, "first_step"):
            optimizer.step(problem.closure)
        else:
            optimizer.zero_grad()
            problem.closure()
            optimizer.step()
    return rows


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("make", [mlp, convnet])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_monitoring_changes_nothing_in_training(name, make, tmp_path):
    watched, alone = make(), make()
    optimizer, other = OPTIMIZERS[name](watched.params()), OPTIMIZERS[name](alone.params())
    torch.manual_seed(0)
    rows = train(watched, optimizer, CurvatureMonitor(optimizer, tmp_path / "runs" / "log.csv", every=2))
    torch.manual_seed(0)
    train(alone, other)
    assert torch.equal(watched.weights(), alone.weights())
    assert all(torch.equal(a, b) for a, b in zip(watched.model.buffers(), alone.model.buffers(), strict=True))
    assert [row is not None for row in rows] == [True, False] * 3
    written = read(tmp_path / "runs" / "log.csv")
    assert tuple(written[0]) == FIELDS and [int(row["step"]) for row in written] == [0, 2, 4]
    assert all(float(w[f]) == r[f] for w, r in zip(written, rows[::2], strict=True) for f in FIELDS)


@pytest.mark.parametrize("name", ["SGD", "SAM", "Eigen-SAM"])
def test_a_row_says_what_can_be_computed_by_hand(name, tmp_path):
    problem = mlp()
    optimizer = OPTIMIZERS[name](problem.params())
    train(problem, optimizer, steps=3)
    row = CurvatureMonitor(optimizer, tmp_path / "log.csv", rho=0.1, tolerance=1e-8)(problem.loss)
    pairs = curvature.top_eigenpairs(problem.loss, problem.model, tolerance=1e-8)
    g = torch.autograd.grad(problem.loss(), problem.params())
    assert row["loss"] == pytest.approx(problem.loss().item())
    assert row["top_eigenvalue"] == pytest.approx(float(pairs.eigenvalues[0]))
    assert row["gradient_norm"] == pytest.approx(float(torch.cat([x.reshape(-1) for x in g]).norm()))
    assert row["gradient_alignment"] == pytest.approx(curvature.alignment(g, pairs.vectors[0]), rel=1e-4)
    if name == "Eigen-SAM":
        for p, x in zip(problem.params(), g, strict=True):
            p.grad = x
        e = curvature.perturbation(optimizer)
    else:
        norm = torch.cat([x.reshape(-1) for x in g]).norm()
        e = [0.1 * x / norm for x in g]
    assert row["perturbation_norm"] == pytest.approx(float(torch.cat([x.reshape(-1) for x in e]).norm()))
    assert row["perturbation_alignment"] == pytest.approx(curvature.alignment(e, pairs.vectors[0]), rel=1e-4)
    before = problem.loss().item()
    with torch.no_grad():
        for p, x in zip(problem.params(), e, strict=True):
            p += x
    assert row["sam_gap"] == pytest.approx(problem.loss().item() - before)


def test_rows_go_to_tensorboard_and_to_wandb(tmp_path):
    class TensorBoard:
        seen = ()

        def add_scalar(self, tag, value, step):
            self.seen += ((tag, value, step),)

    class Wandb:
        seen = ()

        def log(self, values, step):
            self.seen += ((values, step),)

    problem = mlp()
    optimizer = OPTIMIZERS["SAM"](problem.params())
    board, run = TensorBoard(), Wandb()
    for writer, name in ((board, "a.csv"), (run, "b.csv")):
        row = CurvatureMonitor(optimizer, tmp_path / name, writer=writer)(problem.loss, step=300)
    assert ("curvature/loss", row["loss"], 300) in board.seen and len(board.seen) == len(FIELDS) - 1
    assert run.seen == (({f"curvature/{f}": row[f] for f in FIELDS[1:]}, 300),)
    with pytest.raises(TypeError, match="writer"):
        CurvatureMonitor(optimizer, tmp_path / "c.csv", writer=object())


def test_a_file_that_is_there_is_not_overwritten(tmp_path):
    problem = mlp()
    optimizer = OPTIMIZERS["SAM"](problem.params())
    CurvatureMonitor(optimizer, tmp_path / "log.csv")(problem.loss)
    with pytest.raises(FileExistsError, match="append"):
        CurvatureMonitor(optimizer, tmp_path / "log.csv")
    CurvatureMonitor(optimizer, tmp_path / "log.csv", append=True)(problem.loss, step=100)
    assert [row["step"] for row in read(tmp_path / "log.csv")] == ["0", "100"]


def test_a_measurement_that_is_not_finite_is_a_row_of_nan(tmp_path):
    problem = mlp()
    optimizer = OPTIMIZERS["SAM"](problem.params())
    monitor = CurvatureMonitor(optimizer, tmp_path / "log.csv", every=1)
    with pytest.warns(RuntimeWarning, match="step 0"):
        row = monitor(lambda: problem.loss() * math.nan)
    assert math.isnan(row["top_eigenvalue"]) and row["step"] == 0
    assert math.isfinite(monitor(problem.loss)["top_eigenvalue"])


def test_options_out_of_range_are_refused(tmp_path):
    optimizer = OPTIMIZERS["SAM"](mlp().params())
    for options in ({"every": 0}, {"rho": -1.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            CurvatureMonitor(optimizer, tmp_path / "log.csv", **options)
    assert not (tmp_path / "log.csv").exists()


def test_the_panels_are_drawn_over_seeds(tmp_path):
    pytest.importorskip("matplotlib")
    runs = {}
    for name in ("SGD", "SAM"):
        runs[name] = [tmp_path / f"{name}-{seed}.csv" for seed in range(2)]
        for path in runs[name]:
            problem = mlp()
            optimizer = OPTIMIZERS[name](problem.params())
            train(problem, optimizer, CurvatureMonitor(optimizer, path, every=2))
    draw_panels(runs, tmp_path / "panels.png")
    assert (tmp_path / "panels.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="common"):
        draw_panels({"SAM": []}, tmp_path / "panels.png")


# ---- fastsam sharpness -------------------------------------------------------------------------------------

MODULE = """
import torch
from torch import nn

def build():
    return nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 3))

def batches():
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        yield torch.randn(4, 5, generator=generator), torch.randint(0, 3, (4,), generator=generator)

def loss(logits, targets):
    return nn.functional.cross_entropy(logits, targets, label_smoothing=0.1)
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with a module that builds a model, its checkpoint, and data."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_project.py").write_text(MODULE)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 3))
    x, y = torch.randn(20, 5), torch.randint(0, 3, (20,))
    torch.save(model.state_dict(), "plain.pt")
    torch.save({"model": {f"module.{k}": v for k, v in model.state_dict().items()}, "epoch": 3}, "nested.pt")
    torch.save({"step": 5, "payload": {"optimizer": {"state": {}}, "model": model.state_dict()}}, "run.pt")
    with contextlib.suppress(ImportError):
        importlib.import_module("safetensors.torch").save_file(model.state_dict(), "model.safetensors")
    torch.save((x, y), "data.pt")
    torch.save({"inputs": x, "targets": y}, "named.pt")
    __import__("numpy").savez("data.npz", inputs=x.numpy(), targets=y.numpy())
    for damaged in ("junk.pt", "junk.npz"):
        (tmp_path / damaged).write_bytes(b"hello" * 100)
    model.eval()
    return model, x, y


def sharpness(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


@pytest.mark.parametrize(
    ("checkpoint", "data"),
    [
        ("plain.pt", "data.pt"),
        ("nested.pt", "named.pt"),
        ("run.pt", "data.npz"),
        ("model.safetensors", "data.pt"),
    ],
)
def test_the_command_measures_a_checkpoint(project, checkpoint, data):
    model, x, y = project
    if checkpoint.endswith("safetensors"):
        pytest.importorskip("safetensors")
    result = sharpness(
        checkpoint, "--model", "own_project:build", "--data", data, "--top", 2, "--trace", 10, "--chunk", 7,
        "--tolerance", 1e-4, "--json", "out.json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    out = json.loads(open("out.json").read())
    pairs = curvature.top_eigenpairs(lambda: F.cross_entropy(model(x), y), model, 2, tolerance=1e-4)
    assert out["eigenvalues"] == pytest.approx(pairs.eigenvalues.tolist(), rel=1e-3)
    assert out["samples"] == 20 and out["trace"]["standard_error"] > 0
    assert f"{out['eigenvalues'][0]:.4g}" in result.output


def test_the_command_takes_functions_of_the_users_and_draws_the_density(project):
    pytest.importorskip("matplotlib")
    result = sharpness(
        "plain.pt", "--model", "own_project:build", "--data", "own_project:batches", "--loss", "own_project:loss",
        "--density", "density.png",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert open("density.png", "rb").read(4) == b"\x89PNG"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("missing.pt",), "missing.pt"),
        (("plain.pt", "--model", "own_project:nothing"), "nothing"),
        (("plain.pt", "--model", "no_such_module:build"), "no_such_module"),
        (("plain.pt", "--model", "build"), "module:name"),
        (("plain.pt", "--data", "other.pt"), "other.pt"),
        (("data.pt",), "state dict"),
        (("plain.pt", "--loss", "no_such_loss"), "no_such_loss"),
        (("plain.pt", "--chunk", "0"), "chunk"),
        (("junk.pt",), "junk.pt is damaged"),
        (("plain.pt", "--data", "junk.npz"), "junk.npz is damaged"),
        (("plain.pt", "--device", "cuda:99"), "--device cuda:99"),
        (("plain.pt", "--trace", "1"), "--trace 1"),
    ],
    ids=str,
)
def test_the_command_names_what_it_cannot_use(project, arguments, message):
    checkpoint, *rest = arguments
    result = sharpness(checkpoint, "--model", "own_project:build", "--data", "data.pt", *rest)
    assert result.exit_code != 0
    assert message in result.output and "Traceback" not in result.output


def test_the_command_shows_its_numbers_before_a_file_that_cannot_be_written(project):
    result = sharpness(
        "plain.pt", "--model", "own_project:build", "--data", "data.pt", "--json", "no/such/folder/out.json"
    )
    assert result.exit_code == 1
    assert "eigenvalue" in result.output and "no/such/folder" in result.output
