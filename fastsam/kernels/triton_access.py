"""How the Triton kernels find a chunk and read and write its elements, in accesses of 16 bytes wherever they can."""

from __future__ import annotations

import triton
import triton.language as tl

from fastsam.kernels import device

TAIL = tl.constexpr(512)  # elements of a block under a mask
_VECTOR = tl.constexpr(16)  # bytes: the widest access


def columns(table):
    """The place of each column, and at the end the length of a line."""
    return [tl.constexpr(i) for i in range(len(table) + 1)]


_WEIGHT, _GRADIENT, _OFFSET, _, _GROUP, _PARAM, _CLIMBED, _KIND, _FIRST, _ROW = columns(device.ROW)
_, _BEGIN, _COUNT, _CHUNK = columns(device.CHUNK)

_INF = tl.constexpr(float("inf"))


@triton.jit
def find_chunk(rows, chunks, i, W: tl.constexpr):
    """Addresses of the chunk's weights and gradients (0: none), and what its row says of it."""
    entry = chunks + _CHUNK * i.to(tl.int64)
    row = rows + _ROW * tl.load(entry)
    begin = tl.load(entry + _BEGIN)
    count = tl.load(entry + _COUNT).to(tl.int32)
    group, param, climbed = tl.load(row + _GROUP), tl.load(row + _PARAM), tl.load(row + _CLIMBED) != 0
    kind = tl.load(row + _KIND)
    g = tl.load(row + _GRADIENT)
    # bytes of a gradient: 4, 8, 2, 2 for the kinds 0 to 3
    g = tl.where(g != 0, g + begin * tl.where(kind == 0, 4, tl.where(kind == 1, 8, 2)), 0)
    w = (tl.load(row + _WEIGHT).to(tl.pointer_type(W)) + begin).to(tl.int64)
    return w, g, tl.load(row + _OFFSET) + begin, group, param, climbed, kind, count


@triton.jit
def first_number(rows, chunks, i):
    """The number of the chunk's first element, by which stochastic rounding draws."""
    entry = chunks + _CHUNK * i.to(tl.int64)
    return tl.load(rows + _ROW * tl.load(entry) + _FIRST) + tl.load(entry + _BEGIN)


@triton.jit
def part(flat, offset):
    """The address of an element of a flat buffer; 0 where there is no buffer."""
    if flat is None:
        return tl.zeros((), tl.int64)
    else:
        return (flat + offset).to(tl.int64)


@triton.jit
def full_blocks(count, addresses, BLOCK: tl.constexpr):
    """How many elements lie in whole blocks; none of them if an address is no multiple of 16 bytes."""
    return tl.where(addresses % _VECTOR == 0, count // BLOCK * BLOCK, 0)


@triton.jit
def _pointers(address, at, T: tl.constexpr, FULL: tl.constexpr):
    """Where the elements at ``at`` lie. In a full block the first of them is at a multiple of 16 bytes."""
    pointers = address.to(tl.pointer_type(T)) + at
    return tl.multiple_of(pointers, _VECTOR) if FULL else pointers


@triton.jit
def load(address, at, end, T: tl.constexpr, FULL: tl.constexpr):
    if FULL:
        return tl.load(_pointers(address, at, T, True))
    else:
        return tl.load(_pointers(address, at, T, False), mask=at < end, other=0.0)


@triton.jit
def load_gradient(address, at, end, kind, G: tl.constexpr, FULL: tl.constexpr):
    """As load; where several dtypes meet in a launch (G is None), that of the row, which ``kind`` says."""
    if G is not None:
        return load(address, at, end, G, FULL)
    else:
        g = _load_if(kind == 0, address, at, end, tl.float32, FULL)
        g += _load_if(kind == 2, address, at, end, tl.bfloat16, FULL).to(tl.float32)
        return g + _load_if(kind == 3, address, at, end, tl.float16, FULL).to(tl.float32)


@triton.jit
def _load_if(wanted, address, at, end, T: tl.constexpr, FULL: tl.constexpr):
    """As load where ``wanted``, one condition for the whole chunk; else zeros, and memory is left alone."""
    if FULL:
        everywhere = tl.zeros_like(at) + tl.where(wanted, 1, 0) != 0
        return tl.load(_pointers(address, at, T, True), mask=everywhere, other=0.0)
    else:
        return load(address, at, tl.where(wanted, end, 0), T, False)


@triton.jit
def store(address, at, end, value, T: tl.constexpr, FULL: tl.constexpr, CACHE: tl.constexpr):
    """``CACHE``: ".cs" for what is not read again soon, else "". (As a default, Triton before 3.9 does not take it.)"""
    if FULL:
        tl.store(_pointers(address, at, T, True), value.to(T), cache_modifier=CACHE)
    else:
        tl.store(_pointers(address, at, T, False), value.to(T), mask=at < end, cache_modifier=CACHE)


@triton.jit
def copy(target, source, begin, end, T: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr):
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        store(target, at, end, load(source, at, end, T, FULL), T, FULL, "")


# ---- decisions on the device --------------------------------------------------------------------------------


@triton.jit
def in_reverse():
    """The last chunk first: what the pass before read last is still in the cache."""
    return tl.num_programs(0) - 1 - tl.program_id(0)


@triton.jit
def all_finite(sums):
    return (tl.abs(tl.load(sums)) < _INF) & (tl.abs(tl.load(sums + 1)) < _INF) & (tl.abs(tl.load(sums + 2)) < _INF)


@triton.jit
def is_last(counter, n):
    """Whether every other program of the launch has been here; what they wrote before can then be read."""
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel") == n - 1
    if last:
        tl.store(counter, 0)
    return last
