"""SAM's accuracy at which price: every method on the demo's digits or on photographs, tuned and tested alike.

    python -m benchmarks.frontier                   # both networks, 8 seeds; says at once how long it takes
    python -m benchmarks.frontier --data elpv       # three networks, one of them pretrained, in frontier-elpv.*
    python -m benchmarks.frontier --quick -o tried  # every line of code, no result
    python -m benchmarks.frontier --report          # runs nothing: what the finished runs say

An interrupted command goes on where it stopped: finished runs are in frontier.jsonl. With --document the table is
written into that file, too, between its frontier markers.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console

from benchmarks.frontier import problems, protocol, report
from benchmarks.frontier.table import BASE, BY_NAME, ROWS
from benchmarks.marks import rewrite
from fastsam.commands.machine import machine
from fastsam.commands.training.data import DataError

RESULTS = Path(__file__).parents[1] / "results"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", choices=problems.NETWORKS, default="digits")
    parser.add_argument("--networks", nargs="+", metavar="NAME", help="some of those on the data")
    parser.add_argument("--rows", nargs="+", choices=BY_NAME, default=list(BY_NAME), help="of the table; SGD always")
    parser.add_argument("--seeds", type=int, default=8, help="of the test")
    parser.add_argument("--tuning-seeds", type=int, default=2, help="of each configuration")
    parser.add_argument("--workers", type=int, default=2, help="processes, with a thread each")
    parser.add_argument("--output", "-o", type=Path, default=RESULTS, help="folder")
    parser.add_argument("--document", type=Path, help="a file with the frontier's markers")
    parser.add_argument("--report", action="store_true", help="run nothing: write what the finished runs say")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that everything runs")
    options = parser.parse_args(arguments)
    for name in ("seeds", "tuning_seeds", "workers"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)} must be at least 1")
    there = dict(zip(problems.NETWORKS[options.data], problems.names(options.data), strict=True))
    if unknown := set(options.networks or ()) - set(there):
        parser.error(f"--networks {min(unknown)!r} is none of those on {options.data}: {', '.join(there)}")
    networks = tuple(there[name] for name in options.networks or there)
    stem = "frontier" if options.data == "digits" else f"frontier-{options.data}"

    wanted = tuple(row for row in ROWS if row is BASE or row.name in options.rows)
    skipped = report.skipped(wanted)
    rows = tuple(row for row in wanted if row.name not in skipped)
    plan = protocol.Plan(networks, rows, options.tuning_seeds, options.seeds, options.quick)
    console = Console()

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    for name, reason in skipped.items():
        say(f"{name} is left out: {reason}")
    written = options.output / f"{stem}.json"
    described = json.loads(written.read_text())["machine"] if options.report else machine(1)
    records = protocol.Records(options.output / f"{stem}.jsonl")
    try:
        failed = [] if options.report else protocol.execute(plan, records, options.workers, say)
    except (DataError, ImportError) as error:  # the photographs are a package
        say(str(error))
        return 2
    summed = report.summary(plan, records)

    results = {
        "machine": described,
        "settings": {
            "seeds": plan.seeds, "tuning_seeds": plan.tuning_seeds, "quick": plan.quick, "workers": options.workers,
        },
        "skipped": skipped | report.unfinished(plan, summed),
        "failed": failed,
        "networks": summed,
    }  # fmt: skip
    table = report.markdown(results)
    written.write_text(json.dumps(results, indent=1) + "\n")
    (options.output / f"{stem}.md").write_text(table)
    report.draw(results, options.output / f"{stem}.png")
    if options.document is not None:
        rewrite(options.document, "frontier", table.rstrip())
    say(table)
    for what in failed:
        say(f"failed: {what}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
