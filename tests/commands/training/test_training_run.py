"""The folder of a run: what is in it after a kill, a full disk, or a second start."""

from __future__ import annotations

import csv
import errno
import json
import random
import resource
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

from fastsam.commands.training.run import RunFolder, random_state, set_random_state, write_json

ROOT = Path(__file__).resolve().parents[3]


def rows(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def in_another_process(code, *arguments):
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_checkpoint_comes_back_as_it_was_saved(tmp_path):
    payload = {"model": {"w": torch.arange(3.0)}, "progress": {"step": 7, "seconds": 1.5}, "names": ["a", ("b", None)]}
    folder = RunFolder(tmp_path / "run", {"lr": 0.1})
    assert folder.load() is None and folder.step is None
    folder.save(7, payload)
    again = RunFolder(tmp_path / "run", {"lr": 0.1})
    assert again.step == 7
    loaded = again.load()
    assert torch.equal(loaded["model"].pop("w"), payload["model"].pop("w"))
    assert loaded == payload


def test_random_numbers_go_on_from_a_saved_state(tmp_path):
    folder = RunFolder(tmp_path, {})
    folder.save(1, random_state())
    drawn = (torch.rand(3), random.random(), numpy.random.rand())
    set_random_state(folder.load())
    again = (torch.rand(3), random.random(), numpy.random.rand())
    assert torch.equal(drawn[0], again[0]) and drawn[1:] == again[1:]


def test_another_setting_is_refused_by_its_name_and_changes_nothing(tmp_path):
    RunFolder(tmp_path, {"lr": 0.3}).close()
    RunFolder(tmp_path, {"lr": 0.1, "seed": 0, "workers": 2}).save(1, {})  # nothing was lost: there was no checkpoint
    before = (tmp_path / "config.json").read_text()
    with pytest.raises(ValueError, match=r"lr=0\.1, and this one has lr=0\.2"):
        RunFolder(tmp_path, {"lr": 0.2, "seed": 0, "workers": 2}, may_change=["workers"])
    with pytest.raises(ValueError, match=r"momentum='absent', and this one has momentum=0\.9"):
        RunFolder(tmp_path, {"lr": 0.1, "seed": 0, "workers": 2, "momentum": 0.9})
    assert (tmp_path / "config.json").read_text() == before
    RunFolder(tmp_path, {"lr": 0.1, "seed": 0, "workers": 8}, may_change=["workers"])
    assert json.loads((tmp_path / "config.json").read_text())["workers"] == 8


def test_a_setting_that_an_older_run_does_not_name_has_the_value_that_it_was_added_with(tmp_path):
    RunFolder(tmp_path, {"lr": 0.1}).save(1, {})
    with pytest.raises(ValueError, match="a run with size=None, and this one has size=32"):
        RunFolder(tmp_path, {"lr": 0.1, "size": 32}, added={"size": None})
    RunFolder(tmp_path, {"lr": 0.1, "size": None}, added={"size": None})
    assert json.loads((tmp_path / "config.json").read_text()) == {"lr": 0.1, "size": None}
    with pytest.raises(ValueError, match="a run with size=None, and this one has size=64"):  # now that it names it
        RunFolder(tmp_path, {"lr": 0.1, "size": 64}, added={"size": 64})


def test_a_config_that_is_no_object_is_refused_by_its_path(tmp_path):
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json holds no object of JSON: delete it"):
        RunFolder(tmp_path, {})


def test_a_setting_that_json_writes_differently_is_still_the_same(tmp_path):
    RunFolder(tmp_path, {"betas": (0.9, 0.95)}).save(1, {})
    RunFolder(tmp_path, {"betas": (0.9, 0.95)})


def test_metrics_after_the_checkpoint_are_dropped_and_so_is_half_a_line(tmp_path):
    folder = RunFolder(tmp_path, {})
    for step in range(1, 6):
        folder.log({"step": step, "loss": 1 / step})
        if step == 3:
            folder.save(step, {})
    folder.close()
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("6,0.16")  # killed while it wrote
    folder = RunFolder(tmp_path, {})
    assert [row["step"] for row in rows(tmp_path)] == ["1", "2", "3"]
    folder.log({"step": 4, "loss": 0.25, "accuracy": 0.9})
    assert [row["step"] for row in rows(tmp_path)] == ["1", "2", "3", "4"]
    assert rows(tmp_path)[0]["accuracy"] == "" and rows(tmp_path)[3]["accuracy"] == "0.9"


def test_a_row_of_the_step_of_the_last_one_takes_its_place(tmp_path):
    """As it comes where a process was killed after it measured what follows a checkpoint."""
    folder = RunFolder(tmp_path, {})
    folder.log({"step": 1, "loss": 3.0})
    folder.save(2, {})
    folder.log({"step": 2, "loss": 2.0})
    folder.close()
    folder = RunFolder(tmp_path, {})
    folder.log({"step": 2, "loss": 2.0})
    folder.log({"step": 3, "loss": 1.0})
    folder.log({"step": 3, "loss": 1.5})
    assert [(row["step"], row["loss"]) for row in rows(tmp_path)] == [("1", "3.0"), ("2", "2.0"), ("3", "1.5")]


def test_without_a_checkpoint_the_curve_starts_over(tmp_path):
    folder = RunFolder(tmp_path, {})
    folder.log({"step": 1, "loss": 2.0})
    folder.close()
    RunFolder(tmp_path, {}).log({"step": 1, "loss": 3.0})
    assert [row["loss"] for row in rows(tmp_path)] == ["3.0"]


def test_a_process_killed_within_a_save_leaves_the_last_checkpoint_and_no_litter(tmp_path):
    code = """
import os, signal, sys, torch
from fastsam.commands.training.run import RunFolder
folder = RunFolder(sys.argv[1], {})
folder.save(1, {"w": torch.ones(1000)})
os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)  # the bytes are written, the name is not theirs yet
folder.save(2, {"w": torch.zeros(1000)})
"""
    assert in_another_process(code, tmp_path).returncode == -9
    assert list(tmp_path.glob(".*.part"))
    folder = RunFolder(tmp_path, {})
    assert folder.step == 1 and torch.equal(folder.load()["w"], torch.ones(1000))
    assert not list(tmp_path.glob(".*.part"))


def test_a_full_disk_is_said_and_the_last_checkpoint_stays(tmp_path):
    folder = RunFolder(tmp_path, {})
    folder.save(1, {"w": torch.ones(1000)})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))  # what a full disk does to a write
    try:
        with pytest.raises(OSError, match=r"step 2 could not be written .*no space is left.* that of step 1 is intact"):
            folder.save(2, {"w": torch.ones(100_000)})
        with pytest.raises(OSError, match=r"the result of step 1 could not be written .*no space is left"):
            folder.finish({"text": "x" * 100_000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert folder.step == 1 and torch.equal(folder.load()["w"], torch.ones(1000))
    assert folder.result is None and not (tmp_path / "result.json").exists()
    assert not list(tmp_path.glob(".*.part"))


def test_a_second_process_is_kept_out_until_the_first_lets_go(tmp_path):
    code = "import sys; from fastsam.commands.training.run import RunFolder; RunFolder(sys.argv[1], {})"
    folder = RunFolder(tmp_path, {})
    refused = in_another_process(code, tmp_path)
    assert refused.returncode == 1 and "another process is at work in" in refused.stderr
    folder.close()
    assert in_another_process(code, tmp_path).returncode == 0


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"file.run cannot be written \(Not a directory\): .* name another folder"):
        RunFolder(tmp_path / "file" / "run", {})
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(OSError, match=r"new cannot be written \(No space left on device\): .* name another folder"):
        RunFolder(tmp_path / "new", {})


def test_a_file_system_without_locks_is_no_other_process(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", none)
    with pytest.raises(OSError, match=r"cannot be written \(No locks available\)"):
        RunFolder(tmp_path, {})


def test_a_damaged_checkpoint_is_no_new_run(tmp_path):
    RunFolder(tmp_path, {}).save(1, {"w": torch.ones(1000)})
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"checkpoint\.pt is not a checkpoint of a run, or is damaged"):
        RunFolder(tmp_path, {})


def test_a_checkpoint_with_code_in_it_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    torch.save({"step": 1, "payload": Evil()}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="not a checkpoint of a run"):
        RunFolder(tmp_path, {})
    assert not (tmp_path / "ran").exists()


def test_a_finished_run_says_so(tmp_path):
    RunFolder(tmp_path, {}).finish({"accuracy": 0.5})
    assert RunFolder(tmp_path, {}).result == {"accuracy": 0.5}


def test_a_json_file_is_replaced_as_a_whole(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_json(path, [1])
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        write_json(path, [2])
    assert json.loads(path.read_text()) == [1] and list(tmp_path.iterdir()) == [path]
