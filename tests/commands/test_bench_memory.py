"""``fastsam bench --memory``: the table of bytes a parameter."""

import json

import pytest
import torch
from typer.testing import CliRunner

from fastsam.commands.bench import memory
from fastsam.commands.cli import app


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("memory")
    arguments = ["bench", "--memory", "--model", "resnet18", "--base", "adamw", "--threads", "1"]
    done = CliRunner().invoke(app, [*arguments, "--device", "cpu", "--output", str(folder)])
    assert done.exit_code == 0, done.output
    assert (folder / "memory.md").read_text() == memory.markdown(json.loads((folder / "memory.json").read_text()))
    found = json.loads((folder / "memory.json").read_text())
    return {(row["method"], row["title"], row["weights"]): row for row in found}


def test_what_is_measured_between_steps_is_what_is_counted(rows):
    ours = [row for (_, title, _), row in rows.items() if title.startswith("fastsam")]
    assert [row["counted"] for row in ours] == [12, 20, 16, 16, 14, 12, 6, 10, 8, 6]
    for row in ours:
        if "note" in row:
            pytest.skip(row["note"])
        assert row["between"] == pytest.approx(row["counted"], abs=1), row
        assert row["peak"] <= row["between"] + 0.5, row


def test_every_case_has_numbers_or_says_why_not(rows):
    assert len(rows) == len(memory.CASES)
    for (_, title, _), row in rows.items():
        assert {"between", "peak"} <= row.keys() or row["note"]
        assert title != "torch" or row["counted"] == (8 if row["weights"] == "float32" else 4)


def test_a_set_that_has_no_room_is_noted_before_it_is_made(monkeypatch, capfd):
    monkeypatch.setattr(memory, "free_memory", lambda device: 1 << 30)
    monkeypatch.setattr(memory.os, "fork", lambda: pytest.fail("it was begun"))
    memory.main("gpt-1.3b", "adamw", "cpu")
    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert len(lines) == len(memory.CASES)
    assert all("does not fit" in line["note"] for line in lines)


def test_a_step_of_every_case_runs_on_one_parameter():
    for case in memory.CASES:
        if case.implementation == "pytorch_optimizer":
            pytest.importorskip("pytorch_optimizer")
        w = torch.nn.Parameter(torch.ones(3, dtype=case.weights))
        memory._steps(case, "sgd", [w], [torch.ones(3, dtype=case.weights)])()
        assert (w != 1).all(), case
