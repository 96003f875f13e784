"""The benchmark for a GPU keeps what it can measure when something in it raises, dies, or cannot be written."""

import json
import os
import textwrap
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import gpu, gpu_kernels, gpu_targets, workers
from fastsam.commands.bench import rivals
from fastsam.commands.bench.foreach import Foreach
from fastsam.commands.bench.optimizer_step import Cell
from fastsam.commands.bench.throughput import Plan, run

ROOT = Path(__file__).parents[2]
OPTIMIZER = Plan(parts=("optimizer",), models=("resnet18",), methods=("sam", "fsam"), rivals=("foreach", "authors"))
TRAINING = Plan(parts=("training",), methods=("sam",), dtypes=("bf16-autocast",), training_rivals=("foreach",))
BESIDE = Plan(parts=("optimizer",), models=("resnet18",), methods=("sam",), rivals=())


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    monkeypatch.setenv("FASTSAM_BENCH_DEVICE", "cpu")


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """``measured(*plans)``: the benchmark of these, its processes within this one; its status and its result."""

    def run_here(module, arguments, seconds):
        assert module == "benchmarks.gpu"
        try:
            return f"ended with status {status}" if (status := gpu.main(arguments)) else None
        except SystemExit as death:
            return str(death)

    def measured(*plans, notes=()):
        monkeypatch.setattr(workers, "run", run_here)
        sections = tuple(gpu.Section(f"section {i}", 30, plan) for i, plan in enumerate(plans))
        monkeypatch.setattr(gpu, "SECTIONS", sections)
        monkeypatch.setattr(gpu, "BESIDE", (gpu.Section("beside", 30, BESIDE),))
        status = gpu.main([str(tmp_path), *(word for note in notes for word in ("--note", note))])
        return status, json.loads((tmp_path / "gpu.json").read_text())

    return measured


def of(result, part="optimizer"):
    return {row["implementation"] for row in result[part] if row["ms"] is not None}


def test_every_backend_is_measured_and_the_report_has_the_targets(measured, tmp_path):
    status, result = measured(OPTIMIZER, TRAINING, notes=["A note."])
    assert status == 0
    assert len(result["settings"]["plans"]) == 3
    assert of(result) == {"fastsam", "foreach", "authors", "fastsam-flat"} and of(result, "training")
    assert [entry["ended"] for entry in result["sections"]] == ["done"] * 3
    text = (tmp_path / "gpu.md").read_text()
    for part in ("A note.", "A stand-in", "| must reach | measured | |", "## Training step"):
        assert part in text


# ---- what raises -------------------------------------------------------------------------------------------------


@pytest.fixture
def broken_foreach(monkeypatch):
    def build(*_):
        raise RuntimeError("CUDA error: no such luck\nwith more lines")

    monkeypatch.setitem(rivals._BUILDERS, "foreach", build)


def test_an_implementation_that_raises_is_named_and_the_others_are_measured(broken_foreach, measured, tmp_path):
    status, result = measured(OPTIMIZER, TRAINING)
    assert status == 1
    for part in ("optimizer", "training"):
        notes = {row["implementation"]: row["note"] for row in result[part] if row["ms"] is None}
        assert notes == {"foreach": "failed: RuntimeError: CUDA error: no such luck"}
        assert {"fastsam"} <= of(result, part)
    assert "foreach: failed: RuntimeError: CUDA error: no such luck" in (tmp_path / "gpu.md").read_text()


def test_a_cell_that_raises_is_named_and_the_next_is_measured(monkeypatch, measured):
    measure = Cell.measure
    monkeypatch.setattr(Cell, "measure", lambda self, *a: measure(self, *a) if self.method == "fsam" else 1 / 0)
    status, result = measured(OPTIMIZER)
    assert status == 1
    assert {each["why"] for each in result["left_out"]} == {"failed: ZeroDivisionError: division by zero"}
    assert {row["method"] for row in result["optimizer"]} == {"fsam"}


def test_elsewhere_an_exception_ends_the_run(broken_foreach):
    with pytest.raises(RuntimeError, match="no such luck"):
        run(Plan(**{**vars(OPTIMIZER), "quick": True}), lambda *_: None, lambda _: None)


# ---- what dies ---------------------------------------------------------------------------------------------------


@pytest.fixture
def planted(monkeypatch, tmp_path):
    """``planted(name)``: from now on processes that build the optimizer of this implementation or backend die."""

    def planted(name):
        (tmp_path / "sitecustomize.py").write_text(
            textwrap.dedent(f"""
                import os
                from fastsam.commands.bench import rivals
                built = rivals.fastsam_optimizer
                def build(method, base, parameters, eigenvector, backend="auto"):
                    return os.abort() if backend == {name!r} else built(method, base, parameters, eigenvector, backend)
                rivals.fastsam_optimizer = build
                if {name!r} in rivals._BUILDERS:
                    rivals._BUILDERS[{name!r}] = lambda *_: os.abort()
            """)
        )
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))

    return planted


@pytest.mark.parametrize(
    ("backend", "implementation", "left"),
    [("cuda", "fastsam", {"foreach", "authors", "foreach-fused", "fastsam-flat"}),
     ("triton", "fastsam-flat", {"foreach", "authors", "foreach-fused", "fastsam"})],
)  # fmt: skip
def test_a_process_that_dies_costs_its_backend_alone(planted, monkeypatch, tmp_path, backend, implementation, left):
    planted(implementation)
    monkeypatch.setattr(gpu, "SECTIONS", [section for section in gpu.SECTIONS if section.name == "resnet18"])
    assert gpu.main([str(tmp_path / "out"), "--seconds", "150"]) == 1
    result = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert of(result) == left
    ended = {(entry["backend"], entry["section"]): entry["ended"] for entry in result["sections"]}
    assert ended[backend, "resnet18" if backend == "cuda" else "optimizer steps beside"] == "died of signal 6"
    assert f"was lost to {backend}: died of signal 6" in (tmp_path / "out" / "gpu.md").read_text()


def test_a_device_that_runs_nothing_any_more_ends_its_process_and_the_next_section_begins_in_another(
    monkeypatch, measured
):
    """An illegal access raises in the process that made it, and in everything after it."""
    measure, broken = Cell.measure, []

    def faulty(self, *arguments):
        if "fastsam" in self.names and self.method == "sam" and not faulty.done:
            broken.append("CUDA error: an illegal memory access was encountered")
        if broken:
            raise RuntimeError(broken[0])
        return measure(self, *arguments)

    faulty.done = False

    def found(device):
        if broken:
            faulty.done = True
            return broken.pop()
        return None

    monkeypatch.setattr(Cell, "measure", faulty)
    monkeypatch.setattr(workers, "broken", found)
    status, result = measured(OPTIMIZER, TRAINING)
    assert status == 1
    ended = [(entry["backend"], entry["section"], entry["ended"]) for entry in result["sections"]]
    fault = "CUDA error: an illegal memory access was encountered"
    assert ended == [
        ("cuda", "section 0", fault), ("cuda", "section 1", "done"),
        ("triton", "section 0", "done"), ("triton", "beside", "done"),
    ]  # fmt: skip
    assert of(result) == {"fastsam-flat", "foreach", "authors"}
    assert {"fastsam", "foreach"} <= of(result, "training")


def test_what_failed_with_a_broken_device_is_not_held_against_the_rivals():
    rows = [
        {"implementation": "fastsam", "ms": 1.0, "note": ""},
        {"implementation": "fastsam", "ms": None, "note": "failed: an illegal access"},
        {"implementation": "foreach", "ms": None, "note": "failed: an illegal access"},
        {"implementation": "authors", "ms": None, "note": "out of memory"},
    ]
    result = {"optimizer": [rows[2], *rows], "training": []}
    entry = {"backend": "cuda", "before": {"optimizer": 1, "training": 0}}
    gpu._drop_what_failed_with_it(result, entry)
    assert result["optimizer"] == [rows[2], rows[0], rows[1], rows[3]]


# ---- what is missing ---------------------------------------------------------------------------------------------


def test_a_full_disk_costs_the_files_and_not_the_run(measured, monkeypatch, tmp_path, capsys):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    replace = gpu._replace

    def full(path, text):
        if path.suffix == ".md":
            Path("/dev/full").write_text(text)
        replace(path, text)

    monkeypatch.setattr(gpu, "_replace", full)
    status, result = measured(OPTIMIZER)
    assert status == 0 and of(result) >= {"fastsam", "foreach"}
    assert not (tmp_path / "gpu.md").exists()
    said = capsys.readouterr().out
    assert "No space left on device" in said and "| must reach | measured | |" in said


def test_a_backend_that_is_not_there_is_named_and_the_other_measured(monkeypatch, measured, tmp_path):
    found = {"cuda": "not built: nvcc was not found", "triton": "available"}
    monkeypatch.setattr(workers, "available", lambda: found)
    status, result = measured(OPTIMIZER)
    assert status == 0 and of(result) == {"fastsam-flat", "foreach", "authors"}
    assert "Backend cuda: not built: nvcc was not found." in (tmp_path / "gpu.md").read_text()


@pytest.mark.parametrize("program", [gpu, gpu_kernels])
def test_without_a_gpu_the_reason_is_torchs(program, monkeypatch, tmp_path, capsys):
    def init():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nMore.")

    monkeypatch.delenv("FASTSAM_BENCH_DEVICE")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    with pytest.raises(SystemExit):
        program.main([str(tmp_path)])
    assert "driver on your system is too old (found version 11040).;" in capsys.readouterr().err


# ---- the kernels' times ------------------------------------------------------------------------------------------


def test_the_kernels_of_a_backend_line_by_line(monkeypatch, tmp_path):
    times = {"sgd": [1e3, 2e3, 3e3, 4e3], "adamw": None}
    monkeypatch.setattr(gpu_kernels, "_times", lambda *a: times[a[-1]] or 1 / 0)
    assert gpu_kernels.main([str(tmp_path), "--backend", "cuda"]) == 1
    lines = (tmp_path / "kernels.md").read_text().splitlines()
    assert sum(line.startswith("| cuda | fp32 | SAM | sgd | 8192 | 1000 (") for line in lines) == 1
    assert sum("failed: ZeroDivisionError" in line for line in lines) == 2 * len(gpu_kernels.CHUNKS)
    assert len(lines) == 1 + 2 * 4 * len(gpu_kernels.CHUNKS)
    assert gpu_kernels.device._SMALLEST_CHUNK == gpu_kernels.CHUNKS[0]


@pytest.mark.parametrize(("backend", "other", "name"), [("cuda", "triton", "cpu"), ("triton", "cuda", "torch")])
def test_a_backend_whose_kernels_die_leaves_the_others_lines(planted, tmp_path, backend, other, name):
    planted(name)
    assert gpu_kernels.main([str(tmp_path), "--seconds", "120"]) == 1
    text = (tmp_path / "kernels.md").read_text()
    assert f"| {backend} | died of signal 6 |" in text
    assert text.count(f"| {other} | fp32 |") == 4 * len(gpu_kernels.CHUNKS)
    assert f"| {backend} | fp32 |" not in text


# ---- the targets -------------------------------------------------------------------------------------------------


class Moved(TorchDispatchMode):
    """Bytes that operations read and write: every tensor among their arguments, and again what they change."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__

        def size(x):
            if isinstance(x, (list, tuple)):
                return sum(map(size, x))
            return x.numel() * x.element_size() if isinstance(x, torch.Tensor) else 0

        if name not in ("empty_like", "detach", "view", "_unsafe_view"):
            read = size(args[1:]) + (0 if "copy" in name else size(args[0]))
            written = size(args[0]) if name.endswith("_") else size(out)
            self.bytes += read + written
        return out


@pytest.mark.parametrize("method", gpu_targets.FOREACH_BYTES)
def test_the_bytes_of_foreach_are_those_of_its_operations(method):
    count = 1 << 16
    parameters = [torch.nn.Parameter(torch.ones(count))]
    foreach = Foreach(method, "sgd", parameters, [torch.ones(count)], foreach=True)
    foreach.waits = False  # as on a GPU
    for _ in range(3):
        parameters[0].grad = torch.ones(count)
        with Moved() as moved:
            foreach.first_step()
            foreach.second_step()
    assert moved.bytes / count == pytest.approx(gpu_targets.FOREACH_BYTES[method], abs=0.1)
