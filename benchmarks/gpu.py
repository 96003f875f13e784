"""The GPU benchmark: optimizer and training steps against what they must reach, within a given time.

    python -m benchmarks.gpu OUTDIR --seconds 480

``benchmarks/gpu.sh`` runs this. It needs torch and nothing else, and writes ``gpu.json`` (in the form of
``fastsam/commands/bench/throughput.py``) and ``gpu.md`` into the folder after each measurement, so that a run that is
stopped keeps what it had. The sections come in order of importance; what the time does not allow is named, and so is
what raised, which makes the exit status 1.

Each backend is measured in a process of its own, because nothing runs any more after an illegal access. A section in
which that happens is lost to this backend and measured with the next one, and another process goes on with the section
after it.

With ``FASTSAM_BENCH_DEVICE=cpu`` every line runs on a CPU at tiny sizes: the numbers say nothing then.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import workers
from benchmarks.gpu_targets import JUDGED, TRAINED, targets
from fastsam.commands.bench.clock import FAILED
from fastsam.commands.bench.tables import markdown
from fastsam.commands.bench.throughput import PARTS, Plan, run
from fastsam.commands.bench.training_step import GRAPHS

_RIVALS = ("authors", "foreach", "foreach-fused")
#: The implementation of each backend, and what stands in for it on a CPU.
OURS = {"cuda": "fastsam", "triton": "fastsam-triton"}
_STAND_INS = {"cuda": "fastsam", "triton": "fastsam-flat"}

_OF_ANOTHER_BACKEND = 60  # seconds that stay for the next backend
_OVERRUN = 45  # seconds that a cell may need past its deadline
_LEAST = 15  # seconds for which a process is not begun
_MOST_LOST = 2  # sections of a backend, which is given up then


class Section(NamedTuple):
    """What is measured together, with the most seconds it may take."""

    name: str
    seconds: float
    plan: Plan


def _optimizer_steps(*models: str, **options: Any) -> Plan:
    return Plan(parts=("optimizer",), models=models, **{"methods": JUDGED, "rivals": _RIVALS, **options})


def _training_steps(*methods: str) -> Plan:
    return Plan(
        parts=("training",), training_models=TRAINED, methods=methods, dtypes=("bf16-autocast",), batches=(8, 128)
    )


SECTIONS = (
    Section("vit-b16", 40, _optimizer_steps("vit-b16")),
    Section("training", 110, _training_steps("sam", "momentumsam")),
    Section("large", 65, _optimizer_steps("vit-l16", "gpt-1.3b", rivals=("foreach", "foreach-fused"))),
    Section("bf16", 30, _optimizer_steps("vit-b16", "resnet18", dtypes=("bf16",), rivals=("foreach",))),
    Section("large bf16", 35, _optimizer_steps("vit-l16", "gpt-1.3b", dtypes=("bf16",), rivals=("foreach",))),
    Section("resnet18", 20, _optimizer_steps("resnet18")),
    Section("compiled", 70, _optimizer_steps("vit-b16", methods=("fsam",), rivals=("compiled",), compile_limit=45)),
    Section("curves", 30, Plan(parts=("parameters", "tensors"), methods=("fsam",), rivals=("foreach", "authors"))),
    Section("training of the others", 60, _training_steps("fsam", "eigensam")),
)
#: Of the backends that are not the first.
BESIDE = (Section("optimizer steps beside", 45, _optimizer_steps("vit-b16", "resnet18", rivals=())),)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("output", type=Path, help="folder for gpu.json and gpu.md")
    parser.add_argument("--seconds", type=float, default=480, help="about how long it may take (default 480)")
    parser.add_argument("--note", action="append", default=[], help="a line for gpu.md, such as how the tests ended")
    parser.add_argument("--worker", nargs=2, metavar=("BACKEND", "STATE"), help=argparse.SUPPRESS)
    parser.add_argument("--sections", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    if options.worker:
        backend, state = options.worker
        return work(backend, options.sections, options.seconds, Files(Path(state), options.output))
    if reason := workers.no_gpu():
        parser.error(f"{reason}; FASTSAM_BENCH_DEVICE=cpu tries every line without a GPU")
    if workers.stand_in():
        options.note.insert(0, "A stand-in: tiny sizes on a CPU, timed as a GPU is. No number here means anything.")
    memory = Path("/dev/shm")  # where no full disk comes between the processes
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        files = Files(Path(folder, "state.json"), options.output)
        result = measure(files, options.output, options.seconds, options.note)
    if "machine" not in result:
        print("\n".join(result["notes"]), "nothing was measured", sep="\n")
        return 1
    print(report(result))
    failed = list(failures(result))
    print("\n".join(failed))
    return 1 if failed else 0


class Files:
    """The result so far, where the processes find it, and as ``gpu.json`` and ``gpu.md`` for the user."""

    def __init__(self, state: Path, output: Path) -> None:
        self.state, self._output = state, output

    def read(self) -> dict[str, Any]:
        return json.loads(self.state.read_text())

    def write(self, result: dict[str, Any]) -> None:
        """A folder that cannot be written to costs the files, and not the run."""
        text = json.dumps(result, indent=1) + "\n"
        _replace(self.state, text)
        if "machine" not in result:
            return
        try:
            _replace(self._output / "gpu.json", text)
            _replace(self._output / "gpu.md", report(result))
        except OSError as error:
            print(f"{self._output}: {error.strerror}; what is measured goes to the screen alone", flush=True)


def measure(files: Files, output: Path, seconds: float, notes: list[str]) -> dict[str, Any]:
    """Has every backend that there is measured by processes of its own."""
    end = time.monotonic() + seconds
    found = workers.available()
    notes += [f"Backend {name}: {why}." for name, why in found.items() if why != "available"]
    files.write({"notes": notes, "sections": []})
    backends = [name for name, why in found.items() if why == "available"]
    lost: list[str] = []
    for number, backend in enumerate(backends):
        later = len(backends) - 1 - number
        names = [*lost, *(section.name for section in (BESIDE if number else SECTIONS))]
        end_of_this = end - later * _OF_ANOTHER_BACKEND
        lost = _measured_by(backend, names, files, output, end_of_this)
    return files.read()


def _measured_by(backend: str, names: Sequence[str], files: Files, output: Path, end: float) -> list[str]:
    """Has processes measure these sections; returns those that were lost to a process that broke."""
    lost: list[str] = []
    while names and (left := end - time.monotonic()) > _LEAST:
        options = [str(output), "--worker", backend, str(files.state), "--seconds", f"{left:.0f}", "--sections"]
        how = workers.run("benchmarks.gpu", [*options, *names], left + _OVERRUN)
        result = files.read()
        entries = [entry for entry in result["sections"] if entry["backend"] == backend and entry["section"] in names]
        for entry in entries:
            if entry["ended"] is None:
                entry["ended"] = how or "ended in it"
        broken = [entry for entry in entries if entry["ended"] != "done"]
        if how and not entries:  # it did not come to measure anything
            broken = [{"section": names[0], "backend": backend, "ended": how, "before": {}}]
            result["sections"] += broken
        for entry in broken:
            print(f"{backend}: {entry['section']} was lost: {entry['ended']}", flush=True)
            _drop_what_failed_with_it(result, entry)
        files.write(result)
        if not how:
            return lost
        lost += [entry["section"] for entry in broken]
        last = max((names.index(entry["section"]) for entry in [*entries, *broken]), default=len(names) - 1)
        names = names[last + 1 :]
        if len(lost) >= _MOST_LOST:
            return [*lost, *names]
    return lost


def _drop_what_failed_with_it(result: dict[str, Any], entry: dict[str, Any]) -> None:
    """What others measured after the fault failed for no reason of theirs: the next backend has them measured again."""
    own = {OURS[entry["backend"]], GRAPHS[OURS[entry["backend"]]]}
    for part, count in entry["before"].items():
        rows = result.get(part, [])
        rows[count:] = (r for r in rows[count:] if r["implementation"] in own or not _failed(r))


def work(backend: str, names: Sequence[str], seconds: float, files: Files) -> int:
    """Measures the sections of these names, one after the other; 1 as soon as this process's device is broken."""
    end = time.monotonic() + seconds
    state = files.read()
    result = state if "machine" in state else None
    device = "cpu" if workers.stand_in() else "cuda"
    for section in sorted((s for s in (*SECTIONS, *BESIDE) if s.name in names), key=lambda s: names.index(s.name)):
        entry = {"section": section.name, "backend": backend, "ended": None}
        entry["before"] = {part: len(result[part]) if result else 0 for part in ("optimizer", "training")}
        state["sections"].append(entry)
        files.write(result or state)
        ours = (_STAND_INS if device == "cpu" else OURS)[backend]
        left = max(0.0, end - time.monotonic())
        plan = dataclasses.replace(
            section.plan, ours=ours, device=device, rounds=15, seconds=min(section.seconds, left), keep_going=True
        )
        if device == "cpu":
            plan = dataclasses.replace(plan, quick=True, queued=True, rounds=2)

        def write(measured: dict[str, Any]) -> None:
            measured |= {"notes": state["notes"], "sections": state["sections"]}
            files.write(measured)

        result = run(plan, lambda what, done: print(f"{backend}: {what}", flush=True), write, result)
        entry["ended"] = workers.broken(device) or "done"
        write(result)
        if entry["ended"] != "done":
            return 1
    return 0


def failures(result: dict[str, Any]) -> Iterator[str]:
    """What raised, a line each; the tables name it, too."""
    for row in (*result["optimizer"], *result["training"]):
        if _failed(row):
            yield f"{row['model']} {row['method']} {row['dtype']} by {row['implementation']} {row['note']}"
    for each in result["left_out"]:
        if each["why"].startswith(FAILED):
            yield f"{each['what']} {each['why']}"
    yield from _lost(result)


def _failed(row: dict[str, Any]) -> bool:
    return row["ms"] is None and row["note"].startswith(FAILED)


def report(result: dict[str, Any]) -> str:
    """The notes, the targets as a table, and the report's own tables."""
    lines = ["| must reach | measured | |", "| --- | --- | --- |"]
    for target in targets(result):
        verdict = {True: "met", False: "**missed**", None: "–"}[target.met if result["machine"].get("gpu") else None]
        lines.append(f"| {target.what} | {target.measured or 'not measured'} | {verdict} |")
    title, rest = markdown(result).split("\n\n", 1)
    return "\n\n".join([title, *result.get("notes", []), *_lost(result), "\n".join(lines), rest])


def _lost(result: dict[str, Any]) -> Iterator[str]:
    for entry in result.get("sections", []):
        if entry["ended"] not in (None, "done"):
            yield f"The section {entry['section']!r} was lost to {entry['backend']}: {entry['ended']}."


def _replace(path: Path, text: str) -> None:
    unfinished = path.with_suffix(".new")
    try:
        unfinished.write_text(text)
        os.replace(unfinished, path)
    except OSError:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise


if __name__ == "__main__":
    assert set(PARTS) >= {part for section in SECTIONS for part in section.plan.parts}
    raise SystemExit(main())
