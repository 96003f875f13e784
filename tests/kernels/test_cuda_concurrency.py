"""The CUDA kernels' barriers, shared memory and count of finished blocks, under ThreadSanitizer on this processor.

g++ compiles the kernels' own source as C++, cuda_threads/cuda_threads.h runs all threads of all blocks, and
cuda_threads/driver.cpp compares what comes out. Then one line is broken at a time, and that has to be noticed.

Compiled as a processor's code the kernels are without what stands under __CUDA_ARCH__: hints on caches and unrolling.
"""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
UNITS = ["cuda_threads.cpp", "driver.cpp", "gram.cu", "climb.cu", "descend_sgd.cu", "descend_adam.cu", "restore.cu"]
PROBE = """
#include <sanitizer/tsan_interface.h>
#include <atomic>
int main() { std::atomic<bool>(true).wait(false); return __tsan_get_current_fiber() == nullptr; }
"""
RACE = "ThreadSanitizer: data race"


class Mutation(NamedTuple):
    file: str
    line: str
    broken: str
    unit: str = "gram.cu"  # compiled with it; the others stay as they are
    notice: str = RACE


FOLD = "    __syncthreads();\n    fold("
READ = "  const Sums sums = lanes[0];\n"
TOTAL = "    if (threadIdx.x == 0) put(a.sums,"
FENCE = "    __threadfence();\n"
COUNT = "    last = atomicAdd(counter, 1) == blocks - 1;\n"
FINISH = "finished_last(args.counter, gridDim.x)"
MUTATIONS = {
    "no barrier before all read what thread 0 prepared": Mutation(
        "launch.cuh", "  __syncthreads();\n  P::run", "  P::run", "descend_sgd.cu"
    ),
    "no barrier between the steps of a sum": Mutation("gram.cu", FOLD, "    fold("),
    "no barrier before all read the sum": Mutation("gram.cu", f"  __syncthreads();\n{READ}", READ),
    "no barrier between two sums": Mutation("gram.cu", f"{READ}  __syncthreads();\n", READ),
    "a barrier for some threads": Mutation(
        "gram.cu",
        TOTAL,
        TOTAL.replace("put", "__syncthreads(), put"),
        notice="a barrier that only some threads of a block come to",
    ),
    "no barrier before a block counts": Mutation("launch.cuh", "last;\n  __syncthreads();\n", "last;\n", "driver.cpp"),
    "no barrier after a block has counted": Mutation("launch.cuh", "  __syncthreads();\n  return", "  return"),
    "no fence before a block counts": Mutation("launch.cuh", FENCE + COUNT, COUNT),
    "a fence too late": Mutation("launch.cuh", FENCE + COUNT, COUNT + FENCE),
    "no fence after a block has counted": Mutation("launch.cuh", f"  {FENCE}", ""),
    "a block too early": Mutation("launch.cuh", "blocks - 1;", "blocks - 2;"),
    "a count that goes on": Mutation("launch.cuh", "*counter = 0", "", notice="differs: sums from launch to launch"),
    "partial sums of two blocks in one place": Mutation("gram.cu", "+ blockIdx.x, gridDim.x,", "+ blockIdx.x, 1,"),
    "steps counted by every block": Mutation("launch.cuh", f"if ({FINISH}) P::", f"{FINISH}, P::", "descend_adam.cu"),
    "steps counted by no block": Mutation(
        "launch.cuh", f"if ({FINISH}) P::", f"if ({FINISH} && false) P::", "descend_adam.cu", "differs: weights"
    ),
    "elements that two threads write": Mutation(
        "elements.cuh", "i < whole; i += kThreads * Width", "i < whole; i += Width", "restore.cu"
    ),
}


def cuda_headers():
    nvcc = Path(shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc").resolve()
    homes = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")), nvcc.parents[1]]
    found = next((home / "include" for home in homes if (home / "include" / "cuda_bf16.h").exists()), None)
    return found or pytest.skip("the CUDA toolkit's headers were not found")


def run(*command):
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


class Build:
    """A folder with the sources and one object for each unit."""

    def __init__(self, folder, headers):
        self.folder, self.headers = folder, headers
        shutil.copytree(ROOT / "csrc", folder / "csrc", ignore=shutil.ignore_patterns("cpu"))
        shutil.copytree(ROOT / "tests" / "kernels" / "cuda_threads", folder / "cuda_threads")

    def edit(self, file, edited):
        """Replaces a source by ``edited`` of its text."""
        source = self.folder / "csrc" / "cuda" / file
        source.write_text(edited(source.read_text()))

    def compile(self, unit):
        flags = [
            "-std=c++20",
            "-g1",
            "-O1",
            "-ffp-contract=off",
            "-isystem",
            self.headers,
            "-isystem",
            self.headers / "cccl",
        ]
        source = self.folder / ("csrc/cuda" if unit.endswith(".cu") else "cuda_threads") / unit
        if unit != "cuda_threads.cpp":
            flags += ["-fsanitize=thread", "-include", self.folder / "cuda_threads" / "cuda_threads.h"]
            flags += ["-I", self.folder / "csrc/cuda", "-x", "c++"]
        code, said = run("g++", *flags, "-c", source, "-o", self.folder / f"{unit}.o")
        assert code == 0, said

    def run(self, objects, options="", *arguments):
        """(exit status, what it said) of the driver, with the objects that are not here from another folder."""
        paths = [self.folder / f"{unit}.o" for unit in UNITS]
        paths = [path if path.exists() else objects / path.name for path in paths]
        code, said = run("g++", "-fsanitize=thread", "-pthread", *paths, "-o", self.folder / "driver")
        assert code == 0, said
        return run("env", f"TSAN_OPTIONS=halt_on_error=1 {options}", self.folder / "driver", *arguments)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("g++ was not found")
    folder = tmp_path_factory.mktemp("unbroken")
    (folder / "probe.cpp").write_text(PROBE)
    code, said = run("g++", "-std=c++20", "-fsanitize=thread", folder / "probe.cpp", "-o", folder / "probe")
    if code == 0:
        code, said = run(folder / "probe")
    if code:
        pytest.skip(f"ThreadSanitizer does not work here: {said.strip()[-300:]}")
    build = Build(folder, cuda_headers())
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(build.compile, UNITS))
    return build


def test_threads_do_not_race_and_give_the_bits_of_one_thread(unbroken):
    assert unbroken.run(unbroken.folder) == (0, "")


def only_float32(text):
    """``with_types`` for one type: what the other types' kernels are compiled from is the same source."""
    text, count = re.subn(
        r"  switch \(types\.weights\) \{.*?\n  \}\n", "  with_vectors(float{}, float{});\n", text, flags=re.S
    )
    assert count == 1
    return text


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_kernel_is_noticed(name, unbroken, tmp_path):
    mutation = MUTATIONS[name]
    build = Build(tmp_path, unbroken.headers)
    build.edit("launch.cuh", only_float32)

    def broken(text):
        assert text.count(mutation.line) == 1
        return text.replace(mutation.line, mutation.broken)

    build.edit(mutation.file, broken)
    build.compile(mutation.unit)
    code, said = build.run(unbroken.folder, "symbolize=0", "float32")  # names of functions take longer than the run
    assert code != 0 and mutation.notice in said, (code, said[-3000:])
