"""``fastsam bench --memory``: bytes a parameter that an optimizer takes beyond weights and gradients.

*Counted* are the arrays that an implementation keeps from step to step, here in bytes of float32: the base optimizer's
momentum (4, AdamW's two moments 8), the backup of the weights (4), averages and eigenvector. Where the weights are in
bfloat16, so are all of these, and fastsam rounds the update stochastically. *Between steps* and *peak* are measured,
each case in a process of its own that has made one step already: what the process has more than with weights and
gradients alone, and the most it has during two more steps. The difference are temporaries.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastsam.commands.bench import rivals
from fastsam.commands.bench.clock import PeakMemory
from fastsam.commands.bench.parameter_sets import parameter_set
from fastsam.commands.bench.settings import BASES, RHO
from fastsam.support.memory import free_memory

_BASE = {"sgd": 4, "adamw": 8}
_TITLES = {"base": "alone", "sam": "SAM", "fsam": "F-SAM", "eigensam": "Eigen-SAM", "momentumsam": "MomentumSAM"}


class Case(NamedTuple):
    """One row: the bytes that it keeps for each float32 parameter besides the base optimizer's."""

    method: str
    implementation: str
    kept: int
    half: bool = False  # state_dtype=torch.bfloat16
    temporaries: int = 1  # arrays of the size of the weights, at most, within a step
    weights: torch.dtype = torch.float32

    @property
    def title(self) -> str:
        return self.implementation + (", state_dtype=bfloat16" if self.half else "")

    def counted(self, base: str) -> int:
        """Bytes a parameter."""
        return (_BASE[base] + self.kept) * self.weights.itemsize // 4

    def need(self, base: str) -> int:
        """Bytes a parameter at most, weights and gradients among them."""
        return self.counted(base) + (2 + self.temporaries) * self.weights.itemsize


_FLOAT32 = (
    Case("base", "torch", 0),
    Case("sam", "fastsam", 4),
    Case("sam", "authors", 4),
    Case("sam", "pytorch_optimizer", 4, temporaries=2),
    Case("fsam", "fastsam", 4 + 4 + 4),
    Case("fsam", "fastsam", 4 + 2 + 2, half=True),
    Case("fsam", "authors", 4 + 4),
    Case("fsam", "pytorch_optimizer", 4 + 4, temporaries=2),
    Case("eigensam", "fastsam", 4 + 4),
    Case("eigensam", "fastsam", 4 + 2, half=True),
    Case("eigensam", "authors", 4 + 4, temporaries=4),
    Case("momentumsam", "fastsam", 4),
)
CASES = _FLOAT32 + tuple(case._replace(weights=torch.bfloat16) for case in _FLOAT32 if not case.half)


def measure(
    models: Iterable[str], bases: Iterable[str], device: str, threads: int, show: Callable[[str], None] = lambda _: None
) -> list[dict[str, Any]]:
    """A row for each model, base optimizer and case, measured or with a note why it was not."""
    # glibc then gives every freed tensor back at once: the peak is that of the tensors alive together
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "262144", "OMP_NUM_THREADS": str(threads)}
    rows: list[dict[str, Any]] = []
    for model, base in itertools.product(models, bases):
        command = [sys.executable, "-m", __name__, model, base, device]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for case, line in zip(CASES, process.stdout, strict=False):
                weights = str(case.weights).removeprefix("torch.")
                show(f"{model} in {weights}, {base}: {_TITLES[case.method]}, {case.title}")
                row = {"set": model, "weights": weights, "base": base, "method": case.method, "title": case.title}
                rows.append({**row, "counted": case.counted(base), **json.loads(line)})
        if process.returncode:
            raise OSError(f"the process that measures {model} ended with {process.returncode}: see what it wrote")
    return rows


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a table, in bytes a parameter."""
    lines = ["| parameters | weights | base | method | implementation | counted | between steps | peak |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for row in rows:
        measured = [row["note"], ""] if "note" in row else [f"{row['between']:.1f}", f"{row['peak']:.1f}"]
        cells = [
            row["set"],
            row["weights"],
            row["base"],
            _TITLES[row["method"]],
            row["title"],
            f"{row['counted']}",
            *measured,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def write(rows: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """memory.json and memory.md in ``folder``."""
    paths = folder / "memory.json", folder / "memory.md"
    for path, text in zip(paths, (json.dumps(rows, indent=1) + "\n", markdown(rows)), strict=True):
        path.write_text(text)
    return list(paths)


def one_case(model: str, base: str, device: str, case: Case) -> dict[str, float | str]:
    """Bytes a parameter between steps and at the peak of a step, beyond weights and gradients."""
    place = torch.device(device)
    try:  # once with next to nothing, so that what is imported and set up is there before
        one = torch.ones(1, device=place, dtype=case.weights)
        _steps(case, base, [torch.nn.Parameter(one.clone())], [one])()
    except rivals.NotOffered as reason:
        return {"note": str(reason)}
    shapes = parameter_set(model)
    parameters = [torch.nn.Parameter(t) for t in shapes.random(0, 0.02, place, case.weights)]
    gradients = shapes.random(1, 0.01, place, case.weights)
    with PeakMemory(place) as start:
        pass
    steps = _steps(case, base, parameters, gradients)
    steps()
    with PeakMemory(place) as peak:
        steps()
        steps()
    if start.before is None or peak.before is None or peak.mib is None:
        return {"note": "this system does not tell how much memory a process has"}
    between = peak.before - start.before
    return {"between": between / shapes.parameters, "peak": (between + peak.mib * 2**20) / shapes.parameters}


def _steps(
    case: Case, base: str, parameters: list[torch.nn.Parameter], gradients: list[torch.Tensor]
) -> Callable[[], None]:
    """What makes a whole step: the gradients of both passes are the same tensors."""
    import fastsam

    base_class, options = BASES[base]
    passes: list[Callable[[], Any]]
    if case.method == "base":
        passes = [base_class(parameters, **options).step]
    elif case.implementation == "fastsam":
        own: dict[str, Any] = {"state_dtype": torch.bfloat16} if case.half else {}
        own |= {"stochastic_rounding": True} if case.weights == torch.bfloat16 else {}
        kind = {"sam": "SAM", "fsam": "FriendlySAM", "eigensam": "EigenSAM", "momentumsam": "MomentumSAM"}[case.method]
        optimizer = getattr(fastsam, kind)(parameters, base_class, rho=RHO, **own, **options)
        if case.method == "eigensam":
            optimizer.eigenvector = gradients
        passes = [optimizer.first_step, optimizer.second_step]
    else:
        module = torch.nn.Module()
        module.weights = torch.nn.ParameterList(parameters)
        eigenvector = [g.clone() for g in gradients] if case.method == "eigensam" else []
        runner = rivals.build(case.implementation, case.method, base, module, eigenvector)
        passes = [runner.optimizer.first_step, runner.optimizer.second_step]

    def step() -> None:
        for one_pass in passes:
            for p, g in zip(parameters, gradients, strict=True):
                p.grad = g
            one_pass()

    return step


def main(model: str, base: str, device: str) -> None:
    """Prints a line of JSON for each case, measured in a process forked from this one, which has only imported."""
    import fastsam  # noqa: F401

    parameters = parameter_set(model).parameters
    warnings.filterwarnings("ignore", "the second gradient is the first")  # they are the same memory
    for case in CASES:
        need, free = case.need(base) * parameters, free_memory(torch.device(device))
        if free is not None and need > free:
            note = f"does not fit: needs up to {need / 2**30:.1f} of {free / 2**30:.1f} GiB"
            print(json.dumps({"note": note}), flush=True)
            continue
        child = os.fork()
        if child == 0:
            print(json.dumps(one_case(model, base, device, case)), flush=True)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            print(json.dumps({"note": "ended before it was done: too little memory?"}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
