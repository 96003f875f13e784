"""Runs PTX, the code that nvcc and Triton emit for a GPU, on this processor: launch by launch, on real memory.

    kernel = Kernel(text, "name of the entry")
    run(kernel, arguments, blocks=7, threads=256, regions=[(address, bytes, writable), ...])

The threads of a launch are the elements of numpy arrays, each with its own place in the program. What runs next is the
instruction nearest to the program's beginning, for all threads that are there. Results are rounded as IEEE 754 has it,
which ``.rn`` demands; an instruction that is approximate on a GPU is as far off here as its description allows.

What a GPU need not notice raises :class:`Fault`: an instruction that is not known here, an access that ``regions`` do
not allow or that is at no multiple of its size, shared memory read before it was written, a barrier or a shuffle that
not every thread comes to, and a race: two threads' accesses to one place, one of them to write, that neither a barrier
nor fences around an atomic operation put in order.
"""

import functools
import re
from fractions import Fraction
from itertools import pairwise

import numpy as np
from ptx_memory import UNSIGNED, Fault, Memory, Order, SharedMemory, of_lanes

TYPES = {f"{letter}{8 * size}": dtype for size, dtype in UNSIGNED.items() for letter in "bu"}
TYPES |= {f"s{8 * size}": np.dtype(f"i{size}") for size in UNSIGNED}
TYPES |= {f"f{8 * size}": np.dtype(f"f{size}") for size in (2, 4, 8)} | {"pred": np.dtype(bool)}
TYPES |= {"bf16": UNSIGNED[2], "bf16x2": UNSIGNED[4], "f16x2": UNSIGNED[4], "f32x2": UNSIGNED[8]}  # in registers

PARKED, ENDED = 1 << 29, 1 << 30  # places of threads at a barrier, and of those that are through


def run(kernel, arguments, blocks, threads, regions, shared=0, order=None, resident=None):
    """Launches a kernel. ``arguments`` are bytes or integers; ``shared`` is the size of dynamic shared memory.

    ``order`` lists the blocks as they begin, ``resident`` is how many run at a time: all of them, if it is None.
    """
    launch = Launch(kernel, arguments, blocks, threads, regions, shared)
    order, resident = np.arange(blocks) if order is None else np.array(order), resident or blocks
    with np.errstate(all="ignore"):
        for first in range(0, blocks, resident):
            launch.run(order[first : first + resident])


# ---- the program ------------------------------------------------------------------------------------------------


class Kernel:
    """One entry of a PTX text, ready to run: its parameters, shared memory, and instructions by basic block."""

    def __init__(self, text, entry):
        text = re.sub(r"//.*|^\s*\.(loc|file)\b.*$|\.pragma[^;]*;", "", text, flags=re.M)
        module = next((m for m in text.split(".version ") if re.search(rf"\.entry\s+{entry}\(", m)), "")
        found = re.search(rf"\.entry\s+{entry}\(([^)]*)\)[^{{]*", module)
        if found is None:
            raise Fault(f"there is no entry {entry}")
        self.symbols, self.parameters, self.shared, self.registers = {}, [], 0, {}
        self._labels, self._program, end = {}, [], 0
        self.threads = [int(n) for n in re.findall(r"\.(?:req|max)ntid (\d+)", found[0])]
        for line in found[1].split(","):
            align, kind, name, count = re.search(
                r"\.param(?: \.align (\d+))? \.(\w+).*?(\w+)(?:\[(\d+)\])?$", " ".join(line.split())
            ).groups()
            size = TYPES[kind].itemsize
            end = -(-end // int(align or size)) * int(align or size)
            self.symbols[name] = end
            self.parameters.append((end, size * int(count or 1)))
            end += size * int(count or 1)
        for line in re.findall(r"(?:^|\s)(\.shared[^;]*);", module[: module.index(".entry")]):
            self._declare(line)
        for statement in _body(module[found.end() :]).split(";"):
            self._statement(" ".join(statement.split()))
        self._find_blocks()

    def _statement(self, text):
        while found := re.match(r"(?:([$\w]+):|[{}])\s*", text):
            if found[1]:
                self._labels[found[1]] = len(self._program)
            text = text[found.end() :]
        if text.startswith("."):
            self._declare(text)
        elif text:
            self._program.append(Instruction(text, self))

    def _declare(self, text):
        if found := re.fullmatch(r"\.reg \.(\w+) (.*)", text):
            for name in found[2].split(","):
                self.registers[name.split("<")[0].strip()] = TYPES[found[1]]
        elif found := re.fullmatch(r"\.shared \.align (\d+) \.(\w+) ([\w$]+)(\[(\d*)\])?", text):
            self.shared = -(-self.shared // int(found[1])) * int(found[1])
            self.symbols[found[3]] = self.shared
            self.shared += TYPES[found[2]].itemsize * (int(found[5] or 0) if found[4] else 1)
        else:
            raise Fault(f"unknown declaration: {text}")

    def _find_blocks(self):
        """Which instructions follow each other without a jump into or out of them."""
        program = self._program
        leaders = {0, len(program)}
        for at, instruction in enumerate(program):
            if instruction.ends_block:
                leaders.add(at + 1)
            if instruction.target is not None:
                instruction.target = self._labels[instruction.target]
                leaders.add(instruction.target)
        leaders = sorted(leaders)
        self.blocks = {at: (program[at:stop], stop) for at, stop in pairwise(leaders)}
        self.unit = min((i.bytes for i in program if i.opcode.startswith(("ld.global", "st.global"))), default=4)

    def register(self, name):
        """The type of a register's bits; None if the name is none."""
        return self.registers.get(name, self.registers.get(name.rstrip("0123456789")))


def _body(text):
    """What stands between a brace and the one that closes it."""
    depth = 0
    for at in re.finditer(r"[{}]", text):
        depth += 1 if at[0] == "{" else -1
        if depth == 0:
            return text[text.index("{") + 1 : at.start()]
    raise Fault("an entry without an end")


class Instruction:
    """One instruction: ``carry_out(launch, lanes)``, where lanes are the numbers of threads, or None for all."""

    def __init__(self, text, kernel):
        self.text, self.kernel = text, kernel
        guard, self.opcode, operands = re.fullmatch(r"(?:@(!?\S+) )?([\w.:]+) ?(.*)", text).groups()
        self.operands = re.findall(r"\[[^]]*\]|\{[^}]*\}|[^\s,]+", operands)
        self.name, *self.modifiers = self.opcode.replace("::cta", "").split(".")
        self.kinds = [m for m in self.modifiers if m in TYPES]
        self.bytes = TYPES[self.kinds[0]].itemsize if self.kinds else 0
        self._guard, self._negated = None, (guard or "").startswith("!")
        if guard:
            self._guard = self.source(guard.lstrip("!"), "pred")
        self.ends_block = (self.opcode, *self.operands) == ("bar.sync", "0") or self.opcode in ("bra", "bra.uni", "ret")
        self.target = self.operands[0] if self.name == "bra" else None
        self.carry_out = None if self.ends_block else _meaning(self)

    def through(self, launch, lanes):
        """The threads that the guard lets through."""
        if self._guard is None:
            return lanes
        chosen = np.broadcast_to(self._guard(launch, lanes) != self._negated, _count(launch, lanes))
        return np.flatnonzero(chosen) if lanes is None else lanes[chosen]

    def unknown(self):
        return Fault(f"unknown instruction: {self.text}")

    def source(self, token, kind=None):
        """A function of launch and threads that gives an operand's values; without a type, a register's bits."""
        if token.startswith("%") and "." in token:
            return lambda launch, lanes: of_lanes(launch.special[token], lanes)
        if (bits := self.kernel.register(token)) is not None:
            dtype, unset = TYPES.get(kind, bits), _unset(bits)

            def read(launch, lanes):
                values = of_lanes(launch.registers.get(token, unset), lanes)
                return (values if bits.itemsize == dtype.itemsize else values.astype(f"u{dtype.itemsize}")).view(dtype)

            return read
        if token in self.kernel.symbols:
            number = self.kernel.symbols[token]
        else:
            number = int(re.sub("^0[fFdD]", "0x", token).rstrip("U"), 0)
        dtype = TYPES[kind or "u64"]
        value = dtype.type(number) if kind == "pred" else UNSIGNED[dtype.itemsize].type(number % 256**dtype.itemsize)
        return lambda launch, lanes: value.view(dtype)

    def sink(self, token):
        """A function of launch, values and threads that writes a register; _ takes what nobody wants."""
        bits = self.kernel.register(token)
        unset = None if bits is None else _unset(bits)

        def write(launch, values, lanes):
            if values.itemsize < bits.itemsize:
                values = values.astype(f"{values.dtype.kind}{bits.itemsize}")
            values = values.view(bits)
            if lanes is not None:
                old = launch.registers.get(token, unset)
                old = np.full(launch.lane.shape, old) if old.ndim == 0 else old.copy()
                old[lanes] = values
                values = old
            launch.registers[token] = values

        return (lambda launch, values, lanes: None) if token == "_" else write

    def vector(self, i):
        """The operands that braces hold together."""
        return [token for token in re.split(r"[\s,{}]+", self.operands[i]) if token]

    def address(self, i):
        base, offset = re.fullmatch(r"\[\s*([^\s+]+)\s*(?:\+\s*(-?\d+))?\s*\]", self.operands[i]).groups()
        base, offset = self.source(base), np.int64(offset or 0)
        return lambda launch, lanes: base(launch, lanes).astype(np.int64) + offset


def _unset(bits):
    """What a register holds before it is written: as a float, a NaN. Compilers do move such values, but use none."""
    return np.frombuffer(b"\xff" * bits.itemsize, bits)[0] if bits.kind == "u" else bits.type(1)


def _count(launch, lanes):
    return len(launch.lane) if lanes is None else len(lanes)


# ---- what instructions mean -------------------------------------------------------------------------------------


def _meaning(i):
    kinds, rest = i.kinds, ".".join([i.name, *(m for m in i.modifiers if m not in TYPES)])
    own = {"ld": _load, "st": _store, "setp": _compare, "cvt": _convert, "mov": _move, "atom": _add, "shfl": _shuffle}
    if i.name in own:
        return own[i.name](i)
    if rest == "selp":
        return _apply(i, lambda x, y, p: np.where(p, x, y), [*kinds, *kinds, "pred"], kinds[0])
    if rest == "cvta.to.global":
        return _apply(i, np.copy, kinds, kinds[0])
    if i.opcode == "membar.gl":
        return lambda launch, lanes: launch.order.fence(of_lanes(launch.lane, lanes))
    if rest in ("add.rn", "sub.rn") and kinds[0] == "f32" and kinds[1:] in (["bf16"], ["f16"]):
        function, widened = _arithmetic(rest, "f32"), _from_bf16 if kinds[1] == "bf16" else np.float32
        return _apply(i, lambda x, y: function(widened(x), y), [kinds[1], "f32"], "f32")
    if len(kinds) != 1 or (function := _arithmetic(rest, kinds[0])) is None:
        raise i.unknown()
    sources = kinds * (len(i.operands) - 1)
    if i.name in ("shl", "shr", "bfe"):
        sources[1:] = ["u32"] * len(sources[1:])
    if i.name == "bfi":
        sources[2:] = ["u32", "u32"]
    if "wide" in i.modifiers:
        sources[2:] = [kinds[0][0] + "64"] * len(sources[2:])
    return _apply(i, function, sources, kinds[0][0] + "64" if "wide" in i.modifiers else kinds[0])


def _apply(i, function, kinds, result):
    """The first operand's register <- function(the other operands)."""
    sources = [i.source(token, kind) for token, kind in zip(i.operands[1:], kinds, strict=True)]
    sink, dtype = i.sink(i.operands[0]), TYPES[result]

    def carry_out(launch, lanes):
        sink(launch, np.asarray(function(*(source(launch, lanes) for source in sources)), dtype)[()], lanes)

    return carry_out


def _arithmetic(name, kind):
    """The function for an instruction without its type; None if there is none."""
    dtype = TYPES[kind]
    if kind == "pred":
        return {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor, "not": np.logical_not}.get(name)
    if kind == "f32x2":
        single = {"add.rn": np.add, "sub.rn": np.subtract, "mul.rn": np.multiply}.get(name)
        return single and (lambda x, y: single(*(v[..., None].view("f4") for v in (x, y))).view("u8")[..., 0])
    either = {"neg": np.negative}
    if kind in ("f32", "f64"):
        either |= {"add.rn": np.add, "sub.rn": np.subtract, "mul.rn": np.multiply, "div.rn": np.divide}
        either |= {"sqrt.rn": np.sqrt, "rcp.rn": np.reciprocal, "abs": np.abs, "min": np.fmin, "max": np.fmax}
        either["fma.rn"] = _fma_single if kind == "f32" else np.frompyfunc(_fma_double, 3, 1)
        return (either | APPROXIMATE if kind == "f32" else either).get(name)
    if "f" in kind:
        return None
    wide = np.dtype(f"{dtype.kind}8").type
    either |= {"add": np.add, "sub": np.subtract, "min": np.minimum, "max": np.maximum}
    either |= {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert}
    either |= {"mul.lo": np.multiply, "mad.lo": lambda x, y, z: x * y + z}
    either |= {"mul.wide": lambda x, y: wide(x) * wide(y), "mad.wide": lambda x, y, z: wide(x) * wide(y) + z}
    # beyond the width numpy shifts everything out, as PTX does
    either |= {"shl": lambda x, by: x << by.astype(dtype), "shr": lambda x, by: x >> by.astype(dtype)}
    if dtype.kind == "u":
        either["bfe"] = lambda x, at, count: (x >> at) & ~(~dtype.type(0) << count)
        either["bfi"] = _inserted
        either["prmt"] = _permuted
    return either.get(name)


def _inserted(x, y, at, count):
    """y with the lowest ``count`` bits of x in the place of its own from bit ``at`` on."""
    ones = ~(~np.uint64(0) << np.uint64(count)) << np.uint64(at)
    return (np.uint64(y) & ~ones) | (np.uint64(x) << np.uint64(at) & ones)


def _permuted(x, y, which):
    """Four of the bytes of x (0 to 3) and y (4 to 7), named by the hexadecimal digits of ``which`` from the last on."""
    assert not np.any(which & 0x8888), "a byte's sign in all its bits"
    both = np.uint64(x) | np.uint64(y) << np.uint64(32)
    picked = [(both >> np.uint64(8) * (np.uint64(which) >> np.uint64(4 * k) & np.uint64(7))) & 0xFF for k in range(4)]
    return sum(byte << np.uint64(8 * k) for k, byte in enumerate(picked))


def _flushed(x):
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


def _away(x, ulps):
    for _ in range(ulps):
        x = np.where(x == 0, x, np.nextafter(x, np.copysign(np.float32(np.inf), x)))
    return x


#: As far off as PTX allows, which is 2 units in the last place and a relative error of 2^-23; ftz: 0 for a subnormal.
APPROXIMATE = {
    "div.full": lambda x, y: _away(x / y, 2),
    "sqrt.approx.ftz": lambda x: _away(np.sqrt(_flushed(x)), 1),
    "abs.ftz": lambda x: np.abs(_flushed(x)),
}


def _fma_single(x, y, z):
    """x y + z rounded once. In double the product is exact; the sum is rounded to odd, so that rounding it to single
    gives what rounding the exact sum would."""
    product, addend = np.float64(x) * np.float64(y), np.float64(z)
    total = np.asarray(product + addend)
    back = total - product
    error = (product - (total - back)) + (addend - back)
    settled = (error == 0) | (total.view(np.uint64) % 2 == 1) | ~np.isfinite(total)
    return np.where(settled, total, np.nextafter(total, np.copysign(np.inf, error))).astype(np.float32)


def _fma_double(x, y, z):
    """x y + z rounded once."""
    if x == 0 or y == 0 or x * 0 + y * 0 + z * 0 != 0:  # which is NaN if one of them is not finite
        return x * y + z
    return _of_fractions(x, y, z)


@functools.lru_cache(1 << 16)  # threads often have the same numbers
def _of_fractions(x, y, z):
    exact = Fraction(x) * Fraction(y) + Fraction(z)
    try:
        return float(exact)
    except OverflowError:
        return np.inf if exact > 0 else -np.inf


def _bf16(x):
    """The nearest bfloat16, ties to even, as its bits."""
    bits = np.asarray(x).view(np.uint32)
    nearest = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), 0x7FFF, nearest).astype(np.uint16)


def _from_bf16(bits):
    return (np.asarray(bits, np.uint32) << 16).view(np.float32)


def _f16(x):
    return np.asarray(x, np.float16).view(np.uint16)


def _paired(narrow):
    """The first operand goes into the upper half."""
    return lambda high, low: narrow(high).astype(np.uint32) << 16 | narrow(low)


def _convert(i):
    (to, of), rounds = i.kinds, i.modifiers[0] == "rn"
    narrow = {"bf16": _bf16, "bf16x2": _paired(_bf16), "f16": _f16, "f16x2": _paired(_f16)}
    if i.modifiers == ["rzi", to, of] and to[0] in "us" and of in ("f32", "f64"):
        return _apply(i, lambda x: np.trunc(x).astype(TYPES[to]), [of], to)
    if i.modifiers not in (["rn", to, of], [to, of]):
        raise i.unknown()
    if to in narrow and of == "f32" and rounds:
        return _apply(i, narrow[to], ["f32"] * (len(i.operands) - 1), f"u{8 * TYPES[to].itemsize}")
    if of == "bf16" and to in ("f32", "f64") and not rounds:
        return _apply(i, _from_bf16, ["u16"], to)
    exact = to[0] in "us" or (of[0] == "f" and TYPES[to].itemsize > TYPES[of].itemsize)
    if rounds == exact or (of[0] == "f" and to[0] in "us") or "b" in to[0] + of[0]:
        raise i.unknown()
    return _apply(i, lambda x: x.astype(TYPES[to]), [of], to)  # integers wrap


def _compare(i):
    """Floats: a plain relation is false with a NaN, one that ends in u is true."""
    relation, kind = i.modifiers[0], i.kinds[-1]
    plain = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal}
    plain |= {"gt": np.greater, "ge": np.greater_equal}
    floats, pair = "f" in kind, kind.endswith("x2")
    known = {*plain, "num", "nan", *(f"{name}u" for name in plain)} if floats else plain
    if i.modifiers != [relation, kind] or relation not in known:
        raise i.unknown()

    def function(x, y):
        if kind in ("bf16", "bf16x2"):
            x, y = _from_bf16(x), _from_bf16(y)
        elif kind == "f16x2":
            x, y = x.view(np.float16), y.view(np.float16)
        if not floats:
            return plain[relation](x, y)
        unordered = np.isnan(x) | np.isnan(y)
        if relation in ("num", "nan"):
            return unordered == (relation == "nan")
        return plain[relation](x, y) & ~unordered if relation in plain else plain[relation[:-1]](x, y) | unordered

    sources = [i.source(token, kind) for token in i.operands[1:]]
    sinks = [i.sink(token) for token in i.operands[0].split("|")]

    def carry_out(launch, lanes):
        values = [source(launch, lanes) for source in sources]
        for half, sink in enumerate(sinks):
            part = [(v >> 16 * half).astype(np.uint16) for v in values] if pair else values
            sink(launch, np.asarray(function(*part))[()], lanes)

    return carry_out


def _move(i):
    """From one register to another, or into and out of the parts that braces hold together."""
    if i.opcode != f"mov.{i.kinds[0]}":
        raise i.unknown()
    if "{" not in "".join(i.operands):
        return _apply(i, np.copy, i.kinds, i.kinds[0])
    packs = i.operands[1].startswith("{")
    tokens, whole = i.vector(1 if packs else 0), UNSIGNED[i.bytes]
    part = f"u{8 * i.bytes // len(tokens)}"
    places = [whole.type(8 * TYPES[part].itemsize * k) for k in range(len(tokens))]
    if packs:
        sources, sink = [i.source(token, part) for token in tokens], i.sink(i.operands[0])

        def pack(launch, lanes):
            parts = [s(launch, lanes).astype(whole) << place for s, place in zip(sources, places, strict=True)]
            sink(launch, sum(parts[1:], parts[0]), lanes)

        return pack
    source, sinks = i.source(i.operands[1], f"u{8 * i.bytes}"), [i.sink(token) for token in tokens]

    def unpack(launch, lanes):
        for sink, place in zip(sinks, places, strict=True):
            sink(launch, (source(launch, lanes) >> place).astype(TYPES[part]), lanes)

    return unpack


def _space(i):
    """Which memory ld and st mean. What they say of caches changes no value."""
    space, *rest = i.modifiers
    width = [m for m in rest if m in ("v2", "v4")]
    if [m for m in rest if m not in ("cg", "cs")] != width + i.kinds or len(i.kinds) != 1:
        raise i.unknown()
    return space


def _load(i):
    space, address, dtype = _space(i), i.address(1), TYPES[i.kinds[0]]
    sinks = [i.sink(token) for token in i.vector(0)]

    def load(launch, lanes):
        addresses = np.broadcast_to(address(launch, lanes), _count(launch, lanes))
        for sink, values in zip(sinks, launch.memory[space].load(addresses, lanes, dtype, len(sinks)), strict=True):
            sink(launch, values, lanes)

    def parameter(launch, lanes):
        at = np.unique(address(launch, lanes))
        sinks[0](launch, launch.arguments[at[0] : at[0] + dtype.itemsize].view(dtype)[0], lanes)

    if space not in ("global", "shared", "param"):
        raise i.unknown()
    return parameter if space == "param" else load


def _store(i):
    space, address, kind = _space(i), i.address(0), i.kinds[0]
    sources = [i.source(token, kind) for token in i.vector(1)]

    def store(launch, lanes):
        values = [np.broadcast_to(x(launch, lanes), _count(launch, lanes)) for x in (address, *sources)]
        launch.memory[space].store(values[0], lanes, TYPES[kind], values[1:])

    if space not in ("global", "shared"):
        raise i.unknown()
    return store


def _add(i):
    if [m for m in i.modifiers if m not in ("gpu", "relaxed", "acq_rel")] != ["global", "add", "u32"]:
        raise i.unknown()
    address, added, sink = i.address(1), i.source(i.operands[2], "u32"), i.sink(i.operands[0])
    fenced = "acq_rel" in i.modifiers

    def carry_out(launch, lanes):
        where, values = (np.broadcast_to(x(launch, lanes), _count(launch, lanes)) for x in (address, added))
        before = np.zeros(len(where), np.uint32)
        memory, at, _ = launch.memory["global"].find(where, np.dtype(np.uint32), 1)
        for k, lane in enumerate(of_lanes(launch.lane, lanes)):
            if fenced:
                launch.order.fence(lane)
            before[k] = memory[at[k]]
            memory[at[k]] += values[k]
            launch.order.meet(lane, where[k])
            if fenced:
                launch.order.fence(lane)
        sink(launch, before, lanes)

    return carry_out


def _shuffle(i):
    source, sink, across = i.source(i.operands[1], "b32"), i.sink(i.operands[0]), int(i.operands[2])
    if i.opcode != "shfl.sync.bfly.b32" or i.operands[3:] != ["31", "-1"]:
        raise i.unknown()

    def carry_out(launch, lanes):
        count = _count(launch, lanes)
        if lanes is not None and (count % 32 or (lanes.reshape(-1, 32) // 32 != lanes[::32, None] // 32).any()):
            raise Fault("a shuffle that only some threads of a warp come to")
        sink(launch, np.broadcast_to(source(launch, lanes), count)[np.arange(count) ^ across], lanes)

    return carry_out


# ---- a launch ---------------------------------------------------------------------------------------------------


class Launch:
    """The state of one launch."""

    def __init__(self, kernel, arguments, blocks, threads, regions, shared):
        if kernel.threads not in ([], [threads]):
            raise Fault(f"{threads} threads in a block where the kernel is for {kernel.threads}")
        self.kernel, self.blocks, self.threads, self.shared = kernel, blocks, threads, kernel.shared + shared
        self.arguments = np.zeros(max((at + size for at, size in kernel.parameters), default=0), np.uint8)
        for argument, (at, size) in zip(arguments, kernel.parameters, strict=False):
            data = argument if isinstance(argument, bytes) else int(argument).to_bytes(size, "little")
            if len(data) != size:
                raise Fault(f"an argument of {len(data)} bytes where the kernel takes {size}")
            self.arguments[at : at + size] = np.frombuffer(data, np.uint8)
        self.order = Order(blocks, threads)
        self.memory = {"global": Memory(self, regions, kernel.unit)}

    def run(self, resident):
        """Runs these blocks to their ends, all at a time."""
        threads, n = self.threads, len(resident)
        thread = np.tile(np.arange(threads), n)
        self.lane = np.repeat(resident, threads) * threads + thread
        special = {"tid": thread, "ctaid": self.lane // threads, "ntid": threads, "nctaid": self.blocks}
        self.special = {f"%{name}.x": np.uint32(values) for name, values in special.items()}
        self.registers = {}
        self.memory["shared"] = SharedMemory(self, n, self.shared)
        self.at, self._resume = np.zeros(len(self.lane), int), np.zeros(len(self.lane), int)
        while (first := self.at.min()) < PARKED:
            here = np.flatnonzero(self.at == first)
            try:
                self._run_block(first, here)
            except Fault as fault:
                raise Fault(f"{fault}: {self.now.text}") from None
        if first == PARKED:
            raise Fault("a barrier that only some threads of a block come to")

    def _run_block(self, first, here):
        instructions, following = self.kernel.blocks[first]
        everywhere = None if len(here) == len(self.lane) else here
        for self.now in instructions:
            lanes = self.now.through(self, everywhere)
            if self.now.carry_out and (lanes is None or len(lanes)):
                self.now.carry_out(self, lanes)
        self.at[here] = following
        lanes = here if lanes is None else lanes
        if self.now.target is not None:
            self.at[lanes] = self.now.target
        elif self.now.opcode == "ret":
            self.at[lanes] = ENDED
        elif self.now.ends_block:
            self.at[lanes], self._resume[lanes] = PARKED, following
            self._pass_barriers()

    def _pass_barriers(self):
        at, resume = self.at.reshape(-1, self.threads), self._resume.reshape(-1, self.threads)
        for block in np.flatnonzero((at == PARKED).all(1)):
            if (resume[block] != resume[block, 0]).any():
                raise Fault("threads of one block at different barriers")
            at[block] = resume[block]
            self.order.barrier(self.lane[block * self.threads] // self.threads)
