"""The Triton kernels compiled for GPUs that are not here, and what their machine code says.

A chunk's whole blocks are walked by loops that read and write 16 bytes at a time and nothing narrower, each array
once; everything else (tables, tails, the reduction) is outside of them.
"""

import functools
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("nothing is compiled under TRITON_INTERPRET=1", allow_module_level=True)

from fastsam.kernels import triton as backend  # noqa: E402
from fastsam.kernels import triton_access as access  # noqa: E402
from fastsam.kernels import triton_descend as descend  # noqa: E402
from fastsam.kernels import triton_kernels as kernels  # noqa: E402

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

#: 65536 registers of a multiprocessor for blocks of 128 threads: five blocks or more; four waves on a CDNA SIMD.
MOST_REGISTERS = {"cuda": 96, "hip": 128}


class Case(NamedTuple):
    kernel: str
    reads: int  # arrays read and written in the full-chunk path
    writes: int
    without: tuple = ()  # buffers that this method does not have
    weights: tl.dtype = tl.float32
    constants: tuple = ()
    narrow: tuple = (0, 0)  # how many of them are vectors in bfloat16 beside float32 weights
    rounds: bool = False  # stochastically

    def accesses(self) -> tuple[int, int]:
        """Of 16 bytes, loads and stores, by each thread in one block."""
        items = [self.weights.primitive_bitwidth // 8] * 2
        each = [item * backend._BLOCK // (16 * backend._THREADS) for item in items]
        half = 2 * backend._BLOCK // (16 * backend._THREADS)
        counts = zip((self.reads, self.writes), self.narrow, each, strict=True)
        loads, stores = (one * (all_ - few) + half * few for all_, few, one in counts)
        return loads, stores


SAM_CLIMB = ("ema", "ema_next", "vector")
PLAIN = ("mixture", "stored", "stored_next")
SAM_SGD = ("ema", "ema_next", *PLAIN)
PLAIN_GRAM = ("hyper", "ema", "vector")
CASES = {
    "gram, SAM and the guard": Case("gram", 1, 0, PLAIN_GRAM, constants=(("WEIGHTED", False),)),
    "gram, F-SAM": Case("gram", 2, 0, ("vector",), constants=(("WEIGHTED", False),)),
    "gram, Eigen-SAM": Case("gram", 2, 0, ("hyper", "ema"), constants=(("WEIGHTED", False),)),
    "gram, F-SAM + Eigen-SAM": Case("gram", 3, 0, constants=(("WEIGHTED", False),)),
    "gram, ASAM": Case("gram", 2, 0, ("ema", "vector"), constants=(("WEIGHTED", True),)),
    "gram, bf16": Case("gram", 1, 0, PLAIN_GRAM, tl.bfloat16, (("WEIGHTED", False),)),
    "climb, SAM": Case("climb", 2, 2, SAM_CLIMB, constants=(("CLOSED_FORM", True),)),
    "climb, F-SAM": Case("climb", 3, 3, ("vector",), constants=(("CLOSED_FORM", True),)),
    "climb, Eigen-SAM": Case("climb", 3, 2, ("ema", "ema_next"), constants=(("CLOSED_FORM", True),)),
    "climb, F-SAM + Eigen-SAM": Case("climb", 4, 3, constants=(("CLOSED_FORM", True),)),
    "climb, own recipe": Case("climb", 3, 2, ("ema", "ema_next"), constants=(("CLOSED_FORM", False),)),
    "climb, F-SAM, bf16": Case("climb", 3, 3, ("vector",), tl.bfloat16, (("CLOSED_FORM", True),)),
    "climb, F-SAM, fp16": Case("climb", 3, 3, ("vector",), tl.float16, (("CLOSED_FORM", True),)),
    "climb, a first gradient kept": Case("climb", 2, 3, ("ema", "vector"), constants=(("CLOSED_FORM", True),)),
    "SGD": Case("descend_sgd", 2, 1, ("momentum_buffer", *SAM_SGD)),
    "SGD momentum": Case("descend_sgd", 3, 2, SAM_SGD),
    "SGD momentum of F-SAM": Case("descend_sgd", 3, 2, PLAIN),
    "SGD momentum, bf16": Case("descend_sgd", 3, 2, SAM_SGD, tl.bfloat16),
    "SGD momentum, scaled": Case("descend_sgd", 3, 2, ("ema", "ema_next", "stored", "stored_next")),
    "SGD momentum, s": Case("descend_sgd", 4, 2, ("ema", "ema_next", "stored_next")),
    "SGD momentum, s and the next s": Case("descend_sgd", 4, 3, ("ema", "ema_next")),
    "SGD momentum, s and the next s, bf16": Case("descend_sgd", 4, 3, ("ema", "ema_next"), tl.bfloat16),
    "Adam": Case("descend_adam", 4, 3, SAM_SGD),
    "Adam of F-SAM, bf16": Case("descend_adam", 4, 3, PLAIN, tl.bfloat16),
    "Adam, s": Case("descend_adam", 5, 3, ("ema", "ema_next", "stored_next")),
    "Adam, s and the next s, bf16": Case("descend_adam", 5, 4, ("ema", "ema_next"), tl.bfloat16),
    "restore": Case("restore", 1, 1),
    "gram, F-SAM, m in bf16": Case("gram", 2, 0, ("vector",), constants=(("WEIGHTED", False),), narrow=(1, 0)),
    "climb, F-SAM, m in bf16": Case("climb", 3, 3, ("vector",), constants=(("CLOSED_FORM", True),), narrow=(1, 1)),
    "SGD momentum, s and the next s in bf16": Case("descend_sgd", 4, 3, ("ema", "ema_next"), narrow=(1, 1)),
    "SGD momentum, bf16, at random": Case("descend_sgd", 3, 2, SAM_SGD, tl.bfloat16, rounds=True),
    "Adam, bf16, at random": Case("descend_adam", 4, 3, SAM_SGD, tl.bfloat16, rounds=True),
}


#: Cases with a number in local memory on sm_100 that only the tail needs.
ASIDE = {"Adam, s and the next s, bf16", "gram, F-SAM, m in bf16"}

#: Two layouts, one of each type's vectors, leave room for four blocks on sm_100, not for five.
FEWER_BLOCKS = {("SGD momentum, s and the next s in bf16", "sm_100"): 112}


@functools.cache
def compiled(case: Case, target: str):
    kernel = backend._kernels[case.kernel]
    threads = backend._THREADS
    constants = dict.fromkeys([*case.without, *(() if case.rounds else ("rounding",))])
    vectors = tl.bfloat16 if any(case.narrow) else case.weights
    constants |= {"W": case.weights, "G": case.weights, "M": vectors, "BLOCK": backend._BLOCK, **dict(case.constants)}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    types = {"rows": "*i64", "chunks": "*i64", "counter": "*i32", "steps": "*fp32", "n_rows": "i32"}
    types |= dict.fromkeys(("hyper", "mixture", "scaling", "sums", "met", "partials", "rounding"), "*fp64")
    types |= dict.fromkeys(("ema", "ema_next", "vector", "stored", "stored_next"), f"*{vectors.name}")
    signature = {
        name: "constexpr" if name in constants else types.get(name, f"*{case.weights.name}")
        for name in kernel.arg_names
    }
    options = {"num_warps": threads // TARGETS[target].warp_size, "enable_fp_fusion": False}
    return triton.compile(ASTSource(kernel, signature, constants), target=TARGETS[target], options=options)


@functools.cache
def listing(case: Case, target: str) -> str:
    """The assembly text: nvdisasm's for NVIDIA, the compiler's own for AMD."""
    code = compiled(case, target)
    if TARGETS[target].backend == "hip":
        return code.asm["amdgcn"]
    return tool("nvdisasm", "-c", code.asm["cubin"])


@functools.cache
def usage(case: Case, target: str) -> str:
    """Registers and stack, as cuobjdump reports them."""
    return tool("cuobjdump", "-res-usage", compiled(case, target).asm["cubin"])


def tool(name: str, option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
        return subprocess.run([path, option, file.name], capture_output=True, text=True, check=True).stdout


def loops(text: str) -> list[str]:
    """The bodies of loops without branches: from a label to the branch back to it, with no other label between."""
    bodies, body, name = [], [], None
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L(?:BB|_x_)\w+):", line):
            name, body = label[1], []
        elif branch := re.search(r"\b(?:BRA|s_cbranch_\w+|s_branch)\b.*?(\.L\w+)", line):
            if branch[1] == name:
                bodies.append("\n".join(body))
        body.append(line)
    return bodies


WIDTHS = {
    "cuda": (r"\bLDG\.[\w.]*", r"\bSTG\.[\w.]*", ".128"),
    "hip": (r"\b(?:global|buffer|flat)_load_\w+", r"\b(?:global|buffer|flat)_store_\w+", "dwordx4"),
}


def accesses(body: str, vendor: str) -> tuple[int, int, int]:
    """Loads and stores of 16 bytes, and narrower accesses of either kind."""
    load, store, wide = WIDTHS[vendor]
    loads, stores = re.findall(load, body), re.findall(store, body)
    wide_loads, wide_stores = (sum(wide in name for name in names) for names in (loads, stores))
    return wide_loads, wide_stores, len(loads) + len(stores) - wide_loads - wide_stores


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", CASES)
def test_whole_blocks_move_each_array_once_16_bytes_at_a_time(name, target):
    case, vendor = CASES[name], TARGETS[target].backend
    wide = [counts for counts in (accesses(body, vendor) for body in loops(listing(case, target))) if sum(counts[:2])]
    assert wide, "no loop with accesses of 16 bytes"
    for loads, stores, narrow in wide:
        assert narrow == 0
        in_block = case.accesses()
        blocks = loads // in_block[0]  # the compilers may unroll
        assert (loads, stores) == (blocks * in_block[0], blocks * in_block[1])


def test_bytes_per_element_are_those_of_the_three_passes():
    """float32 with momentum; the second gradient is read once more, to see that it is finite."""
    size = {n: 4 * (c.reads + c.writes) - 2 * sum(c.narrow) for n, c in CASES.items() if c.weights == tl.float32}
    descend = size["SGD momentum"] + size["gram, SAM and the guard"]
    assert size["gram, F-SAM, m in bf16"] + size["climb, F-SAM, m in bf16"] + descend == 46 + 4
    assert size["gram, SAM and the guard"] + size["climb, SAM"] + descend == 40 + 4
    assert size["gram, F-SAM"] + size["climb, F-SAM"] + descend == 52 + 4
    assert size["gram, Eigen-SAM"] + size["climb, Eigen-SAM"] + descend == 48 + 4


def test_bytes_per_element_of_a_second_side_with_a_stored_vector():
    """4 to keep the first gradient, 4 to read it in the guard and 4 in the descent, which may write the next for 4."""
    size = {name: 4 * (case.reads + case.writes) for name, case in CASES.items() if case.weights == tl.float32}
    assert size["climb, a first gradient kept"] == size["climb, SAM"] + 4
    assert size["gram, Eigen-SAM"] == size["gram, SAM and the guard"] + 4  # with the stored vector for v
    assert size["SGD momentum, scaled"] == size["SGD momentum"]
    assert size["SGD momentum, s"] == size["SGD momentum"] + 4
    assert size["Adam, s"] == size["Adam"] + 4
    assert size["SGD momentum, s and the next s"] == size["SGD momentum"] + 8


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", CASES)
def test_nothing_spills(name, target):
    text = listing(CASES[name], target)
    if TARGETS[target].backend == "hip":
        assert not re.search(r"\bscratch_", text)
        for value in ("private_segment_fixed_size", "vgpr_spill_count", "sgpr_spill_count"):
            assert int(re.search(rf"\.{value}:\s+(\d+)", text)[1]) == 0
    else:
        aside = 8 if name in ASIDE else 0
        assert len(re.findall(r"\b(?:LDL|STL)\b", text)) <= aside // 4
        assert int(re.search(r"STACK:(\d+)", usage(CASES[name], target))[1]) <= aside


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", CASES)
def test_registers_leave_room_for_enough_blocks(name, target):
    vendor = TARGETS[target].backend
    if vendor == "hip":
        used = int(re.search(r"\.vgpr_count:\s+(\d+)", listing(CASES[name], target))[1])
    else:
        used = int(re.search(r"REG:(\d+)", usage(CASES[name], target))[1])
    assert used <= FEWER_BLOCKS.get((name, target), MOST_REGISTERS[vendor])


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_uniform_dtypes_need_no_shared_memory_for_their_elements(target):
    for name, case in CASES.items():
        if case.kernel in ("climb", "descend_sgd", "restore") and not any(case.narrow):
            assert compiled(case, target).metadata.shared == 0, name


@pytest.mark.parametrize("kernel", ["gram", "descend_adam"])
def test_the_last_program_is_found_with_release_and_acquire(kernel):
    name = {"gram": "gram, F-SAM", "descend_adam": "Adam"}[kernel]
    assert "atom.global.gpu.acq_rel.add" in re.sub(r"\.relaxed", "", compiled(CASES[name], "sm_90").asm["ptx"])
    for case in CASES.values():
        assert not re.search(r"atom\w*\.[\w.]*add[\w.]*\.f(16|32|64)", compiled(case, "sm_90").asm["ptx"])


@pytest.mark.parametrize("target", TARGETS)
def test_several_gradient_dtypes_in_one_launch_compile(target):
    case = Case("climb", 4, 3, ("vector",), constants=(("CLOSED_FORM", True), ("G", None)))
    assert "scratch_" not in listing(case, target)


def test_device_functions_have_no_default_arguments():
    """Triton before 3.9 makes no constexpr of a default that is a string: what has one does not compile there."""
    for module in (kernels, descend, access):
        for name, function in vars(module).items():
            if isinstance(function, triton.JITFunction):
                defaults = [p.name for p in function.params if p.has_default]
                assert not defaults, (name, defaults)
