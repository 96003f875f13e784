import importlib.util
import sys

import pytest
import torch
from typer.testing import CliRunner

import fastsam
import fastsam.demo
from fastsam import _build, cli, kernels

WIDE = {"COLUMNS": "300"}


def invoke(*arguments):
    return CliRunner().invoke(cli.app, [*arguments], env=WIDE)


def row(output, name, table="Backends"):
    """The cells of the row that begins with `name`, in the table with that title."""
    lines = output[output.index(f"{table} ") :].splitlines()
    rows = ([cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│"))
    return next(cells for cells in rows if cells[0] == name)


def test_info_names_versions_and_every_backend_with_its_status():
    result = invoke("info")
    assert result.exit_code == 0, result.output
    assert row(result.output, "fastsam", "Versions") == ["fastsam", _build.version()]
    for name, status in fastsam.backends().items():
        assert row(result.output, name)[1] == status


def test_info_marks_the_backend_that_auto_takes_for_cpu_tensors():
    picked = kernels.choose("auto", torch.device("cpu"), torch.float32).__name__.rpartition(".")[2]
    output = invoke("info").output
    marked = [n for n in fastsam.backends() if row(output, n)[2] == "picked by auto"]
    assert marked == [picked]


def test_info_gives_the_reason_of_a_backend_that_is_missing(monkeypatch):
    monkeypatch.setattr(kernels.cpu, "unavailable", lambda: "not built: no [compiler] was found")
    output = invoke("info").output
    assert row(output, "cpu")[1] == "not built: no [compiler] was found"
    assert row(output, "instruction set", "Machine")[1] == "none: not built: no [compiler] was found"
    assert row(output, "torch")[2] == "picked by auto"


def test_demo_passes_its_options_on(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(fastsam.demo, "run", lambda **options: calls.append(options))
    result = invoke("demo", "--output", str(tmp_path), "--seeds", "2", "--epochs", "5", "--quick")
    assert result.exit_code == 0, result.output
    assert calls == [{"output": tmp_path, "seeds": 2, "epochs": 5, "quick": True}]


def test_demo_refuses_a_seed_count_below_one():
    result = invoke("demo", "--seeds", "0")
    assert result.exit_code == 2
    assert "--seeds" in result.output


def test_demo_without_its_packages_says_what_to_install(monkeypatch, tmp_path):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "sklearn" else find_spec(n, *a))
    result = invoke("demo", "--output", str(tmp_path / "never"))
    assert result.exit_code == 1
    assert "scikit-learn" in result.output
    assert "pip install 'fastsam[demo]'" in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "never").exists()


def test_demo_that_cannot_write_its_folder_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    result = invoke("demo", "--quick", "--output", str(tmp_path / "file"))
    assert result.exit_code == 1
    assert "fastsam demo: " in result.output and str(tmp_path / "file") in result.output.replace("\n", "")


@pytest.mark.parametrize("status, reason", [("built", None), ("not built: why", "not built: why")])
def test_the_build_record_gives_the_reason(monkeypatch, tmp_path, status, reason):
    record = tmp_path / "record.json"
    record.write_text(f'{{"cpu": "{status}"}}')
    monkeypatch.setattr(_build, "_RECORD", record)
    assert _build.reason("cpu") == reason


def test_a_source_tree_that_was_never_built_says_how(monkeypatch, tmp_path):
    monkeypatch.setattr(_build, "_RECORD", tmp_path / "absent.json")
    assert "setup.py build_ext --inplace" in _build.reason("cpu")


def test_the_console_script_lists_its_commands(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fastsam", "--help"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert "info" in shown and "demo" in shown
