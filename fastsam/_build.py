"""What is known about this installation: its version, and what became of its optional extensions."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

_RECORD = Path(__file__).with_name("_build_info.json")


def version() -> str:
    """The installed version, or ``0+unknown`` for a source tree that was never installed."""
    try:
        return importlib.metadata.version("fastsam")
    except importlib.metadata.PackageNotFoundError:
        return "0+unknown"


def reason(extension: str) -> str | None:
    """Why the extension ``cpu`` or ``cuda`` was not built, as the build recorded it; ``None`` if it was."""
    try:
        status = json.loads(_RECORD.read_text())[extension]
    except FileNotFoundError:
        return "not built: run `python setup.py build_ext --inplace`, or install fastsam with pip"
    return None if status == "built" else status
