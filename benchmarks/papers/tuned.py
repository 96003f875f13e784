"""A table whose numbers are chosen first, on a validation set: which runs there are, and making them.

Of each network the base optimizer comes first: its learning rate, then its weight decay. Every other method starts
from these, and has as many runs for its radius and its own numbers. A rule's ``first`` configurations are all tried,
and its ``second`` ones each change the best of the first; lr, weight_decay and rho are factors, other numbers values.
Then come the seeds on the test set, which no choice has seen. A row with ``numbers_of`` has no search.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from time import monotonic

from benchmarks.frontier.table import SCALED, resolved
from benchmarks.papers.methods import BASES
from benchmarks.papers.settings import TrainSettings
from benchmarks.papers.tables import Row, Table, TableError, applies, split_name
from benchmarks.papers.tuned_run import Job, numbers_of, run, seconds_of
from benchmarks.resumable import Records, outcomes, pool

TUNING_SEEDS = 1001  # the first of the seeds that numbers are chosen with; those of the test start at 1
PHASES = ("first", "second", "test")


class Tuned:
    """The table's rows, and of each row the runs of a phase, as far as the finished ones say which these are."""

    def __init__(self, table: Table, records: Records, seeds: int | None = None, data_dir: Path | None = None) -> None:
        assert table.search is not None
        self.table, self.search, self.records, self.data_dir = table, table.search, records, data_dir
        self.by_name = {row.name: row for row in table.rows}
        self._seeds = seeds
        self._chosen: dict[tuple[str, int], TrainSettings | None] = {}  # by row and number of records

    def base(self, row: Row) -> Row:
        """The base optimizer's row of the same line."""
        line = split_name(row.name)[0]
        found = [r for r in self.table.rows if split_name(r.name)[0] == line and r.settings.method in BASES]
        if len(found) != 1:
            raise TableError(f"{self.table.name}: the rows {line}/... have {len(found)} base optimizers: one is needed")
        return found[0]

    def seeds(self, row: Row) -> int:
        """Of the test."""
        wanted = row.seeds or self.table.seeds
        return min(wanted, self._seeds or wanted)

    def rule(self, row: Row) -> dict:
        """The last of the search's rules that applies to a row."""
        found = [r for r in self.search.rules if applies(r, dataclasses.asdict(row.settings))]
        if not found:
            raise TableError(f"{self.table.name}: no rule of the search is for the row {row.name}")
        return found[-1]

    def count(self, row: Row, phase: str) -> int:
        """How many runs a phase has."""
        if phase == "test":
            return self.seeds(row)
        return 0 if row.numbers_of else len(self.rule(row)[phase]) * self.search.seeds

    def jobs(self, row: Row, phase: str) -> list[Job]:
        """The runs of ``first``, ``second`` or ``test``; none where those that they depend on have failed."""
        if phase == "test":
            chosen = self.chosen(row)
            found, first, count = [] if chosen is None else [chosen], 1, self.seeds(row)
        else:
            found = [dataclasses.replace(s, validation=self.search.validation) for s in self._tried(row, phase)]
            first, count = TUNING_SEEDS, self.search.seeds
        return [Job(row.name, phase, s, first + seed, self.data_dir) for s in found for seed in range(count)]

    def chosen(self, row: Row) -> TrainSettings | None:
        """The row with the numbers that are best on the validation set, or those of another row."""
        key = row.name, len(self.records.by_key)
        if key not in self._chosen:
            self._chosen[key] = self._choice(row)
        return self._chosen[key]

    def _choice(self, row: Row) -> TrainSettings | None:
        if row.numbers_of is not None:
            other = self.chosen(self.by_name[row.numbers_of])
            if other is None:
                return None
            wanted, there = numbers_of(row.settings), numbers_of(other)
            return dataclasses.replace(row.settings, **{name: there[name] for name in wanted if name in there})
        if len(self.records.of(self.jobs(row, "second"))) < self.count(row, "second"):
            return None
        return self._best(row, self._tried(row, "first") + self._tried(row, "second"))

    def at_the_edge(self, row: Row) -> bool:
        """Whether a scaled number was chosen beside which none was tried on one side."""
        chosen = self.chosen(row)
        if row.numbers_of is not None or chosen is None:
            return False
        tried = self._tried(row, "first") + self._tried(row, "second")
        values = {name: sorted({getattr(s, name) for s in tried}) for name in SCALED}
        return any(getattr(chosen, name) in (v[0], v[-1]) for name, v in values.items() if len(v) > 1)

    def _tried(self, row: Row, phase: str) -> list[TrainSettings]:
        if row.numbers_of is not None:
            return []
        start: TrainSettings | None = row.settings
        base = self.base(row)
        if row is not base:
            best = self.chosen(base)
            if best is None:
                return []
            start = dataclasses.replace(row.settings, lr=best.lr, weight_decay=best.weight_decay)
        if phase == "second":
            start = self._best(row, self._tried(row, "first"))
        return [] if start is None else [_changed(start, change) for change in self.rule(row)[phase]]

    def _best(self, row: Row, tried: list[TrainSettings]) -> TrainSettings | None:
        """By mean accuracy over the seeds, then by mean loss; without those of which a run is missing."""
        scored = []
        for settings in tried:
            judged = dataclasses.replace(settings, validation=self.search.validation)
            jobs = [Job(row.name, "", judged, TUNING_SEEDS + seed) for seed in range(self.search.seeds)]
            runs = self.records.of(jobs)
            if len(runs) == len(jobs):
                losses = [math.inf if r["loss"] is None else r["loss"] for r in runs]
                scored.append((-mean(r["accuracy"] for r in runs), mean(losses), settings))
        return min(scored, key=lambda s: s[:2])[2] if scored else None


def execute(tuned: Tuned, rows: list[Row], workers: int, say: Callable[[str], None]) -> list[str]:
    """Makes every run of these rows that is not finished; returns what failed, in words."""
    costs = {row.name: seconds_of(row.settings, tuned.data_dir) for row in rows}
    for line, found in lines(rows).items():
        runs = sum(tuned.count(row, phase) for row in found for phase in PHASES)
        minutes = sum(costs[row.name] * tuned.count(row, phase) for row in found for phase in PHASES) / workers / 60
        say(f"{line}: {runs} runs, about {minutes:.0f} min from nothing")
    left = sum(costs[row.name] * tuned.count(row, phase) for row in rows for phase in PHASES)
    failed: list[str] = []
    done, began = 0.0, monotonic()
    with pool(workers) as processes:
        for group, phase in stages(tuned, rows):
            jobs = {job.key(): job for row in group for job in tuned.jobs(row, phase)}
            todo = [job for key, job in jobs.items() if key not in tuned.records.by_key]
            left -= sum(costs[row.name] * tuned.count(row, phase) for row in group)
            waiting = sum(costs[job.row] for job in todo)
            todo.sort(key=lambda job: -costs[job.row])  # so that the processes end a phase at about the same time
            for job, outcome in outcomes(processes, run, todo):
                done, waiting = done + costs[job.row], waiting - costs[job.row]
                numbers = " ".join(f"{name}={value:.3g}" for name, value in numbers_of(job.settings).items())
                what = f"{job.row}, {job.phase}, seed {job.seed}, {numbers}"
                if isinstance(outcome, BaseException):
                    failed.append(f"{what}: {type(outcome).__name__}: {outcome}")
                    say(failed[-1])
                    continue
                tuned.records.add(outcome)
                minutes = (left + waiting) * (monotonic() - began) / done / 60
                say(f"{what}: {outcome['accuracy']:.1%}, {outcome['seconds']:.0f} s; {minutes:.0f} min left")
    return failed


def lines(rows: list[Row]) -> dict[str, list[Row]]:
    """The rows by what their names have before the last stroke: those that are compared."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(split_name(row.name)[0], []).append(row)
    return found


def stages(tuned: Tuned, rows: list[Row]) -> list[tuple[list[Row], str]]:
    """Network by network, then the rows that have the numbers of others."""
    found: list[tuple[list[Row], str]] = []
    searched = [row for row in rows if row.numbers_of is None]
    for own in lines(searched).values():
        bases = [row for row in own if row is tuned.base(row)]
        others = [row for row in own if row not in bases]
        found += [(bases, "first"), (bases, "second"), (others, "first"), (others, "second"), (own, "test")]
    return [*found, ([row for row in rows if row.numbers_of is not None], "test")]


def with_needed(tuned: Tuned, rows: list[Row]) -> list[Row]:
    """The rows, with those whose numbers they start from or have, and what they are compared with."""
    wanted: list[str] = []

    def add(row: Row) -> None:
        if row.name not in wanted:
            wanted.append(row.name)
            add(tuned.base(row))
            if row.numbers_of is not None:
                add(tuned.by_name[row.numbers_of])

    for row in rows:
        add(row)
    return [row for row in tuned.table.rows if row.name in wanted]


def _changed(settings: TrainSettings, change: dict[str, float]) -> TrainSettings:
    numbers = resolved({name: getattr(settings, name) for name in SCALED}, change)
    return dataclasses.replace(settings, **{name: float(f"{value:.4g}") for name, value in numbers.items()})
