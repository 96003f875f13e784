"""fastsam.checkpoint: files that survive a crash and run no code."""

import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from reference import build_optimizer, mlp
from reference.scripted import bits, state_bits

from fastsam.loop import checkpoint
from fastsam.schedules import CosineSchedule


def trained(method="F-SAM sigma=0.5 lmbda=0.9", base="SGD momentum", steps=3):
    problem = mlp()
    optimizer = build_optimizer(method, base, problem.params(), "auto")
    for _ in range(steps):
        optimizer.step(problem.closure)
        problem.next_batch()
    return problem, optimizer


def test_everything_comes_back(tmp_path):
    problem, optimizer = trained()
    schedule = CosineSchedule(optimizer, steps=10)
    checkpoint.save(tmp_path / "run.pt", model=problem.model, optimizer=optimizer, schedule=schedule, epoch=3)
    again, resumed = trained(steps=0)
    other_schedule = CosineSchedule(resumed, steps=99)
    state = checkpoint.load(tmp_path / "run.pt", model=again.model, optimizer=resumed, schedule=other_schedule)
    assert state["epoch"] == 3 and other_schedule.steps == 10
    again.batch = problem.batch
    for one, its in ((optimizer, problem), (resumed, again)):
        for _ in range(3):
            one.step(its.closure)
    assert bits(problem.params()) == bits(again.params())
    assert state_bits(optimizer, problem.params()) == state_bits(resumed, again.params())
    assert os.listdir(tmp_path) == ["run.pt"]


class Code:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (Path(self.path),))


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    problem, optimizer = trained()
    before = state_bits(optimizer, problem.params())
    torch.save({"optimizer": Code(tmp_path / "ran")}, tmp_path / "evil.pt")
    with pytest.raises(pickle.UnpicklingError):
        checkpoint.load(tmp_path / "evil.pt", optimizer=optimizer)
    assert not (tmp_path / "ran").exists()
    assert state_bits(optimizer, problem.params()) == before
    torch.load(tmp_path / "evil.pt", weights_only=False)
    assert (tmp_path / "ran").exists(), "the file would have run code"


def test_a_failed_write_leaves_the_last_file_and_no_other(tmp_path, monkeypatch):
    _problem, optimizer = trained()
    path = tmp_path / "run.pt"
    checkpoint.save(path, optimizer=optimizer)
    good = path.read_bytes()

    def failing(state, file):
        file.write(b"half a file")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", failing)
    with pytest.raises(OSError, match="space"):
        checkpoint.save(path, optimizer=optimizer)
    assert path.read_bytes() == good and os.listdir(tmp_path) == ["run.pt"]


def test_between_the_passes_nothing_is_written(tmp_path):
    problem, optimizer = trained()
    problem.closure()
    optimizer.first_step()
    with pytest.raises(RuntimeError, match="perturbed"):
        checkpoint.save(tmp_path / "run.pt", model=problem.model, optimizer=optimizer)
    assert os.listdir(tmp_path) == []


def test_what_does_not_fit_changes_nothing(tmp_path):
    """The model's state fits and is loaded first; the optimizer's does not, and the model is put back."""
    problem, optimizer = trained()
    checkpoint.save(tmp_path / "run.pt", model=problem.model, optimizer=optimizer)
    other, plain_sam = trained("SAM")
    before = bits(other.params()), state_bits(plain_sam, other.params())
    with pytest.raises(ValueError, match="another method"):
        checkpoint.load(tmp_path / "run.pt", model=other.model, optimizer=plain_sam)
    assert (bits(other.params()), state_bits(plain_sam, other.params())) == before
    with pytest.raises(KeyError, match=r"scheduler.*model, optimizer"):
        checkpoint.load(tmp_path / "run.pt", model=other.model, scheduler=plain_sam)
    assert bits(other.params()) == before[0]
    with pytest.raises(ValueError, match="nothing"):
        checkpoint.save(tmp_path / "run.pt")


WRITER = """
import sys, torch
from fastsam.loop import checkpoint
for k in range(100000):
    checkpoint.save(sys.argv[1], step=k, weights=torch.full((200_000,), float(k)))
    print(k, flush=True)
"""


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_a_process_killed_while_it_writes_leaves_the_last_good_file(tmp_path):
    """Killed after 50 files were replaced: whatever was under way, the file is whole and no older than announced."""
    path = tmp_path / "run.pt"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    for stop_after in (50, 53):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, path], stdout=subprocess.PIPE, text=True, env=environment
        )
        for _ in range(stop_after):
            announced = int(writer.stdout.readline())
            state = torch.load(path, weights_only=True)  # readable at every moment
            assert state["step"] >= announced and bool((state["weights"] == state["step"]).all())
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        state = checkpoint.load(path)
        assert state["step"] >= announced and bool((state["weights"] == state["step"]).all())
        checkpoint.save(path, step=-1)
        assert checkpoint.load(path)["step"] == -1
        path.unlink()
