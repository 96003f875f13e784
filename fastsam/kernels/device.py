"""What every backend that decides on the device needs of the host: tables in device memory, uploaded when they change.

A launch reads two tables. A *row* is a run of elements with one address each for weight and gradient: a
parameter, or adjacent parameters. A *chunk* is what one program of a launch works on: a stretch of one row.
Hyper-parameters are a third table, one line for each group. Nothing here waits for the device, and nothing is
allocated or uploaded once addresses and hyper-parameters have settled.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastsam.flat import FlatSpace
from fastsam.kernels import Ascent

#: How a kernel tells dtypes apart at run time.
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

#: The columns of a row, all int64: addresses, then what the kernels need to know of the elements.
ROW = ("weight", "gradient", "offset", "size", "group", "param", "climbed", "gradient_type")

#: The columns of a chunk, all int64: its row, its first element within the row, its number of elements.
CHUNK = ("row", "begin", "count")

#: Hyper-parameters by column, all float64. The first pass of a method whose coefficients are not of the closed
#: form has c_d and c_v in the place of rho and alpha.
ASCENT = ("rho", "alpha", "sigma", "lmbda", "adaptive")
SGD = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")
ADAM = ("lr", "beta1", "beta2", "log2_beta1", "log2_beta2", "eps", "weight_decay", "decoupled_weight_decay", "maximize")

#: What becomes of gradients as they are read: scaled, clipped to a global norm, limited in magnitude.
SCALING = ("grad_scale", "max_norm", "clip_value")

_SMALLEST_CHUNK = 8192  # elements
_MOST_CHUNKS = 16384  # of whole chunks: their partial sums are added by one program
_KEPT_LAYOUTS = 8  # two passes, merged or not, with gradients that return to a few addresses


@dataclass(frozen=True)
class Layout:
    """The tables of one launch: int64 tensors of shape [rows, 8] and [programs, 3]."""

    rows: Tensor
    chunks: Tensor

    @property
    def programs(self) -> int:
        return len(self.chunks)


class DeviceTable:
    """A space's tables, partial sums and results in device memory.

    ``chunk_size`` elements are what one program works on. It depends on the size of the space alone, so the
    order of summation does too.
    """

    def __init__(self, space: FlatSpace) -> None:
        self.device = space.device
        self.chunk_size = chunk_size(space.numel)
        self.counter = torch.zeros(1, dtype=torch.int32, device=self.device)
        self._sums = torch.zeros(2, 4, dtype=torch.float64, device=self.device)[:, :3].unbind()  # 16-byte aligned
        self._turn = 0
        self._partials = torch.empty(0, dtype=torch.float64, device=self.device)
        self._layouts: OrderedDict[tuple, Layout] = OrderedDict()
        self._chunks: dict[tuple, Tensor] = {}
        self._hyper: dict[str, tuple[list, Tensor]] = {}
        self._blank: dict[int, set[int]] = {}
        self._captured: list = []  # what a CUDA graph may read again at any replay

    def layout(self, space: FlatSpace, merged: bool = True, gradients: bool = True) -> Layout:
        """The tables for the addresses as they are now.

        ``merged`` makes one row of adjacent parameters; ``gradients=False`` leaves gradients out, so that only
        climbed parameters have rows.
        """
        addresses = space.gradient_addresses if gradients else [0] * len(space.params)
        key = (merged, *space.weights, *addresses, *space.gradient_dtypes, *space.climbed)
        found = self._layouts.get(key)
        if found is None:
            rows = build_rows(space, addresses, merged)
            table = torch.tensor(rows, dtype=torch.int64).view(-1, len(ROW))
            found = Layout(self._upload(table), self._chunks_of(rows))
            self._layouts[key] = found
            if len(self._layouts) > _KEPT_LAYOUTS:
                self._layouts.popitem(last=False)
            if _capturing(self.device):
                self._captured.append(found)
        self._layouts.move_to_end(key)
        return found

    def hyper(self, name: str, lines: Sequence[Sequence]) -> Tensor:
        """The table of hyper-parameters called ``name``: float64, one line for each group.

        Entries are numbers, or 0-dimensional tensors, which are copied on the device and never read by the host.
        """
        numbers = [[0.0 if _on_device(x) else float(x) for x in line] for line in lines]
        last, table = self._hyper.get(name, (None, None))
        if table is None or len(last) != len(numbers):
            last, table = None, torch.empty(len(lines), len(lines[0]), dtype=torch.float64, device=self.device)
        if numbers != last:
            self._upload(torch.tensor(numbers, dtype=torch.float64), table)
            self._hyper[name] = (numbers, table)
        for i, line in enumerate(lines):
            for j, x in enumerate(line):
                if _on_device(x):
                    table[i, j].copy_(x, non_blocking=True)
        return table

    def partials(self, programs: int) -> Tensor:
        """Room for three float64 sums of every program."""
        if len(self._partials) < 3 * programs:
            self._partials = torch.empty(3 * programs, dtype=torch.float64, device=self.device)
        return self._partials

    def next_sums(self) -> Tensor:
        """Room for the Gram sums, which stays untouched for one further call."""
        self._turn = 1 - self._turn
        return self._sums[self._turn]

    def blank(self, space: FlatSpace, flat: Tensor, started: Sequence[bool], value: float) -> None:
        """Fills the parts of ``flat`` that belong to parameters never started with ``value``, unless they hold it.

        NaN marks what a kernel has to take for a first meeting: the host cannot know whether the device skipped
        an earlier one.
        """
        if all(started):
            return
        blank = self._blank.setdefault(flat.data_ptr(), set())
        missing = [i for i, s in enumerate(started) if not s and i not in blank]
        if len(missing) == len(space.params):
            flat.fill_(value)
        else:
            for i in missing:
                flat[space.offsets[i] : space.offsets[i] + space.params[i].numel()].fill_(value)
        blank.update(missing)

    def written(self, flat: Tensor, which: Sequence[bool]) -> None:
        """Notes that a kernel may have written these parameters' parts of ``flat``."""
        blank = self._blank.get(flat.data_ptr())
        if blank:
            blank.difference_update([i for i, w in enumerate(which) if w])

    def _chunks_of(self, rows: list[tuple[int, ...]]) -> Tensor:
        sizes = tuple(row[ROW.index("size")] for row in rows)
        if sizes not in self._chunks:
            if len(self._chunks) >= _KEPT_LAYOUTS:
                self._chunks.clear()
            self._chunks[sizes] = self._upload(build_chunks(sizes, self.chunk_size))
        return self._chunks[sizes]

    def _upload(self, values: Tensor, out: Tensor | None = None) -> Tensor:
        """``values`` in device memory, through pinned memory, so that the host does not wait for the copy."""
        if self.device.type == "cpu":
            return values if out is None else out.copy_(values)
        pinned = values.pin_memory()
        out = torch.empty_like(values, device=self.device) if out is None else out
        if _capturing(self.device):
            self._captured.append(pinned)
        return out.copy_(pinned, non_blocking=True)


def table_of(space: FlatSpace) -> DeviceTable:
    """The space's table, made at its first use."""
    if space.table is None:
        space.table = DeviceTable(space)
    return space.table


def chunk_size(numel: int) -> int:
    """Elements of one chunk: a power of two, large enough that the partial sums stay few."""
    size = _SMALLEST_CHUNK
    while size * _MOST_CHUNKS < numel:
        size *= 2
    return size


def build_rows(space: FlatSpace, addresses: Sequence[int], merged: bool) -> list[tuple[int, ...]]:
    """The rows, as tuples of :data:`ROW`: parameters with a gradient or a backup, adjacent ones in one row."""
    rows: list[list[int]] = []
    previous = -2
    item = space.dtype.itemsize
    item_sizes = {code: dtype.itemsize for dtype, code in DTYPES.items()}
    for i, p in enumerate(space.params):
        size = p.numel()
        if not size or not (addresses[i] or space.climbed[i]):
            continue
        row = [
            space.weights[i], addresses[i], space.offsets[i], size,
            space.groups[i], i, int(space.climbed[i]), DTYPES[space.gradient_dtypes[i]],
        ]  # fmt: skip
        if merged and previous == i - 1 and space.joined[i] and _extends(rows[-1], row, item, item_sizes):
            rows[-1][3] += size
        else:
            rows.append(row)
        previous = i
    return [tuple(row) for row in rows]


def _extends(a: list[int], b: list[int], item: int, item_sizes: dict[int, int]) -> bool:
    weight, gradient, offset, size, group, _, climbed, kind = a
    adjoin = b[1] == gradient + size * item_sizes[kind] if gradient and b[1] else not gradient and not b[1]
    same = b[4] == group and b[6] == climbed and b[7] == kind
    return adjoin and same and b[0] == weight + size * item and b[2] == offset + size


def build_chunks(sizes: Sequence[int], chunk: int) -> Tensor:
    """The chunks of rows of these sizes, as lines of :data:`CHUNK`."""
    size = torch.tensor(sizes, dtype=torch.int64)
    each = (size + chunk - 1) // chunk
    row = torch.repeat_interleave(each)
    first = each.cumsum(0) - each
    begin = (torch.arange(len(row)) - first[row]) * chunk
    return torch.stack([row, begin, torch.clamp(size[row] - begin, max=chunk)], dim=1)


def closed_form(ascent: Ascent) -> bool:
    """Whether the kernels may compute the coefficients themselves, by the closed form of the family:

    c_d = rho (1/n - alpha s <d,v>/n^2) and c_v = rho alpha s, with n = sqrt(<d,d>) + 1e-12, s = sign <d,v>.
    A method says so by ``coefficients.closed_form = True``; what overrides it does not inherit that.
    """
    return getattr(ascent.coefficients, "closed_form", False)


def scaling_line(grad_scale, max_norm: float | None = None, clip_value: float | None = None) -> list[tuple]:
    return [(grad_scale, math.inf if max_norm is None else max_norm, math.inf if clip_value is None else clip_value)]


def ascent_lines(ascent: Ascent, sums: Tensor | None) -> list[tuple]:
    """The groups' lines for the first pass; with ``sums``, a method's own coefficients computed on the device."""
    lines = []
    for g in ascent.groups:
        pair = g.get("rho", 0.0), g.get("alpha", 0.0) if ascent.vector is not None else 0.0
        if sums is not None and not closed_form(ascent):
            pair = ascent.coefficients(*sums.unbind(), g)
        lines.append((*pair, g.get("sigma", 0.0), g.get("lmbda", 0.0), g.get("adaptive", False)))
    return lines


def sgd_lines(groups: Sequence[dict]) -> list[tuple]:
    return [tuple(g[name] for name in SGD) for g in groups]


def adam_lines(groups: Sequence[dict]) -> list[tuple]:
    return [
        (
            g["lr"],
            *g["betas"],
            *map(_log2, g["betas"]),
            g["eps"],
            g["weight_decay"],
            g["decoupled_weight_decay"],
            g["maximize"],
        )
        for g in groups
    ]


def _log2(beta) -> float | Tensor:
    """For beta^t as 2^(t log2 beta), which devices compute without a power function."""
    if _on_device(beta):
        return beta.double().log2()
    return math.log2(beta) if beta > 0 else -math.inf


def _on_device(x) -> bool:
    return isinstance(x, Tensor) and x.device.type != "cpu"


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
