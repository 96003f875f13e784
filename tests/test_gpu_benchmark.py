"""The benchmark for a GPU keeps what it can measure when something in it raises."""

import json

import pytest

from benchmarks import gpu, gpu_kernels
from fastsam.bench import rivals
from fastsam.bench.optimizer_step import Cell
from fastsam.bench.throughput import Plan, run

OPTIMIZER = Plan(parts=("optimizer",), models=("resnet18",), methods=("sam", "fsam"), rivals=("foreach", "authors"))
TRAINING = Plan(parts=("training",), methods=("sam",), training_rivals=("foreach",))


@pytest.fixture
def broken_foreach(monkeypatch):
    def build(*_):
        raise RuntimeError("CUDA error: no such luck\nwith more lines")

    monkeypatch.setitem(rivals._BUILDERS, "foreach", build)


def test_an_implementation_that_raises_is_named_and_the_others_are_measured(broken_foreach, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "SECTIONS", ((30, OPTIMIZER), (30, TRAINING)))
    monkeypatch.setenv("FASTSAM_BENCH_DEVICE", "cpu")
    assert gpu.main([str(tmp_path)]) == 1
    result = json.loads((tmp_path / "gpu.json").read_text())
    for part in ("optimizer", "training"):
        notes = {row["implementation"]: row["note"] for row in result[part] if row["ms"] is None}
        notes.pop("fastsam-graph", None)
        assert notes == {"foreach": "failed: RuntimeError: CUDA error: no such luck"}
        assert {"fastsam"} <= {row["implementation"] for row in result[part] if row["ms"] is not None}
    assert "foreach: failed: RuntimeError: CUDA error: no such luck" in (tmp_path / "gpu.md").read_text()


def test_a_cell_that_raises_is_named_and_the_next_is_measured(monkeypatch, tmp_path):
    measure = Cell.measure
    monkeypatch.setattr(Cell, "measure", lambda self, *a: measure(self, *a) if self.method == "fsam" else 1 / 0)
    monkeypatch.setattr(gpu, "SECTIONS", ((30, OPTIMIZER),))
    monkeypatch.setenv("FASTSAM_BENCH_DEVICE", "cpu")
    assert gpu.main([str(tmp_path)]) == 1
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert [each["why"] for each in result["left_out"]] == ["failed: ZeroDivisionError: division by zero"]
    assert {row["method"] for row in result["optimizer"]} == {"fsam"}


def test_elsewhere_an_exception_ends_the_run(broken_foreach):
    with pytest.raises(RuntimeError, match="no such luck"):
        run(Plan(**{**vars(OPTIMIZER), "quick": True}), lambda *_: None, lambda _: None)


def test_the_kernels_of_every_backend_that_there_is(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTSAM_BENCH_DEVICE", "cpu")
    monkeypatch.setattr(gpu_kernels.kernels, "backends", lambda: {"cuda": "available", "triton": "no GPU"})
    times = {"sgd": [1e3, 2e3, 3e3, 4e3], "adamw": None}
    monkeypatch.setattr(gpu_kernels, "_times", lambda *a: times[a[-1]] or 1 / 0)
    gpu_kernels.main([str(tmp_path)])
    lines = (tmp_path / "kernels.md").read_text().splitlines()
    assert sum(line.startswith("| cuda | fp32 | SAM | sgd | 8192 | 1000 (") for line in lines) == 1
    assert sum("failed: ZeroDivisionError" in line for line in lines) == 2 * len(gpu_kernels.CHUNKS)
    assert len(lines) == 2 + 2 + 2 * 4 * len(gpu_kernels.CHUNKS)
    assert gpu_kernels.device._SMALLEST_CHUNK == gpu_kernels.CHUNKS[0]
