"""A result held against an earlier one of the same machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from fastsam.commands.bench.throughput import FORMAT

# What makes a row the same row in both results, and how its part is called.
_KEYS = {
    "optimizer": ("model", "base", "method", "dtype", "implementation"),
    "training": ("model", "base", "method", "dtype", "batch", "implementation"),
    "parameters": ("parameters", "base", "method", "dtype", "implementation"),
    "tensors": ("tensors", "base", "method", "dtype", "implementation"),
}
_TITLES = {"optimizer": "optimizer step", "training": "training step", "parameters": "parameters", "tensors": "tensors"}
# Two results of one device: of these, all must be equal.
_DEVICE = ("gpu", "cpu", "cores", "isa", "threads")


class Change(NamedTuple):
    """One row of fastsam's in both results."""

    what: str
    before_ms: float
    after_ms: float
    verdict: str  # "slower", "faster" or "same"

    @property
    def ratio(self) -> float:
        return self.after_ms / self.before_ms


def load(path: Path) -> dict[str, Any]:
    """A result that ``fastsam bench`` wrote. Raises ``ValueError`` for another file, ``OSError`` for none."""
    try:
        result = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(result, dict) or "format" not in result:
        raise ValueError(f"{path} is no result of fastsam bench: it has no format")
    if result["format"] != FORMAT:
        raise ValueError(f"{path} has format {result['format']}, this version compares format {FORMAT}; measure anew")
    missing = [key for key in ("machine", "settings", *_KEYS) if key not in result]
    if missing:
        raise ValueError(f"{path} is no whole result of fastsam bench: it lacks {', '.join(missing)}")
    return result


def check_same_device(now: dict[str, Any], earlier: dict[str, Any]) -> None:
    """Raises ``ValueError`` where two machines, as a result describes them, cannot be compared; names both."""
    for key in _DEVICE:
        if now.get(key) != earlier.get(key):
            raise ValueError(
                f"the earlier result is of another device: {key} was {earlier.get(key)}, is {now.get(key)}; "
                "times of different devices say nothing about a change"
            )


def other_versions(now: dict[str, Any], earlier: dict[str, Any]) -> list[str]:
    """What differs besides fastsam and may be the reason of a change, in words."""
    keys = ("torch", "python", "cuda", "pytorch_optimizer")
    pairs = ((key, earlier.get(key), now.get(key)) for key in keys)
    return [f"{key} was {before}, is {after}" for key, before, after in pairs if before != after]


def changes(now: dict[str, Any], earlier: dict[str, Any], threshold: float) -> list[Change]:
    """fastsam's rows in both results: slower or faster where the medians differ by more than the threshold (0.1 is
    10 %) and the quartiles do not overlap, so that noise is not taken for a change.

    Raises ``ValueError`` where the two have no row in common.
    """
    found = []
    for part, keys in _KEYS.items():
        before = {tuple(row.get(key) for key in keys): row for row in earlier[part]}
        for row in now[part]:
            old = before.get(tuple(row[key] for key in keys))
            if old is None or row["ms"] is None or old["ms"] is None or not _is_ours(row):
                continue
            what = " ".join(str(row[key]) for key in keys)
            found.append(Change(f"{_TITLES[part]} {what}", old["ms"], row["ms"], _verdict(old, row, threshold)))
    if not found:
        raise ValueError("the earlier result has no measurement of fastsam's in common with this one")
    return found


def _is_ours(row: dict[str, Any]) -> bool:
    return row["implementation"].startswith("fastsam")


def _verdict(old: dict[str, Any], new: dict[str, Any], threshold: float) -> str:
    if new["ms"] > old["ms"] * (1 + threshold) and new["q1_ms"] > old["q3_ms"]:
        return "slower"
    if old["ms"] > new["ms"] * (1 + threshold) and old["q1_ms"] > new["q3_ms"]:
        return "faster"
    return "same"
