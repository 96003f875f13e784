import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import fastsam
import fastsam.commands.demo
import fastsam_optim
from fastsam import kernels
from fastsam.commands import cli
from fastsam.support import build as _build

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
    assert row(result.output, "fastsam", "Versions") == ["fastsam", f"{fastsam.__version__} (fastsam-optim)"]
    for name, status in fastsam.backends().items():
        assert row(result.output, name)[1] == status


def test_info_as_json_says_what_the_tables_say():
    result = invoke("info", "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert {name: of["status"] for name, of in said["backends"].items()} == fastsam.backends()
    tables = invoke("info").output
    for name in fastsam.backends():
        assert row(tables, name)[1:] == list(said["backends"][name].values())
    assert said["versions"]["torch"] == torch.__version__ and "conflict" not in said["versions"]
    assert row(tables, "threads", "Machine")[1] == said["machine"]["threads"]


def test_info_names_files_of_another_package_among_ours(monkeypatch, tmp_path):
    (tmp_path / "model.py").write_text("")
    monkeypatch.setattr(_build, "PACKAGE", tmp_path)
    conflict = json.loads(invoke("info", "--json").stdout)["versions"]["conflict"]
    assert conflict.startswith("model.py of another package") and "new environment" in conflict


def test_the_command_says_that_another_package_comes_first_under_this_name(tmp_path):
    other = tmp_path / "fastsam" / "__init__.py"
    other.parent.mkdir()
    other.write_text("raise RuntimeError('not even imported')\n")
    path = os.pathsep.join([str(tmp_path), str(Path(fastsam_optim.__file__).parent)])
    run = subprocess.run(
        [sys.executable, "-m", "fastsam_optim", "info"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 1 and run.stdout == ""
    assert f"finds {other}, which is another package's" in run.stderr and len(run.stderr.splitlines()) == 1


def test_who_asks_for_fast_segment_anything_is_told_whose_name_it_is():
    with pytest.raises(ImportError, match="FastSAM is Fast Segment Anything's, but `import fastsam` found"):
        from fastsam import FastSAM  # noqa: F401
    with pytest.raises(ImportError, match="cannot import name 'Sam'"):
        from fastsam import Sam  # noqa: F401
    assert not hasattr(fastsam, "Sam")


@pytest.mark.parametrize("typed, offered", [("fi", "finetune"), ("info --j", "--json")])
def test_bash_completes_commands_and_options(typed, offered):
    words = ["fastsam", *typed.split()]
    asked = {
        "_FASTSAM_COMPLETE": "complete_bash",
        "COMP_WORDS": " ".join(words),
        "COMP_CWORD": str(len(words) - 1),
    }
    assert CliRunner().invoke(cli.app, [], env=asked, prog_name="fastsam").output.split() == [offered]


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
    monkeypatch.setattr(fastsam.commands.demo, "run", lambda **options: calls.append(options))
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
    assert "pip install 'fastsam-optim[demo]'" in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "never").exists()


def test_demo_that_cannot_write_its_folder_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    result = invoke("demo", "--quick", "--output", str(tmp_path / "file"))
    assert result.exit_code == 1
    said = f"fastsam demo: --output {tmp_path / 'file'} cannot be written to (File exists): name another folder"
    assert said in result.output.replace("\n", "")


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
        fastsam_optim.main()
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert "info" in shown and "demo" in shown
