"""The memory of a launch that tests/kernels/ptx.py runs: what may be accessed, and which accesses race."""

import ctypes

import numpy as np

UNSIGNED = {size: np.dtype(f"u{size}") for size in (1, 2, 4, 8)}


class Fault(Exception):
    """What makes a program wrong on a GPU, whether or not a result shows it."""


def of_lanes(values, lanes):
    return values if lanes is None or values.ndim == 0 else values[lanes]


class Order:
    """What happened before what: barriers divide the time of a block, atomic operations between fences join blocks.

    ``seen[a, b]`` is how many of block b's times are over for all of block a; block b is in its time ``seen[b, b]``.
    """

    def __init__(self, blocks, threads):
        self.threads = threads
        self.seen = np.zeros((blocks, blocks), np.int32)
        self._acquired, self._pending, self._fenced = (np.zeros((blocks * threads, blocks), np.int32) for _ in range(3))
        self._released = {}  # by address: what those who add there had seen

    def known(self, lanes, blocks):
        """How many times of these blocks are over for these threads."""
        return np.maximum(self.seen[lanes // self.threads, blocks], self._acquired[lanes, blocks])

    def fence(self, lanes):
        self._acquired[lanes] = np.maximum(self._acquired[lanes], self._pending[lanes])
        self._fenced[lanes] = np.maximum(self._acquired[lanes], self.seen[lanes // self.threads])

    def meet(self, lane, address):
        there = self._released.get(address, 0)
        self._pending[lane] = np.maximum(self._pending[lane], there)
        self._released[address] = np.maximum(self._fenced[lane], there)

    def barrier(self, block):
        of_block = self._acquired[block * self.threads : (block + 1) * self.threads]
        self.seen[block] = np.maximum(self.seen[block], of_block.max(0))
        self.seen[block, block] += 1


class Memory:
    """Global memory: what a launch may access, and which threads have.

    Of every unit of memory: the last thread that wrote it and in which of its block's times, and the same of every
    block's last reader, where SEVERAL read it at one time.
    """

    NOBODY, SEVERAL = -1, -2

    def __init__(self, launch, regions, unit):
        joined = []
        for start, size, writable in sorted(r for r in regions if r[1]):
            if joined and start <= joined[-1][1] and writable == joined[-1][2]:
                joined[-1][1] = max(joined[-1][1], start + size)
            else:
                joined.append([start, start + size, writable])
        starts, ends, self._writable = np.array(joined).T
        self._base = starts[0] // 16 * 16
        span = -(-(ends[-1] - self._base) // 16) * 16
        self._setup(launch, starts, ends, unit, _memory_at(int(self._base), int(span)), launch.blocks)

    def _setup(self, launch, starts, ends, unit, memory, readers):
        self._starts, self._ends, self._launch, self._unit, self._bytes = starts, ends, launch, unit, memory
        count = -(-(self._ends - self._starts) // unit) + 1
        self._first = np.cumsum(count) - count  # unit of each region
        self._writer, self._written = np.full(count.sum(), self.NOBODY, np.int32), np.zeros(count.sum(), np.int32)
        self._reader = np.full((readers, count.sum()), self.NOBODY, np.int32)
        self._read = np.zeros_like(self._reader)

    def find(self, addresses, dtype, count, writes=True):
        """Memory as elements, and where in it these addresses are. Raises unless all of it may be accessed."""
        size = dtype.itemsize * count
        region = np.searchsorted(self._starts, addresses, "right") - 1
        outside = (addresses < self._starts[region]) | (addresses + size > self._ends[region])
        sealed = writes & (self._writable[region] == 0)
        for wrong, why in ((outside, "not given"), (addresses % size != 0, "no multiple"), (sealed, "read-only")):
            if wrong.any():
                raise Fault(f"an access of {size} bytes at {addresses[wrong][0]:#x}, {why}")
        return self._bytes.view(dtype), (addresses - self._base) // dtype.itemsize, region

    def load(self, addresses, lanes, dtype, count):
        memory, at, region = self.find(addresses, dtype, count, writes=False)
        if self._writable[region].any():
            self._note_read(*self._units(addresses, region, lanes, dtype.itemsize * count))
        return [memory[at + k] for k in range(count)]

    def store(self, addresses, lanes, dtype, values):
        memory, at, region = self.find(addresses, dtype, len(values))
        self._note_written(*self._units(addresses, region, lanes, dtype.itemsize * len(values)))
        bits = UNSIGNED[dtype.itemsize]
        for k, value in enumerate(values):
            memory[at + k] = value
            if (memory[at + k].view(bits) != value.view(bits)).any():
                raise Fault("threads write different values to one place")

    def _units(self, addresses, region, lanes, size):
        """The threads that access memory and the units of memory that they access: a line for each thread."""
        first = self._first[region] + (addresses - self._starts[region] // self._unit * self._unit) // self._unit
        units = first[:, None] + np.arange(-(-size // self._unit))
        return np.broadcast_to(of_lanes(self._launch.lane, lanes)[:, None], units.shape), units

    def _check_writers(self, lanes, units):
        writer, order = self._writer[units], self._launch.order
        other = (writer >= 0) & (writer != lanes)
        if other.any() and (self._written[units] >= order.known(lanes, writer // order.threads))[other].any():
            raise Fault("a race with a thread that writes there")

    def _note_read(self, lanes, units):
        self._check_writers(lanes, units)
        block = lanes // self._launch.threads
        slot, time = block if len(self._reader) > 1 else 0, self._launch.order.seen[block, block]
        before = self._reader[slot, units]
        several = (before != self.NOBODY) & (before != lanes) & (self._read[slot, units] == time)
        self._reader[slot, units], self._read[slot, units] = lanes, time
        several |= self._reader[slot, units] != lanes
        self._reader[slot, units] = np.where(several, self.SEVERAL, lanes)

    def _note_written(self, lanes, units):
        self._check_writers(lanes, units)
        order = self._launch.order
        block = lanes // self._launch.threads
        for slot, (readers, times) in enumerate(zip(self._reader, self._read, strict=True)):
            reader = readers[units]
            other = (reader != self.NOBODY) & (reader != lanes)
            if other.any():
                of = block if len(self._reader) == 1 else slot
                if (times[units] >= order.known(lanes, of))[other].any():
                    raise Fault("a race with a thread that reads there")
        self._writer[units], self._written[units] = lanes, order.seen[block, block]


class SharedMemory(Memory):
    """A block's own memory, for each block of those that run at a time."""

    def __init__(self, launch, blocks, size):
        apart = size // 16 * 16 + 32
        starts = apart * np.arange(blocks)
        self._base, self._shift = 0, np.repeat(starts, launch.threads)
        self._writable = np.ones(blocks, int)
        self._setup(launch, starts, starts + size, 1, np.zeros(apart * blocks, np.uint8), 1)

    def load(self, addresses, lanes, dtype, count):
        return super().load(addresses + of_lanes(self._shift, lanes), lanes, dtype, count)

    def store(self, addresses, lanes, dtype, values):
        super().store(addresses + of_lanes(self._shift, lanes), lanes, dtype, values)

    def _note_read(self, lanes, units):
        if (self._writer[units] == self.NOBODY).any():
            raise Fault("shared memory read before it was written")
        super()._note_read(lanes, units)


def _memory_at(address, size):
    """This process's memory as an array of bytes."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
