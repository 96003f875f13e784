"""What a table is made of: a TOML file of rows, each of them the settings of one training run.

    title = "..."                       source = "..."          # shown with the result
    kind = "train"                                              # or "sde"
    [defaults]        epochs = 200                              # for every row
    [grid]            data = ["cifar10", "cifar100"]            # a row for each combination, named cifar10/SAM
                      method = ["SGD", "SAM"]
    [[rows]]          name = "cifar10/SAM, rho 0.1"             # a row of its own
    [[override]]      where = { data = "svhn" }                 # for the rows that match, in this order
                      set = { lr = 0.01 }
    [[digits]]        where = {...}  set = {...}                # the same, with ``--data digits`` only
    [[reported]]      row = "..." value = 78.07 runs = 1 source = "..."
    [search]          seeds = 1  validation = 394               # numbers are chosen first, see tuned.py
    [[search.rules]]  where = {...}  first = [{ rho = 0.5 }]  second = [{ alpha = 0.4 }]

A row of its own may have ``numbers_of = "another row"``, whose numbers it takes in place of a search, and ``seeds``.

A key that no setting has, a value of the wrong type, an unknown method or network is a ``TableError`` with the nearest
names.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

from benchmarks.papers import runners
from benchmarks.papers.settings import SdeSettings, TrainSettings, nearest

FOLDER = Path(__file__).parent / "tables"
KEYS = (
    "title", "source", "note", "kind", "seeds", "defaults", "grid", "rows", "override", "digits", "reported", "search",
)  # fmt: skip


class TableError(ValueError):
    """A table, row, method or setting that does not exist or does not fit."""


KINDS = {"train": TrainSettings, "sde": SdeSettings}


@dataclass(frozen=True)
class Row:
    """A name, its settings, and what the paper or its authors' logs report for it.

    In a table with a search: ``numbers_of`` is the row whose numbers this one has, and ``seeds`` how many there are, if
    not the table's.
    """

    name: str
    settings: TrainSettings | SdeSettings
    reported: dict[str, Any] | None = None
    numbers_of: str | None = None
    seeds: int | None = None


@dataclass(frozen=True)
class Search:
    """How a table's numbers are chosen: on ``validation`` images of the training set, with so many seeds each."""

    seeds: int
    validation: int
    rules: list[dict[str, Any]]


@dataclass(frozen=True)
class Table:
    name: str
    title: str
    source: str
    note: str
    kind: str
    seeds: int
    rows: list[Row]
    search: Search | None = None


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def read(name: str, data: str | None = None, changes: dict[str, Any] | None = None) -> Table:
    """The table ``name``, or the file it is a path of.

    Args:
        data: run every row on this instead of its own; rows that then are the same appear once.
        changes: settings that replace those of every row.
    """
    path = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    if not path.exists():
        raise TableError(f"there is no table {name!r}{nearest(name, names())}")
    try:
        content = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise TableError(f"{path} is no TOML: {error}") from None
    _known(content, KEYS, str(path))
    kind = content.get("kind", "train")
    if kind not in KINDS:
        raise TableError(f"{path}: kind={kind!r}{nearest(kind, KINDS)}")
    raw = _grid(content) + [dict(row) for row in content.get("rows", [])]
    reported = {entry["row"]: entry for entry in content.get("reported", [])}
    unknown = set(reported) - {row["name"] for row in raw}
    if unknown:
        raise TableError(f"{path}: reported row {min(unknown)!r}{nearest(min(unknown), [r['name'] for r in raw])}")
    rows: dict[str, Row] = {}
    stands_for: dict[str, str] = {}  # by the name of each row, that of the one which it is the same as
    for given in raw:
        values = {**content.get("defaults", {}), **given}
        row_name, numbers_of, row_seeds = values.pop("name"), values.pop("numbers_of", None), values.pop("seeds", None)
        _apply(content.get("override", []), values)
        report = reported.get(row_name)
        if data is not None and data != values.get("data"):
            row_name, report = row_name.replace(str(values["data"]), Path(data).name), None
            values["data"] = data
            values.update({key: [] for key in ("mean", "std") if key in values})  # the other data's
        if data == "digits":
            _apply(content.get("digits", []), values)
        settings = _settings(KINDS[kind], {**values, **(changes or {})}, f"{path.name}, row {row_name}")
        row = Row(row_name, settings, report, numbers_of, row_seeds)
        key = json.dumps([dataclasses.asdict(settings), numbers_of and row_name])
        stands_for[row_name] = rows.setdefault(key, row).name
    words = {key: content.get(key, "") for key in ("title", "source", "note")}
    if data is not None and any(data != row.get("data", content.get("defaults", {}).get("data")) for row in raw):
        words["note"] = f"Run on {data} instead of the papers' data. {words['note']}".strip()
    for row in rows.values():
        if row.numbers_of is not None and row.numbers_of not in stands_for:
            near = nearest(row.numbers_of, list(stands_for))
            raise TableError(f"{path}: row {row.name} has the numbers of {row.numbers_of!r}{near}")
    found = [
        dataclasses.replace(row, numbers_of=row.numbers_of and stands_for[row.numbers_of]) for row in rows.values()
    ]
    search = _search(content["search"], str(path)) if "search" in content else None
    return Table(path.stem, kind=kind, seeds=content.get("seeds", 3), rows=found, search=search, **words)


def chosen(rows: list[Row], patterns: list[str] | None) -> list[Row]:
    """The rows whose name is, or matches (``*``), one of ``patterns``; all of them without any."""
    if not patterns:
        return rows
    found = []
    for pattern in patterns:
        matching = [row for row in rows if fnmatch.fnmatchcase(row.name, pattern)]
        if not matching:
            raise TableError(f"no row is called {pattern!r}{nearest(pattern, [row.name for row in rows])}")
        found += [row for row in matching if row not in found]
    return found


def split_name(name: str) -> tuple[str, str]:
    """The line and the column of a row in the table: ``"cifar10/resnet18/SAM"`` is the column SAM."""
    line, _, column = name.rpartition("/")
    return line or "all", column


def parse_change(text: str) -> tuple[str, Any]:
    """``"lr=0.1"`` as a name and a value of that setting's type."""
    name, equals, value = text.partition("=")
    if not equals:
        raise TableError(f"--set {text!r} must be NAME=VALUE")
    try:
        return name, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return name, value  # a string without quotes


def _grid(content: dict) -> list[dict]:
    axes = content.get("grid", {})
    rows = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())] if axes else []
    return [{"name": "/".join(_word(axis, row[axis]) for axis in axes), **row} for row in rows]


def _word(axis: str, value: Any) -> str:
    return f"{axis}={value}" if isinstance(value, (int, float)) else str(value)


def _search(content: dict, where: str) -> Search:
    for rule in content.get("rules", []):
        _known(rule, ("where", "first", "second"), f"{where}, a rule of the search")
    try:
        return Search(**content)
    except TypeError:
        raise TableError(f"{where}: the search has seeds, validation and rules, and nothing else") from None


def applies(rule: dict, values: dict[str, Any]) -> bool:
    """Whether every setting that a rule's ``where`` names has its value, or one of its values."""
    return all(
        values.get(key) in (value if isinstance(value, list) else [value]) for key, value in rule["where"].items()
    )


def _apply(rules: list[dict], values: dict[str, Any]) -> None:
    for rule in rules:
        _known(rule, ("where", "set"), "a rule")
        if applies(rule, values):
            values.update(rule["set"])


def _settings(kind: type, values: dict[str, Any], where: str):
    fields = {f.name: f for f in dataclasses.fields(kind)}
    _known(values, fields, where)
    types = {"str": str, "int": int, "float": (int, float), "bool": bool, "list": list, "dict": dict}
    for name, value in values.items():
        wanted = types[fields[name].type]
        if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
            raise TableError(f"{where}: {name}={value!r} must be of type {fields[name].type}")
        if isinstance(value, (int, float)) and value < 0:
            raise TableError(f"{where}: {name}={value!r} must be at least 0")
    missing = [n for n, f in fields.items() if n not in values and _required(f)]
    if missing:
        raise TableError(f"{where}: {', '.join(missing)} is missing")
    settings = kind(**values)
    try:
        runners.check(settings)
    except ValueError as error:
        raise TableError(f"{where}: {error}") from None
    return settings


def _required(f: dataclasses.Field) -> bool:
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING


def _known(given: dict, known, where: str) -> None:
    for key in given:
        if key not in known:
            raise TableError(f"{where}: unknown key {key!r}{nearest(key, known)}")
