"""The folder of a training run, which any moment may be the run's last.

    folder = RunFolder("runs/vit", {"lr": 1e-3, "seed": 0})     # the same settings again: the run goes on
    state = folder.load()                                       # None for a new run
    ...
    folder.log({"step": step, "loss": loss})                    # metrics.csv
    folder.save(step, {"model": model.state_dict(), ...})       # checkpoint.pt
    folder.finish({"test_accuracy": 0.97})                      # result.json

``config.json`` is written once, and compared when the run goes on. ``checkpoint.pt`` is replaced as a whole: killed at
any moment, the process leaves the last complete one. ``metrics.csv`` never runs ahead of it: on resuming, rows later
than the checkpoint are dropped, so that the curve of a run that was killed has every step once. One process at a time
may have the folder open.
"""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import random
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import IO, Any

import torch

from fastsam.loop import checkpoint


class FolderInUse(RuntimeError):
    """Another process has the folder of the run open."""


class RunFolder:
    """The files of one run.

    Args:
        path: the folder; made if it is not there.
        config: what defines the run; anything that JSON can hold. Compared with that of the checkpoint or result at
            hand, if there is one.
        may_change: keys that may differ from ``config.json``; it then holds the latest.
        added: keys that the ``config.json`` of an older run may lack, with the values that mean what that run did.

    Attributes:
        step: of the checkpoint at hand, or None without one.
        result: what :meth:`finish` wrote, or None for a run that is not finished.

    Raises ``ValueError`` for a folder of a run with other settings, naming the first of them, for files that are
    damaged, ``OSError`` for a folder that cannot be written, and :class:`FolderInUse` if another process has it open.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        config: dict[str, Any],
        may_change: Collection[str] = (),
        added: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{self.path} is a file: name a folder for the run")
        try:
            self._open(json.loads(json.dumps(config)), may_change, added or {})
        except OSError as error:
            reason = error.strerror or error
            raise OSError(f"{self.path} cannot be written ({reason}): make it so, or name another folder") from error

    def _open(self, config: dict[str, Any], may_change: Collection[str], added: Mapping[str, Any]) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(self.path)
        for left_over in self.path.glob(".*.part"):  # of a process that was killed while it wrote
            left_over.unlink()
        self.step = self._read(mmap=True)["step"] if self._checkpoint.exists() else None
        self.result = _read_json(self.path / "result.json")
        self._compare_config(config, may_change, added)
        self._columns, rows = _read_rows(self.path / "metrics.csv")
        kept = [row for row in rows if self.step is not None and int(row["step"]) <= self.step]
        self._last = int(kept[-1]["step"]) if kept else None  # step of the last row
        if self._columns:
            self._write_rows(kept)

    def save(self, step: int, payload: dict[str, Any]) -> None:
        """Replaces the checkpoint by one of ``step``: tensors, numbers, strings and containers of them.

        Raises ``OSError`` if it cannot be written, saying so where the disk is full; the last checkpoint is still
        there then.
        """
        try:
            checkpoint.save(self._checkpoint, step=step, payload=payload)
        except (OSError, RuntimeError) as error:
            raise self.explained(error, "the checkpoint of step", step) from error
        self.step = step

    def load(self) -> dict[str, Any] | None:
        """The payload of the last checkpoint, on the CPU, or None; tensors and plain containers only."""
        return self._read()["payload"] if self._checkpoint.exists() else None

    def log(self, row: dict[str, Any]) -> None:
        """Appends a row to ``metrics.csv``; it has a ``"step"``. Columns that are new are added to the file.

        A row of the step of the last one takes its place: a process may be killed after it has measured what follows a
        checkpoint and before it saves that.
        """
        if "step" not in row:
            raise ValueError(f"a row of metrics.csv needs its step; this one has {', '.join(row)}")
        path = self.path / "metrics.csv"
        new = [name for name in row if name not in self._columns]
        try:
            if new or row["step"] == self._last:
                rows = [past for past in _read_rows(path)[1] if int(past["step"]) != row["step"]]
                self._columns += new
                self._write_rows([*rows, row])
            else:
                with path.open("a", newline="") as file:
                    csv.DictWriter(file, self._columns).writerow(row)
        except OSError as error:
            raise self.explained(error, "the metrics of step", row["step"]) from error
        self._last = row["step"]

    def finish(self, result: dict[str, Any]) -> None:
        """Writes ``result.json``, which marks the run as finished."""
        try:
            write_json(self.path / "result.json", result)
        except OSError as error:
            raise self.explained(error, "the result of step", self.step) from error
        self.result = result

    def close(self) -> None:
        """Lets another process have the folder; the end of this process does so as well."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    @property
    def _checkpoint(self) -> Path:
        return self.path / "checkpoint.pt"

    def _read(self, **options) -> dict[str, Any]:
        try:
            content = torch.load(self._checkpoint, map_location="cpu", weights_only=True, **options)
            return {"step": content["step"], "payload": content["payload"]}
        except Exception as error:  # torch raises a dozen kinds for a damaged file
            raise ValueError(
                f"{self._checkpoint} is not a checkpoint of a run, or is damaged: move it away to start over"
            ) from error

    def _compare_config(self, config: dict[str, Any], may_change: Collection[str], added: Mapping[str, Any]) -> None:
        path = self.path / "config.json"
        before = _read_json(path)
        if before is not None and (self.step is not None or self.result is not None):  # else there is nothing to lose
            past = {**added, **before}
            for key in [*past, *(key for key in config if key not in past)]:
                ours, theirs = config.get(key, "absent"), past.get(key, "absent")
                if ours != theirs and key not in may_change:
                    raise ValueError(
                        f"{self.path} holds a run with {key}={theirs!r}, and this one has {key}={ours!r}: "
                        "choose another folder, the same setting, or delete that run"
                    )
        if config != before:
            write_json(path, config)

    def _write_rows(self, rows: list[dict]) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self._columns)
        writer.writeheader()
        writer.writerows(rows)
        checkpoint.replace(self.path / "metrics.csv", lambda file: file.write(text.getvalue().encode()))

    def explained(self, error: OSError | RuntimeError, what: str, step: int | None) -> OSError:
        """The error to raise for a write that failed: what it was, why, and which checkpoint there is."""
        if isinstance(error, RuntimeError):  # what torch's writer makes of a write that failed
            reason = "no space is left, or the disk failed"
        elif error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            reason = "no space is left"
        else:
            reason = os.strerror(error.errno) if error.errno else str(error)
        last = "none was saved before" if self.step is None else f"that of step {self.step} is intact"
        return OSError(
            f"{what} {step} could not be written into {self.path}: {reason}. Of the checkpoints {last}: make "
            "room, and the same run goes on"
        )


def random_state() -> dict[str, Any]:
    """The state of the global random generators, as a checkpoint can hold it.

    Torch's on the CPU and on every CUDA device, Python's, and NumPy's if NumPy is loaded.
    """
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    if "numpy" in sys.modules:
        kind, key, *rest = sys.modules["numpy"].random.get_state()
        state["numpy"] = (kind, key.tolist(), *rest)
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Has the generators go on from a state of :func:`random_state`."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    if "cuda" in state:
        torch.cuda.set_rng_state_all(state["cuda"])
    if "numpy" in state:
        import numpy

        numpy.random.set_state(state["numpy"])


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Writes a JSON file as a whole: a reader finds the old one or the new one."""
    text = json.dumps(content, indent=1) + "\n"
    checkpoint.replace(Path(path), lambda file: file.write(text.encode()))


def _read_json(path: Path) -> Any:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}): delete it, or the folder, to start over") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no object of JSON: delete it, or the folder, to start over")
    return content


def _read_rows(path: Path) -> tuple[list[str], list[dict]]:
    """The columns and rows of a CSV file; a last line that was cut off is left out."""
    try:
        text = path.read_bytes().decode()
    except FileNotFoundError:
        return [], []
    except UnicodeDecodeError:
        raise ValueError(f"{path} is damaged: delete it to go on without the curve so far") from None
    reader = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1], newline=""))
    rows = list(reader)
    columns = list(reader.fieldnames or [])
    if columns and ("step" not in columns or not all((row["step"] or "").isdigit() for row in rows)):
        raise ValueError(f"{path} is damaged: delete it to go on without the curve so far")
    return columns, rows


def _lock(folder: Path) -> IO | None:
    """An open file that keeps other processes out of the folder; the system releases it with the process."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    file = (folder / ".lock").open("w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock, not held on by forked data workers
    except (BlockingIOError, PermissionError):  # other errors are of file systems that have no locks
        file.close()
        raise FolderInUse(f"another process is at work in {folder}: wait for it, or choose another folder") from None
    return file
