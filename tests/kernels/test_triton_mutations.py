"""The tests of the Triton kernels are tested: with one line of a kernel broken they have to fail."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
ONE_TEST = "test_kernels_equal_the_specification and F-SAM and float64"
MUTATIONS = {
    "a sign": ("triton_kernels.py", "average * sigma.to(WIDE), gradient)", "average * -sigma.to(WIDE), gradient)"),
    "a mask": ("triton_access.py", "mask=at < end, cache_modifier", "mask=at < end - 1, cache_modifier"),
    "a stride": ("triton_access.py", "tl.load(row + _OFFSET) + begin,", "tl.load(row + _OFFSET),"),
    "what is carried over": ("triton_kernels.py", "total += 0 * tl.load(met + k)", "total += 0.0"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_kernel_is_noticed(name, tmp_path):
    file, line, broken = MUTATIONS[name]
    for folder in ("fastsam", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    source = tmp_path / "fastsam" / "kernels" / file
    text = source.read_text()
    assert text.count(line) == 1
    source.write_text(text.replace(line, broken))
    which = "test_an_overflow_changes_nothing" if name == "what is carried over" else ONE_TEST
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", which]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [*command, "tests/kernels/test_triton.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stdout[-3000:] + done.stderr[-2000:]
    assert "AssertionError" in done.stdout
