"""What every backend that decides on the device needs of the host: tables in device memory, uploaded when they change.

A launch reads two tables. A *row* is a run of elements with one address each for weight and gradient: a
parameter, or adjacent parameters. A *chunk* is what one program of a launch works on: a stretch of one row.
Hyper-parameters are a third table, one line for each group. Nothing here waits for the device, and nothing is
allocated or uploaded once addresses and hyper-parameters have settled.
"""

from __future__ import annotations

import contextlib
import functools
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastsam.flat.space import FlatSpace, packed
from fastsam.kernels import Mixture

#: How a kernel tells dtypes apart at run time.
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

#: The columns of a row, all int64: addresses, then what the kernels need to know of the elements.
ROW = ("weight", "gradient", "offset", "size", "group", "param", "climbed", "gradient_type", "first")

#: The columns of a chunk, all int64: its row, its first element within the row, its number of elements.
CHUNK = ("row", "begin", "count")

#: Hyper-parameters by column, all float64. The first pass of a method whose coefficients are not of the closed
#: form has c_d and c_v in the place of rho and alpha.
ASCENT = ("rho", "alpha", "sigma", "lmbda", "adaptive")
SGD = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")
ADAM = ("lr", "beta1", "beta2", "log2_beta1", "log2_beta2", "eps", "weight_decay", "decoupled_weight_decay", "maximize")

#: What the second side makes of gradient and stored vector, a line for each group.
MIXTURE = Mixture._fields

#: What becomes of gradients as they are read: scaled, clipped to a global norm, limited in magnitude.
SCALING = ("grad_scale", "max_norm", "clip_value")

#: What stochastic rounding draws by, besides the number of an element: whole numbers below 2^32.
ROUNDING = ("first_key", "second_key")

_SMALLEST_CHUNK = 8192  # elements
_MOST_CHUNKS = 16384  # of whole chunks: their partial sums are added by one program
_KEPT_LAYOUTS = 8  # two passes, merged or not, with gradients that return to a few addresses


@dataclass(frozen=True)
class Layout:
    """The tables of one launch: int64 tensors of shape [rows, 9] and [programs, 3]."""

    rows: Tensor
    chunks: Tensor

    @functools.cached_property
    def programs(self) -> int:
        return len(self.chunks)

    @functools.cached_property
    def tables(self) -> tuple[int, int, int, int]:
        """Addresses and lengths of both."""
        return self.rows.data_ptr(), self.chunks.data_ptr(), len(self.rows), self.programs


class DeviceTable:
    """A space's tables, partial sums and results in device memory.

    ``chunk_size`` elements are what one program works on. It depends on the size of the space alone, so the
    order of summation does too.
    """

    def __init__(self, space: FlatSpace) -> None:
        self.device = space.device
        self.chunk_size = chunk_size(space.numel)
        self.counter = torch.zeros(1, dtype=torch.int32, device=self.device)
        #: Room for three float64 sums of every program. Rows that are merged have no more chunks than single ones.
        self.most_programs = sum(-(-size // self.chunk_size) for size in space.sizes)
        self.partials = torch.empty(3 * self.most_programs, dtype=torch.float64, device=self.device)
        #: While a CUDA graph is captured: where new tables go. See :class:`Recording`.
        self.recording: Recording | None = None
        #: Room for the Gram sums of a first pass, and for those of a second: the decision on a step stays where it is
        #: whatever is measured before the next. Both begin at multiples of 16 bytes.
        self.sums = torch.zeros(2, 4, dtype=torch.float64, device=self.device)[:, :3].unbind()
        self._layouts: OrderedDict[tuple, Layout] = OrderedDict()
        self._chunks: dict[tuple, Tensor] = {}
        self._hyper: dict[tuple[str, int], tuple[Sequence[Sequence], Tensor]] = {}
        self._captured: dict[tuple[str, int], Sequence[Sequence]] = {}  # the numbers beside what a CUDA graph computes
        self._blank: dict[int, set[int]] = {}

    def layout(self, space: FlatSpace, merged: bool = True, gradients: bool = True) -> Layout:
        """The tables for the addresses as they are now.

        ``merged`` makes one row of adjacent parameters; ``gradients=False`` leaves gradients out, so that only
        climbed parameters have rows. Raises ``RuntimeError`` in a CUDA graph that ``fastsam.graphs`` does not capture.
        """
        if self.recording is None and capturing(self.device):
            raise RuntimeError(
                "the passes cannot be captured into a CUDA graph from outside, where their tables and hyper-parameters "
                "would stay what they are now: use fastsam.graphs.capture(optimizer, closure, *batch)"
            )
        addresses = space.gradient_addresses if gradients else bytes(len(space.weights))
        if gradients and not merged and space.some_empty:  # these have no address, but their steps are counted
            addresses = packed(
                a or int(g is not None) for a, g in zip(array("q", addresses), space.gradients, strict=True)
            )
        dtypes = space.gradient_dtypes if space.mixed else None
        key = (merged, space.weights, addresses, bytes(space.climbed), dtypes)
        found = self._layouts.get(key)
        if found is None:
            rows = build_rows(space, addresses, merged)
            found = Layout(self._table(rows), self._chunks_of(rows))
            self._layouts[key] = found
            if len(self._layouts) > _KEPT_LAYOUTS:
                self._layouts.popitem(last=False)
        self._layouts.move_to_end(key)
        if self.recording is not None:
            self.recording.kept.append(found)
        return found

    def hyper(self, name: str, lines: Sequence[Sequence], repeated: bool = False, of_step: bool = False) -> Tensor:
        """The table of hyper-parameters called ``name``: float64, one line for each group.

        Entries are numbers, or 0-dimensional tensors, which are copied on the device and never read by the host. In a
        CUDA graph nothing is written but what is ``repeated`` with it: the rest is brought up to date before a replay.
        What differs ``of_step`` to step may do so in a capture, too.
        """
        numbers: Sequence[Sequence] = lines
        copied: dict[tuple[int, int], Tensor] = {}
        if any(isinstance(x, Tensor) for line in lines for x in line):
            copied = {
                (i, j): x
                for i, line in enumerate(lines)
                for j, x in enumerate(line)
                if on_device(x) or (repeated and isinstance(x, Tensor))
            }
            numbers = [
                tuple(None if (i, j) in copied else float(x) for j, x in enumerate(line))
                for i, line in enumerate(lines)
            ]
        key = (name, len(lines))
        if of_step and self.recording is not None:
            numbers = self._hyper[key][0]
        table = self._numbers(key, numbers)
        if self.recording is not None:
            self.recording.kept.append(table)
            if repeated:
                self._captured[key] = numbers
        if self.recording is None or repeated:
            for (i, j), x in copied.items():
                table[i, j].copy_(x, non_blocking=True)
        return table

    def numbers_as_captured(self) -> None:
        """Before a replay: a step since the capture may have put other numbers beside what the graph computes."""
        for key, numbers in self._captured.items():
            self._numbers(key, numbers)

    def _numbers(self, key: tuple[str, int], numbers: Sequence[Sequence]) -> Tensor:
        """The table of that name and length, uploaded if its numbers differ; those that are copied later are None."""
        last, table = self._hyper.get(key, (None, None))
        if table is None:
            table = torch.empty(len(numbers), len(numbers[0]), dtype=torch.float64, device=self.device)
        if numbers != last:
            if self.recording is not None:
                raise RuntimeError("a hyper-parameter changed within the captured step: change it between steps")
            values = [[0.0 if x is None else x for x in line] for line in numbers]
            self.upload(torch.tensor(values, dtype=torch.float64, device="cpu"), table)
            self._hyper[key] = (numbers, table)
        return table

    def blank(self, space: FlatSpace, flat: Tensor, started: Sequence[bool], value: float) -> None:
        """Fills the parts of ``flat`` that belong to parameters never started with ``value``, unless they hold it.

        NaN marks what a kernel has to take for a first meeting: the host cannot know whether the device skipped
        an earlier one.
        """
        if all(started):
            return
        blank = self._blank.setdefault(flat.data_ptr(), set())
        missing = [i for i, s in enumerate(started) if not s and i not in blank]
        if missing and self.recording is not None:
            raise RuntimeError("a parameter met its first gradient within the captured step: capture again")
        if len(missing) == len(space.params):
            flat.fill_(value)
        else:
            for i in missing:
                flat[space.offsets[i] : space.offsets[i] + space.sizes[i]].fill_(value)
        blank.update(missing)

    def written(self, flat: Tensor, which: Sequence[bool]) -> None:
        """Notes that a kernel may have written these parameters' parts of ``flat``."""
        blank = self._blank.get(flat.data_ptr())
        if blank:
            blank.difference_update([i for i, w in enumerate(which) if w])

    def upload(self, values: Tensor, out: Tensor | None = None) -> Tensor:
        """``values`` in device memory, through pinned memory, so that the host does not wait for the copy.

        The copy waits its turn on the current stream: a launch or a replay that is under way there reads what was
        there before. torch keeps the pinned memory until the copy is done.
        """
        if self.device.type == "cpu":
            return values if out is None else out.copy_(values)
        out = torch.empty_like(values, device=self.device) if out is None else out
        return out.copy_(values.pin_memory(), non_blocking=True)

    def forget_layouts(self) -> None:
        """Lets go of every table of addresses: those of a capture that failed were never filled."""
        self._layouts.clear()
        self._chunks.clear()

    def _chunks_of(self, rows: Tensor) -> Tensor:
        sizes = tuple(rows[:, ROW.index("size")].tolist())
        if sizes not in self._chunks:
            if len(self._chunks) >= _KEPT_LAYOUTS:
                self._chunks.clear()
            self._chunks[sizes] = self._table(build_chunks(sizes, self.chunk_size))
        return self._chunks[sizes]

    def _table(self, values: Tensor) -> Tensor:
        return self.upload(values) if self.recording is None else self.recording.reserve(values)


class Recording:
    """The tables of launches that a CUDA graph will repeat: made before the capture, filled after it.

    What a capture allocates belongs to the graph, whose own kernels write over it in every replay; what it copies
    is copied again in every replay. So the room is there before, and :meth:`fill` copies when the capture is over. The
    graph has to hold on to this object: ``kept`` are the tensors that its launches read.
    """

    _LAYOUTS = 4  # of one step: gram and climb, gram and descend, rows of single parameters for Adam, restore
    _UNIT = 32  # entries: tables begin at multiples of 256 bytes

    def __init__(self, table: DeviceTable, space: FlatSpace) -> None:
        most = len(space.params) * len(ROW) + table.most_programs * len(CHUNK) + 2 * self._UNIT
        self.kept: list = [table.counter, table.partials]
        self._table = table
        self._room = torch.zeros(self._LAYOUTS * most, dtype=torch.int64, device=table.device)
        self._used = 0
        self._unfilled: list[tuple[Tensor, Tensor]] = []
        table.recording = self

    def reserve(self, values: Tensor) -> Tensor:
        """Where ``values`` will be."""
        place = self._room[self._used : self._used + values.numel()].view(values.shape)
        self._used += -(-values.numel() // self._UNIT) * self._UNIT
        self._unfilled.append((place, values))
        return place

    def fill(self) -> None:
        """Ends the recording."""
        self._table.recording = None
        for place, values in self._unfilled:
            self._table.upload(values, place)
        self._unfilled.clear()

    def abandon(self) -> None:
        """Ends the recording of a capture that failed."""
        self._table.recording = None
        self._table.forget_layouts()


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


def build_rows(space: FlatSpace, addresses: bytes, merged: bool) -> Tensor:
    """The rows, int64 [rows, 9] with the columns of :data:`ROW`: parameters with a gradient or a backup.

    ``merged`` makes one row of adjacent ones and leaves out those without elements.
    """
    n = len(space.params)
    kinds = [DTYPES[t] for t in space.gradient_dtypes]
    places = (space.weights, addresses, space.offsets, space.sizes)
    columns = (*places, space.groups, range(n), space.climbed, kinds, space.first)
    entries = array("q", bytes(8 * len(ROW) * n))  # to torch.tensor, numbers come one by one, at four times the price
    for i, column in enumerate(columns):
        entries[i :: len(ROW)] = array("q", column)
    rows = torch.frombuffer(entries, dtype=torch.int64).view(n, len(ROW))
    if space.some_empty or not all(array("q", addresses)):
        _, gradient, _, size, _, _, climbed, _, _ = rows.unbind(1)
        rows = rows[(size > 0) & (gradient + climbed > 0) if merged else (gradient > 0) | (size * climbed > 0)]
    return _merged(rows, space) if merged and any(space.joined) and len(rows) else rows


def _merged(rows: Tensor, space: FlatSpace) -> Tensor:
    """Rows that continue the one before them, in memory and in all else, become part of it."""
    weight, gradient, offset, size, group, param, climbed, kind, first_number = rows.unbind(1)
    gradient_bytes = size * torch.tensor([t.itemsize for t in DTYPES], device="cpu")[kind]

    def grows(column: Tensor, by) -> Tensor:
        return column[1:] == (column + by)[:-1]

    continues = grows(param, 1) & torch.tensor(space.joined, device="cpu")[param[1:]]
    continues &= grows(weight, size * space.dtype.itemsize) & grows(offset, size) & grows(first_number, size)
    continues &= grows(gradient, gradient_bytes * (gradient > 0))
    continues &= grows(group, 0) & grows(climbed, 0) & grows(kind, 0)
    first = torch.cat([torch.tensor([True], device="cpu"), ~continues])
    result = rows[first]
    result[:, ROW.index("size")] = torch.zeros_like(size[first]).index_add_(0, first.cumsum(0) - 1, size)
    return result


def build_chunks(sizes: Sequence[int], chunk: int) -> Tensor:
    """The chunks of rows of these sizes, as lines of :data:`CHUNK`."""
    size = torch.tensor(sizes, dtype=torch.int64, device="cpu")
    each = (size + chunk - 1) // chunk
    row = torch.repeat_interleave(each)
    first = each.cumsum(0) - each
    begin = (torch.arange(len(row), device="cpu") - first[row]) * chunk
    return torch.stack([row, begin, torch.clamp(size[row] - begin, max=chunk)], dim=1)


def current(where: torch.device) -> contextlib.AbstractContextManager:
    """Makes ``where`` torch's current device, at no cost where it is that already, or is no GPU."""
    if where.type == "cpu" or where.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(where)


def on_device(x) -> bool:
    return isinstance(x, Tensor) and x.device.type != "cpu"


def capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
