"""Which runs there are, and running them: in parallel, with progress, going on from what is finished."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import mean
from time import monotonic

from benchmarks.frontier.problems import problem
from benchmarks.frontier.table import BASE, SCALED, Numbers, Row, resolved
from benchmarks.frontier.training import PLAIN_EVERY, Job, plain_milliseconds, run
from benchmarks.resumable import Records, outcomes, pool

TUNING_SEEDS = 1000  # the first of the seeds that numbers are chosen with; those of the test start at 0


@dataclass(frozen=True)
class Plan:
    networks: tuple[str, ...]
    rows: tuple[Row, ...]  # those that can run; the base is one of them
    tuning_seeds: int
    seeds: int
    quick: bool


class Search:
    """The configurations of a row on a network, as far as the finished runs say which come next."""

    def __init__(self, plan: Plan, records: Records, network: str, row: Row) -> None:
        self.plan, self.records, self.network, self.row = plan, records, network, row

    def jobs(self, phase: str) -> list[Job]:
        """All runs of a phase; none where the runs that it depends on have failed."""
        numbers = {"first": self._first, "second": self._second, "test": self._chosen}[phase]()
        start, count = (0, self.plan.seeds) if phase == "test" else (TUNING_SEEDS, self.plan.tuning_seeds)
        return [
            Job(self.network, self.row.name, phase, tuple(sorted(n.items())), start + seed, self.plan.quick)
            for n in numbers
            for seed in range(count)
        ]

    def chosen(self) -> dict | None:
        """The best configuration on the validation set: its numbers, accuracy and loss."""
        return self._best(self.jobs("first") + self.jobs("second"))

    def at_the_edge(self) -> bool:
        """Whether a radius, learning rate or weight decay was chosen beside which none was tried on one side."""
        best, tried = self.chosen(), self._first() + self._second()
        ranges = {name: sorted({numbers[name] for numbers in tried}) for name in SCALED}
        return any(
            best["numbers"][name] in (values[0], values[-1]) for name, values in ranges.items() if len(values) > 1
        )

    def _start(self) -> Numbers | None:
        """What factors multiply: the network's numbers, with what was best for the base optimizer."""
        if self.row is BASE:
            return problem(self.network, self.plan.quick).numbers
        best = Search(self.plan, self.records, self.network, BASE).chosen()
        return best and best["numbers"]

    def _first(self) -> list[Numbers]:
        start = self._start()
        return [] if start is None else [resolved(start, change) for change in self.row.first]

    def _second(self) -> list[Numbers]:
        best = self._best(self.jobs("first"))
        return [] if best is None else [resolved(best["numbers"], change) for change in self.row.second]

    def _chosen(self) -> list[Numbers]:
        best = self.chosen()
        return [] if best is None else [best["numbers"]]

    def _best(self, jobs: list[Job]) -> dict | None:
        """By mean accuracy over the seeds, then by mean loss; configurations with a failed run do not count."""
        found: dict[tuple, list[dict]] = {}
        for record in self.records.of(jobs):
            found.setdefault(tuple(record["numbers"].items()), []).append(record)
        scored = [
            {
                "numbers": dict(numbers),
                "accuracy": mean(r["accuracy"] for r in runs),
                "loss": mean(float("inf") if r["loss"] is None else r["loss"] for r in runs),
            }
            for numbers, runs in found.items()
            if len(runs) >= self.plan.tuning_seeds
        ]
        return min(scored, key=lambda s: (-s["accuracy"], s["loss"]), default=None)


def execute(plan: Plan, records: Records, workers: int, say: Callable[[str], None]) -> list[str]:
    """Makes every run that is not finished; returns what failed, in words.

    The base optimizer comes first, as the others start from its numbers; then all rows, one phase after the other.
    """
    searches = [Search(plan, records, network, row) for network in plan.networks for row in plan.rows]
    others = [s for s in searches if s.row is not BASE]
    bases = [s for s in searches if s.row is BASE]
    stages = [(bases, "first"), (bases, "second"), (others, "first"), (others, "second"), (searches, "test")]
    total = sum(
        len(s.row.first) * plan.tuning_seeds + len(s.row.second) * plan.tuning_seeds + plan.seeds for s in searches
    )
    say(f"{total} runs, {len(records.by_key)} of them finished or of other settings; {estimate(plan, workers)}")
    failed, done, made, began = [], 0, 0, monotonic()
    with pool(workers) as processes:
        for group, phase in stages:
            jobs = [job for search in group for job in search.jobs(phase)]
            todo = [job for job in jobs if job.key() not in records.by_key]
            done += len(jobs) - len(todo)
            # The long runs come first, so that the processes end a phase at about the same time.
            gradients = {s.row.name: s.row.gradients for s in group}
            todo.sort(key=lambda job: -gradients[job.row])
            for job, outcome in outcomes(processes, run, todo):
                done, made = done + 1, made + 1
                what = f"[{done}/{total}] {job.network} {job.row}, {phase}, seed {job.seed}, {_shown(job)}"
                if isinstance(outcome, BaseException):
                    failed.append(f"{what}: {type(outcome).__name__}: {outcome}")
                    say(failed[-1])
                    continue
                records.add(outcome)
                left = (total - done) * (monotonic() - began) / made / 60
                say(f"{what}: {outcome['accuracy']:.1%}, {outcome['seconds']:.1f} s; {left:.0f} min left")
    return failed


def estimate(plan: Plan, workers: int) -> str:
    """How long all runs take, from plain steps timed now and the rows' nominal gradients a step."""
    seconds = 0.0
    for network in plan.networks:
        plain = problem(network, plan.quick).steps * plain_milliseconds(network, plan.quick) / 1000
        for row in plan.rows:
            tuning = (len(row.first) + len(row.second)) * plan.tuning_seeds
            # a timed run takes plain steps besides
            seconds += plain * (row.gradients * (tuning + plan.seeds) + plan.seeds / PLAIN_EVERY)
    return f"about {seconds / workers / 60:.0f} min for all"


def _shown(job: Job) -> str:
    return " ".join(f"{name}={value:.3g}" for name, value in job.numbers)
