"""What is known about this installation: what became of its optional extensions, and whose files lie among its own."""

from __future__ import annotations

import json
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
_RECORD = PACKAGE / "_build_info.json"
# Modules that Fast Segment Anything, which imports as fastsam, has and this package has not.
_FOREIGN = ("decoder.py", "model.py", "predict.py", "prompt.py", "utils.py")


def reason(extension: str) -> str | None:
    """Why the extension ``cpu`` or ``cuda`` was not built, as the build recorded it; ``None`` if it was."""
    try:
        status = json.loads(_RECORD.read_text())[extension]
    except FileNotFoundError:
        return "not built: run `python setup.py build_ext --inplace`, or install fastsam-optim with pip"
    return None if status == "built" else status


def foreign_files() -> list[str]:
    """Names of another package's modules in this package's folder: both were installed there, one over the other."""
    return [name for name in _FOREIGN if (PACKAGE / name).exists()]
