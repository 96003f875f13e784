"""The examples, run as a reader would."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NEEDS = {
    "with_lightning": "lightning",
    "with_transformers": "transformers",
    "with_accelerate": "accelerate",
    "finetune_vit": "transformers",
    "distributed_vit": "transformers",
    "with_trl": "trl",
}


@pytest.mark.parametrize("name", sorted(p.stem for p in (ROOT / "examples").glob("*.py") if p.stem != "digits"))
def test_example_trains(name):
    needed = NEEDS.get(name)
    if needed and not importlib.util.find_spec(needed):
        pytest.skip(f"{needed} is not installed")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, f"examples/{name}.py"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900
    )
    assert run.returncode == 0, run.stderr
    assert float(re.search(r"test accuracy (\S+)", run.stdout)[1]) > 0.9
