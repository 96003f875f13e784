"""Runs the tables of the F-SAM and Eigen-SAM papers, or rows of them, and sets the outcome beside the papers' figures.

    python -m benchmarks.papers --list                                  # the tables
    python -m benchmarks.papers f_sam --list                            # the rows of one
    python -m benchmarks.papers f_sam --rows 'cifar100/resnet18/*' --seeds 3 --data-dir /data
    python -m benchmarks.papers f_sam --data digits                     # all of it, small, on two cores
    python -m benchmarks.papers digits --record                         # the table in docs/papers.md
    python -m benchmarks.papers elpv                                    # chooses its numbers, then docs/evidence.md
    python -m benchmarks.papers elpv --report                           # runs nothing: what the finished runs say

Every row and seed has a folder of its own under --output. The same command again goes on where a run was killed, and
does not repeat what is finished. Runs are spread over the GPUs, one process each, or over --workers processes.

A table with a search, such as elpv, keeps its finished runs as lines of one file, benchmarks/results/TABLE.jsonl, which
any checkout goes on from.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table as ScreenTable

from benchmarks.papers import jobs, results, tables
from fastsam.commands.training.data import open_dataset


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    console = Console()
    try:
        if options.table is None:
            if not options.list:
                raise tables.TableError(f"name a table: {', '.join(tables.names())}")
            _list_tables(console)
            return 0
        return _table(options, console)
    except KeyboardInterrupt:
        return _complain("interrupted; the same command goes on from here")
    except (ValueError, ImportError, OSError, RuntimeError) as error:
        return _complain(str(error))


def _table(options: argparse.Namespace, console: Console) -> int:
    table = tables.read(options.table, options.data, dict(tables.parse_change(c) for c in options.set))
    rows = tables.chosen(table.rows, options.rows)
    if options.list:
        for row in rows:
            console.print(row.name, markup=False, highlight=False)
        return 0
    if table.search is not None:
        return _searched(table, rows, options, console)
    if options.report:
        raise ValueError(f"--report is for tables with a search; {table.name} has its report in its --output")
    count = table.seeds if options.seeds is None else options.seeds
    if count < 1:
        raise ValueError(f"seeds={count} must be at least 1")
    seeds = range(1, count + 1)
    for source in {row.settings.data for row in rows}:
        open_dataset(source, data_dir=options.data_dir)  # says what is missing before anything runs
    name = table.name if options.data is None else f"{table.name}-{Path(options.data).name}"
    output = options.output or Path("fastsam-papers") / name
    todo = [(row, seed) for seed in seeds for row in rows]
    fresh = not any(jobs.folder_of(row, seed, output).exists() for row, seed in todo)
    workers = jobs.processes(options.workers, len(todo))
    start = time.monotonic()
    finished, failed = jobs.run_all(todo, output, options.data_dir, workers, options.save_seconds, console)
    minutes = (time.monotonic() - start) / 60
    command = f"in one command of {minutes:.1f} minutes" if fresh else "in several commands"
    command += f" with {workers} process{'es' * (workers > 1)}"
    if finished:
        record = results.collect(table, rows, finished, command)
        results.write(record, output, table.kind)
        console.print(results.markdown(record), markup=False, highlight=False)
        console.print(f"Written to {escape(str(output))}", highlight=False)
        if options.record and not failed:
            results.commit(record, table.name, output)
    for row_name, seed, message in failed[:10]:
        _complain(f"{row_name}, seed {seed}: {message}")
    if failed[10:]:
        _complain(f"and {len(failed) - 10} more")
    return 1 if failed else 0


def _searched(table: tables.Table, rows: list[tables.Row], options: argparse.Namespace, console: Console) -> int:
    """A table whose numbers are chosen first."""
    from benchmarks.papers import tuned_command

    committed = options.output is None
    if committed and (options.set or options.data is not None or options.table.endswith(".toml")):
        raise ValueError(f"benchmarks/results holds the runs of {table.name} as it is: name an --output for others")
    if options.seeds is not None and options.seeds < 1:
        raise ValueError(f"seeds={options.seeds} must be at least 1")

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    return tuned_command.run(
        table, rows, options.output or results.ROOT / "benchmarks" / "results",
        seeds=options.seeds, workers=jobs.processes(options.workers, 1_000), data_dir=options.data_dir,
        only_report=options.report, document=committed, say=say,
    )  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.papers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", nargs="?", help="one of --list, or a TOML file of that form")
    parser.add_argument("--list", action="store_true", help="show the tables, or the rows of one, and stop")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="names or patterns such as 'cifar10/*/SAM'")
    parser.add_argument("--seeds", type=int, metavar="N", help="seeds 1 ... N, instead of the table's number")
    parser.add_argument("--data", help="train on this instead: digits, a hub name, a folder, a parquet file")
    parser.add_argument("--data-dir", type=Path, help="where copies of hub data sets lie; nothing is downloaded then")
    parser.add_argument("--output", type=Path, help="folder (default: fastsam-papers/TABLE)")
    parser.add_argument("--workers", type=int, help="processes (default: one a GPU, else one a processor)")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings for every row")
    parser.add_argument("--save-seconds", type=float, default=60.0, help="from one checkpoint to the next (60)")
    parser.add_argument("--report", action="store_true", help="run nothing: write what the finished runs say")
    parser.add_argument("--record", action="store_true", help="also write benchmarks/results and docs/papers.md")
    return parser


def _list_tables(console: Console) -> None:
    screen = ScreenTable("table", "rows", "what", title="Tables", title_justify="left")
    for name in tables.names():
        table = tables.read(name)
        screen.add_row(name, str(len(table.rows)), escape(table.title))
    console.print(screen)


def _complain(message: str) -> int:
    print(f"benchmarks.papers: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
