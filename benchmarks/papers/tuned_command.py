"""The command of a table with a search: makes the runs that are missing, and writes what all of them say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from benchmarks.marks import rewrite
from benchmarks.papers import tuned_report
from benchmarks.papers.results import ROOT
from benchmarks.papers.tables import Row, Table
from benchmarks.papers.tuned import Tuned, execute, with_needed
from benchmarks.resumable import Records
from fastsam.commands.machine import machine
from fastsam.commands.training.data import open_dataset
from fastsam.commands.training.run import write_json

DOCUMENT, README = ROOT / "docs" / "evidence.md", ROOT / "README.md"


def run(
    table: Table,
    rows: list[Row],
    output: Path,
    *,
    seeds: int | None,
    workers: int,
    data_dir: Path | None,
    only_report: bool,
    document: bool,
    say: Callable[[str], None],
) -> int:
    """Writes ``TABLE.jsonl`` (a line for each run), ``.json``, ``.md`` and pictures into ``output``; an exit status.

    The report is of the whole table, whatever ``rows`` were asked for. With ``document`` it is also put between the
    table's marks in docs/evidence.md, and one table of it between those in README.md.
    """
    tuned = Tuned(table, Records(output / f"{table.name}.jsonl"), seeds, data_dir)
    written = output / f"{table.name}.json"
    failed: list[str] = []
    if only_report:
        described = json.loads(written.read_text())["machine"] if written.exists() else machine(1)
    else:
        for source in {row.settings.data for row in rows}:
            open_dataset(source, data_dir=data_dir)  # says what is missing before anything runs
        described = machine(1)
        failed = execute(tuned, with_needed(tuned, rows), workers, say)
    record = tuned_report.summary(tuned, table.rows, described)
    text = tuned_report.markdown(record)
    output.mkdir(parents=True, exist_ok=True)
    write_json(written, record)
    (output / f"{table.name}.md").write_text(text)
    pictures = tuned_report.draw(record, output)
    if document:
        shown = [f"![{path.stem.replace('-', ', ')}](../{path.relative_to(ROOT)})" for path in pictures]
        rewrite(DOCUMENT, table.name, "\n\n".join([text.rstrip(), *shown]))
        rewrite(README, table.name, tuned_report.short(record))
    say(text)
    for what in failed:
        say(f"failed: {what}")
    return 1 if failed else 0
