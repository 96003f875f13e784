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

A key that no setting has, a value of the wrong type, an unknown method or network is a ``TableError`` with the nearest
names.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

FOLDER = Path(__file__).parent / "tables"
KEYS = ("title", "source", "note", "kind", "seeds", "defaults", "grid", "rows", "override", "digits", "reported")


class TableError(ValueError):
    """A table, row, method or setting that does not exist or does not fit."""


@dataclass(frozen=True)
class TrainSettings:
    """One training run. Zeros mean: not used, or all there are."""

    data: str
    network: str
    method: str
    epochs: int
    batch_size: int
    lr: float
    base: str = "SGD"
    momentum: float = 0.9  # of SGD
    weight_decay: float = 0.0
    warmup: float = 0.0  # share of all steps
    schedule: str = "step"  # what the cosine decays after: every "step" or every "epoch"
    drop_last: bool = False
    rho: float = 0.05
    sigma: float = 1.0
    lmbda: float = 0.9
    alpha: float = 0.2
    freq: int = 100
    count_in_epoch: bool = False  # freq counts from the start of each epoch, as Eigen-SAM's authors do
    full_gradient: str = "average"  # of the ablation: a moving average, or "exact"
    flip: bool = False
    crop: int = 0  # pixels of padding
    cutout: int = 0  # pixels of the square's side
    label_noise: float = 0.0
    mean: list = field(default_factory=list)  # of each channel in [0, 1]; none: the training set's own
    std: list = field(default_factory=list)
    image_size: int = 0  # images are scaled to it when they are read
    scale_to: int = 0  # and to this in the batch
    train_size: int = 0
    validation: int = 0  # test on so many images taken from the training set instead
    checkpoint: str = ""  # of a pre-trained network
    network_options: dict = field(default_factory=dict)
    measure_every: int = 0  # steps between two measurements of curvature
    measure_size: int = 256  # images of one


@dataclass(frozen=True)
class SdeSettings:
    """One path of a discrete method, or of the stochastic differential equation that stands for it."""

    data: str
    problem: str  # "network" or "quadratic"
    process: str
    steps: int
    lr: float
    rho: float
    batches: int  # the training set is cut into so many
    substeps: int = 1  # Euler-Maruyama steps for a time of lr
    hidden: int = 16
    train_size: int = 0
    measure_every: int = 50


KINDS = {"train": TrainSettings, "sde": SdeSettings}


@dataclass(frozen=True)
class Row:
    """A name, its settings, and what the paper or its authors' logs report for it."""

    name: str
    settings: TrainSettings | SdeSettings
    reported: dict[str, Any] | None = None


@dataclass(frozen=True)
class Table:
    name: str
    title: str
    source: str
    note: str
    kind: str
    seeds: int
    rows: list[Row]


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
    for given in raw:
        values = {**content.get("defaults", {}), **given}
        row_name = values.pop("name")
        _apply(content.get("override", []), values)
        report = reported.get(row_name)
        if data is not None and data != values.get("data"):
            row_name, report = row_name.replace(str(values["data"]), Path(data).name), None
            values["data"] = data
            values.update({key: [] for key in ("mean", "std") if key in values})  # the other data's
        if data == "digits":
            _apply(content.get("digits", []), values)
        settings = _settings(KINDS[kind], {**values, **(changes or {})}, f"{path.name}, row {row_name}")
        rows.setdefault(json.dumps(dataclasses.asdict(settings)), Row(row_name, settings, report))
    words = {key: content.get(key, "") for key in ("title", "source", "note")}
    if data is not None and any(data != row.get("data", content.get("defaults", {}).get("data")) for row in raw):
        words["note"] = f"Run on {data} instead of the papers' data. {words['note']}".strip()
    return Table(path.stem, kind=kind, seeds=content.get("seeds", 3), rows=list(rows.values()), **words)


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


def parse_change(text: str) -> tuple[str, Any]:
    """``"lr=0.1"`` as a name and a value of that setting's type."""
    name, equals, value = text.partition("=")
    if not equals:
        raise TableError(f"--set {text!r} must be NAME=VALUE")
    try:
        return name, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return name, value  # a string without quotes


def nearest(name: str, among) -> str:
    """``; did you mean ...?`` if something is near, and what there is."""
    among = list(among)
    near = difflib.get_close_matches(str(name), among, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return f"{hint} (there are: {', '.join(among)})" if len(among) <= 30 or not near else hint


def _grid(content: dict) -> list[dict]:
    axes = content.get("grid", {})
    rows = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())] if axes else []
    return [{"name": "/".join(_word(axis, row[axis]) for axis in axes), **row} for row in rows]


def _word(axis: str, value: Any) -> str:
    return f"{axis}={value}" if isinstance(value, (int, float)) else str(value)


def _apply(rules: list[dict], values: dict[str, Any]) -> None:
    for rule in rules:
        _known(rule, ("where", "set"), "a rule")
        if all(
            values.get(key) in (value if isinstance(value, list) else [value]) for key, value in rule["where"].items()
        ):
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
    from benchmarks.papers.runners import check  # which knows methods, networks and processes

    try:
        check(settings)
    except ValueError as error:
        raise TableError(f"{where}: {error}") from None
    return settings


def _required(f: dataclasses.Field) -> bool:
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING


def _known(given: dict, known, where: str) -> None:
    for key in given:
        if key not in known:
            raise TableError(f"{where}: unknown key {key!r}{nearest(key, known)}")
