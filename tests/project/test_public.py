"""What makes the project public says the same everywhere: versions, sessions, limits, forms."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import pytest

import fastsam

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = {path.stem: path.read_text() for path in (ROOT / ".github/workflows").glob("*.yml")}
NOXFILE = ast.parse((ROOT / "noxfile.py").read_text())
CONSTANTS = {
    node.targets[0].id: ast.literal_eval(node.value)
    for node in NOXFILE.body
    if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") in ("PYTHONS", "TORCHES", "WHEEL_MIB")
}


def test_the_version_stands_in_one_place_and_in_the_changelog():
    line = f'__version__ = "{fastsam.__version__}"'
    assert (ROOT / "fastsam/__init__.py").read_text().splitlines().count(line) == 1
    assert f"## {fastsam.__version__}\n" in (ROOT / "CHANGELOG.md").read_text()
    assert not re.search(r"^version = \"", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)


def test_workflows_call_sessions_that_exist():
    sessions = {node.name for node in NOXFILE.body if isinstance(node, ast.FunctionDef) and node.decorator_list}
    called = set(re.findall(r'nox -s "?(\w+)', " ".join(WORKFLOWS.values())))
    listed = re.search(r"session: \[(.*)\]", WORKFLOWS["checks"])[1].split(", ")
    assert {*called, *listed} == sessions


def test_tested_versions_are_those_that_are_promised():
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert tuple(re.findall(r'Python :: (3\.\d+)"', pyproject)) == CONSTANTS["PYTHONS"]
    assert tuple(re.findall(r"\bcp3(\d+)-\*", pyproject)) == tuple(v.partition(".")[2] for v in CONSTANTS["PYTHONS"])
    checks = WORKFLOWS["checks"]
    assert set(re.findall(r'torch: \[?"([\d.]+)"', checks)) == set(CONSTANTS["TORCHES"])
    assert f'torch>={CONSTANTS["TORCHES"][0].removesuffix(".0")}"' in pyproject
    assert set(re.findall(r'"(3\.\d+)"', checks)) == set(CONSTANTS["PYTHONS"])


def test_each_form_asks_for_what_fastsam_info_says():
    forms = [p for p in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml") if p.stem != "config"]
    assert len(forms) == 3 and all("fastsam info --json" in form.read_text() for form in forms)


def test_every_yaml_file_can_be_read():
    yaml = pytest.importorskip("yaml")
    for path in [*(ROOT / ".github").rglob("*.yml"), ROOT / "CITATION.cff", ROOT / ".pre-commit-config.yaml"]:
        assert isinstance(yaml.safe_load(path.read_text()), dict), path


# ---- the weight of a wheel -------------------------------------------------------------------------------------


def weigh(wheel: Path) -> subprocess.CompletedProcess:
    limits = [f"{kind}={mib}" for kind, mib in CONSTANTS["WHEEL_MIB"].items()]
    return subprocess.run(
        [sys.executable, ROOT / "tests/project/weigh_wheel.py", wheel, *limits], capture_output=True, text=True
    )


@pytest.mark.parametrize(
    ("inside", "mib", "said"),
    [
        ({"fastsam/_cpu.so"}, 0.9, None),
        ({"fastsam/_cpu.so"}, 1.1, "heavier than 1.0 MiB"),
        ({"fastsam/_cpu.so", "fastsam/_cuda.so"}, 3.9, None),
        ({"fastsam/_cpu.so", "fastsam/_cuda.so"}, 4.1, "heavier than 4.0 MiB"),
        ({"fastsam/__init__.py"}, 0.1, "holds no compiled kernels"),
    ],
    ids=["light", "heavy", "with CUDA", "heavy with CUDA", "none"],
)
def test_a_wheel_that_is_too_heavy_is_refused(tmp_path, inside, mib, said):
    wheel = tmp_path / "fastsam_optim-1-cp311-cp311-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in inside:
            archive.writestr(name, bytes(int(mib * 2**20 / len(inside))))
    run = weigh(wheel)
    assert run.returncode == (said is not None) and (said or "allowed") in run.stdout + run.stderr


def test_the_kernels_that_were_built_here_are_within_the_limit():
    kernels = {kind: list((ROOT / "fastsam").glob(f"_{kind}.*.so")) for kind in CONSTANTS["WHEEL_MIB"]}
    if not any(kernels.values()):
        pytest.skip("nothing was built here")
    packed = sum(len(zlib.compress(path.read_bytes())) for paths in kernels.values() for path in paths)
    limit = CONSTANTS["WHEEL_MIB"]["cuda" if kernels["cuda"] else "cpu"]
    assert packed < 2**20 * limit
