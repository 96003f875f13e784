"""The CUDA kernels as the GPU gets them: accesses of 16 bytes, no spills, registers for the occupancy intended.

Read from the library that the build installed, on a machine without a GPU. Needs cuobjdump, which Triton's package
carries.
"""

import functools
import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from fastsam.kernels import cuda

if cuda._cuda is None:
    pytest.skip(f"backend 'cuda': {cuda.unavailable()}", allow_module_level=True)

ARCHITECTURES = [f"sm_{a // 10}" for a in cuda._cuda.architectures()]
REGISTER_FILE = 65536  # registers of a multiprocessor, on every architecture so far

# Accesses of 16 bytes in a kernel whose gradients have the weights' type: those of the full-chunk path, so the bytes
# moved for each element, and those of the plain copies for steps that do not count.
VECTORS = {
    # loads: <g,g> alone four at a time and one for the rest; in general g, m, v, w
    "gram": {"loads": 5 + 4, "stores": 0, "past the caches": 0},
    # loads g, w, m, v and w; stores w, backup, m and backup
    "climb": {"loads": 4 + 1, "stores": 1 + 1, "past the caches": 2},
    # loads backup, g, momentum, and backup, m; stores w, momentum, and w, m
    "descend_sgd": {"loads": 3 + 2, "stores": 2 + 2, "past the caches": 0},
    # loads backup, g, exp_avg, exp_avg_sq, and backup, m; stores w, exp_avg, exp_avg_sq, and w, m
    "descend_adam": {"loads": 4 + 2, "stores": 3 + 2, "past the caches": 0},
    # the same and s; the next s
    "descend_sgd with a mixture": {"loads": 3 + 2 + 1, "stores": 2 + 2, "past the caches": 1},
    "descend_adam with a mixture": {"loads": 4 + 2 + 1, "stores": 3 + 2, "past the caches": 1},
    "restore": {"loads": 1, "stores": 1, "past the caches": 0},
}
#: Beside float32 weights, vectors in bfloat16 are accesses of 8 bytes: those of 16 that go, and those of 8 that come.
NARROW = " with vectors in bfloat16"
VECTORS |= {
    "gram" + NARROW: {**VECTORS["gram"], "loads": 5 + 2, "narrow loads": 2, "narrow stores": 0},
    "climb" + NARROW: {"loads": 2 + 1, "stores": 1 + 1, "past the caches": 1, "narrow loads": 2, "narrow stores": 1},
    **{
        name + NARROW: {
            **VECTORS[name],
            "loads": VECTORS[name]["loads"] - 1,
            "past the caches": 0,
            "narrow loads": 1,
            "narrow stores": 1,
        }
        for name in ("descend_sgd with a mixture", "descend_adam with a mixture")
    },
}
PASSES = {
    "gram_kernel": "gram",
    "Climb": "climb",
    "DescendSgd": "descend_sgd",
    "DescendAdam": "descend_adam",
    "Restore": "restore",
}
WEIGHTS = {"f": "float", "d": "double", "13__nv_bfloat16": "bfloat16", "6__half": "float16"}


@functools.cache
def cuobjdump(option):
    places = []
    if spec := importlib.util.find_spec("triton"):
        places = [str(Path(spec.origin).parent / "backends/nvidia/bin")]
    tool = next((t for p in [*places, None] if (t := shutil.which("cuobjdump", path=p))), None)
    if tool is None:
        pytest.skip("cuobjdump was not found: it comes with Triton and with the CUDA toolkit")
    return subprocess.run([tool, option, cuda._cuda.__file__], capture_output=True, text=True, check=True).stdout


def kernel_of(mangled):
    """(pass, type of the weights, whether gradients are of several types) of a mangled name; None for other code.

    The name of a pass says what its vectors are where the type of the weights does not.
    """
    found = next((p for p in PASSES if p in mangled), None)
    if found is None:
        return None
    types = re.search(found + r"I(f|d|13__nv_bfloat16|6__half)(.*)", mangled)
    mixture = " with a mixture" if found.startswith("Descend") and "4None" not in types[2] else ""
    narrow = NARROW if types[1] == "f" and "bfloat16" in types[2] else ""
    return PASSES[found] + mixture + narrow, WEIGHTS[types[1]], "Mixed" in types[2]


@functools.cache
def listings():
    """{(architecture, kernel): instructions with their modifiers, in order}"""
    kernels = {}
    listing = None
    for line in cuobjdump("-sass").splitlines():
        if found := re.match(r"\s*arch = (sm_\d+)", line):
            architecture = found[1]
        elif found := re.search(r"Function : (\S+)", line):
            name = kernel_of(found[1])
            listing = kernels.setdefault((architecture, name), []) if name else None
        elif listing is not None and (found := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@\S+\s+)?([A-Z][\w.]*)", line)):
            listing.append(found[1])
    return kernels


@functools.cache
def instructions():
    """{(architecture, kernel): Counter of the same}"""
    return {name: Counter(listing) for name, listing in listings().items()}


@functools.cache
def resources():
    """{(architecture, kernel): (registers, bytes of stack)}"""
    kernels = {}
    for line in cuobjdump("-res-usage").splitlines():
        if found := re.match(r"\s*arch = (sm_\d+)", line):
            architecture = found[1]
        elif found := re.search(r"Function (\S+):", line):
            name = kernel_of(found[1])
        elif (found := re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", line)) and name:
            kernels[architecture, name] = int(found[1]), int(found[2]) + int(found[3])
    return kernels


def of(architecture, which):
    found = {name: value for (a, name), value in which().items() if a == architecture}
    assert found, f"nothing was compiled for {architecture}"
    return found.items()


def accesses(counts, instruction, *modifiers):
    return sum(
        n for name, n in counts.items() if name.split(".")[0] == instruction and set(modifiers) <= set(name.split("."))
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_pass_is_compiled_for_every_type(architecture):
    expected = {
        (name, weights, mixed)
        for name in VECTORS
        if name != "restore"
        for weights in (["float"] if name.endswith(NARROW) else WEIGHTS.values())
        for mixed in (False, True)
        if not (mixed and weights == "double")
    } | {("restore", weights, False) for weights in ("float", "double", "bfloat16")}  # by size alone
    assert {name for name, _ in of(architecture, instructions)} == expected


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_full_chunks_are_read_and_written_in_accesses_of_16_bytes(architecture):
    """Each vector once: a load more or less is another number of bytes for each element."""
    for (name, weights, mixed), counts in of(architecture, instructions):
        stores = accesses(counts, "STG", "128")
        past = accesses(counts, "STG", "128", "EF")
        found = {"loads": accesses(counts, "LDG", "128"), "stores": stores - past, "past the caches": past}
        if name.endswith(NARROW) and not mixed:  # beside those of the tables' entries, which every kernel has
            plain = instructions()[architecture, (name.removesuffix(NARROW), weights, mixed)]
            found["narrow loads"] = accesses(counts, "LDG", "64") - accesses(plain, "LDG", "64")
            found["narrow stores"] = accesses(counts, "STG", "64") - accesses(plain, "STG", "64")
        if mixed:  # float32 gradients with halves take two, halves with float32 are accesses of 8 bytes
            assert found["loads"] >= VECTORS[name]["loads"]
            found = {**VECTORS[name], **found, "loads": VECTORS[name]["loads"]}
        assert found == VECTORS[name], (name, weights, mixed)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_four_elements_of_each_array_are_under_way_off_alignment(architecture):
    """None of their loads waits for the stores of those before. Halves tell them from the tables' entries."""
    arrays = {"gram": 1, "climb": 2, "descend_sgd": 2, "descend_adam": 4, "restore": 1}  # at least
    for (name, weights, mixed), listing in of(architecture, listings):
        if weights != "bfloat16" or mixed or name not in arrays:  # a mixture has no registers left for it
            continue
        longest = run = 0
        for instruction in listing:
            parts = set(instruction.split("."))
            run = 0 if "STG" in parts else run + ({"LDG", "U16"} <= parts)
            longest = max(longest, run)
        assert longest >= 4 * arrays[name], (name, longest)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_elements_are_in_global_memory_alone(architecture):
    """No local memory, which spills would be in, and no access whose kind of memory is found out at run time."""
    for kernel, counts in of(architecture, instructions):
        found = {name: counts for name in counts if name.split(".")[0] in ("LDL", "STL", "LD", "ST")}
        assert not found, (kernel, found)
    for kernel, (_, stack) in of(architecture, resources):
        assert stack == 0, kernel


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_registers_leave_room_for_enough_threads(architecture):
    """Bytes under way: 1024 threads a multiprocessor with 16 bytes of each vector, fewer where vectors are more."""
    for (name, weights, mixed), (registers, _) in of(architecture, resources):
        fewer = mixed or weights == "double" or (name == "descend_adam" and weights != "float")
        threads = (768 if fewer else 1024) - (256 if "with a mixture" in name else 0)
        granted = -(-registers // 8) * 8
        assert granted * threads <= REGISTER_FILE, (name, weights, mixed, registers)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sums_are_formed_without_float_atomics(architecture):
    for (name, *_), counts in of(architecture, instructions):
        atomics = {i for i in counts if i.split(".")[0] in ("ATOM", "ATOMG", "RED", "REDG")}
        assert not any(part.startswith(("F16", "F32", "F64", "BF16")) for i in atomics for part in i.split("."))
        assert bool(atomics) == (name.split()[0] in ("gram", "descend_adam"))  # the integer count of finished blocks


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_products_and_sums_are_not_contracted(architecture):
    """The few that there are belong to divisions in double, one for each chunk, not to elements."""
    for (name, weights, _), counts in of(architecture, instructions):
        if name.split()[0] in ("climb", "descend_sgd") and weights != "double":
            assert accesses(counts, "FMUL") >= 4
            assert accesses(counts, "FFMA") < 4, (name, weights)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sums_go_to_double_once_for_each_access_not_for_each_element(architecture):
    """Eight halves to an access, then, and four floats take the same number of conversions."""
    found = {weights: counts for (name, weights, mixed), counts in of(architecture, instructions) if name == "gram"}
    conversions = {weights: accesses(counts, "F2F", "F64", "F32") for weights, counts in found.items()}
    assert 0 < conversions["bfloat16"] == conversions["float16"] == conversions["float"], conversions


def test_the_newest_architecture_is_there_as_ptx_too():
    kept = set(re.findall(r"\.(sm_\d+)\.ptx", cuobjdump("-lptx")))
    assert kept == {ARCHITECTURES[-1]}
