"""benchmarks/gpu.sh: what it says of what is missing or broken, and that it goes on; its programs are stubs here."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.sh"
CHECKS = {"build.log", "tests-cuda.log", "tests-triton.log", "kernels.md"}
MEASURES = {"gpu.json", "gpu.md", "benchmark.log"}

pytestmark = pytest.mark.skipif(not (shutil.which("bash") and shutil.which("timeout")), reason="no bash or timeout")

#: In the interpreter's place: each program that the script runs says one thing, or does what the test asks for.
PYTHON = r"""#!/usr/bin/env bash
case "$*" in
  *"import pytest" | *"import hypothesis" | *"import xdist") [[ $2 != "import $MISSING" ]] ;;
  *"workers.no_gpu"*) echo "$GPU" ;;
  *"setup.py"*)
    echo "compiling for ${FASTSAM_CUDA_ARCHS:-every architecture}"
    echo "fastsam: cpu extension built" >&2
    echo "fastsam: cuda extension ${BUILT:-built}" >&2 ;;
  *"pytest.main"*"-k triton"*)
    [[ -z ${TRITON_STATUS:-} ]] || echo "FAILED tests/gpu/a.py::t"
    echo "9 passed in 2 s"
    exit ${TRITON_STATUS:-0} ;;
  *"pytest.main"*) echo "$SAID"; echo "8 passed in 2 s"; exit ${CUDA_STATUS:-0} ;;
  *"benchmarks.gpu_kernels"*) echo "| a line of kernels |" >"$3/kernels.md"; exit ${KERNELS_STATUS:-0} ;;
  *"benchmarks.gpu "*)
    printf '%s\n' "$@" >"$3/arguments"
    [[ -n ${MEASURED_STATUS:-} ]] && exit "$MEASURED_STATUS"
    echo '{}' >"$3/gpu.json"
    printf '| must reach | measured | |\n| --- | --- | --- |\n| all | 1 | met |\n\n## More\n' | tee "$3/gpu.md" ;;
esac
"""

NVCC = r"""#!/usr/bin/env bash
echo compute_80
echo compute_90
"""


@pytest.fixture
def gpu(tmp_path):
    """``gpu(*arguments, **environment)`` runs a copy of the script; ``gpu.out`` is its folder."""
    (tmp_path / "benchmarks").mkdir()
    shutil.copy(SCRIPT, tmp_path / "benchmarks")
    for name, text in (("python", PYTHON), ("nvcc", NVCC)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def gpu(*arguments, **environment):
        settings = {"GPU": "sm_90 NVIDIA H200", "MISSING": "", "SAID": ""} | environment
        settings |= {"PYTHON": str(tmp_path / "python"), "CUDACXX": settings.get("CUDACXX", str(tmp_path / "nvcc"))}
        kept = {k: v for k, v in os.environ.items() if not k.startswith("FASTSAM_")}
        command = [str(tmp_path / "benchmarks" / "gpu.sh"), str(gpu.out), *arguments]
        done = subprocess.run(command, env={**kept, **settings}, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    gpu.out = tmp_path / "out"
    return gpu


def files(gpu):
    return {path.name for path in gpu.out.iterdir()} - {"arguments"}


def test_both_calls_leave_seven_files_and_the_targets_come_last(gpu):
    status, said = gpu()
    assert status == 0, said
    assert files(gpu) == CHECKS | MEASURES
    assert said.index("| a line of kernels |") < said.index("| must reach") < said.index("| all | 1 | met |")
    assert said.splitlines()[-1].endswith("tests-cuda.log tests-triton.log ") and "## More" not in said
    arguments = (gpu.out / "arguments").read_text()
    assert "Build: fastsam: cpu extension built; fastsam: cuda extension built." in arguments
    assert "cuda: exit status 0, 8 passed in 2 s; triton: exit status 0, 9 passed in 2 s" in arguments
    assert "compiling for 90" in (gpu.out / "build.log").read_text()


def test_each_call_runs_alone_and_in_any_order(gpu):
    status, _ = gpu("--measure")
    assert status == 0 and files(gpu) == MEASURES
    assert "No --check came before this" in (gpu.out / "arguments").read_text()
    status, _ = gpu("--check")
    assert status == 0 and files(gpu) == CHECKS | MEASURES


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"CUDA_STATUS": "139", "SAID": "CUDA error: an illegal memory access was encountered"},
         "cuda: exit status 139, 8 passed in 2 s (a fault: CUDA error: an illegal memory access was encountered)"),
        ({"TRITON_STATUS": "1"}, "FAILED tests/gpu/a.py::t"),
        ({"KERNELS_STATUS": "3"}, "the kernels' times ended with exit status 3"),
        ({"BUILT": "not built: the compiler failed: an error"}, "cuda extension not built: the compiler failed"),
        ({"MISSING": "pytest"}, "no pytest: no test was run"),
        ({"MEASURED_STATUS": "1"}, "the benchmark ended with exit status 1"),
    ],
    ids=["the CUDA tests die", "a Triton test fails", "the kernels' times fail", "no compiler", "no pytest",
         "the benchmark fails"],
)  # fmt: skip
def test_what_fails_is_said_and_the_rest_is_done(gpu, environment, says):
    status, said = gpu(**environment)
    assert status == 1 and says in said
    assert "| a line of kernels |" in said
    assert (gpu.out / "arguments").exists()
    if environment.get("MISSING") != "pytest":
        assert "triton: exit status" in said and "cuda: exit status" in said


def test_without_nvcc_nothing_is_a_failure(gpu):
    """The Triton kernels are tested and measured."""
    status, said = gpu(BUILT="not built: nvcc was not found", CUDACXX="/no/nvcc")
    assert status == 0 and "cuda extension not built: nvcc was not found" in said


def test_without_a_gpu_the_reason_is_said_and_the_build_done(gpu):
    status, said = gpu("--check", GPU="The NVIDIA driver on your system is too old (found version 11040).")
    assert status == 1 and "no GPU: The NVIDIA driver on your system is too old" in said
    assert "compiling for every architecture" in (gpu.out / "build.log").read_text()


def test_a_card_that_nvcc_does_not_know_gets_the_architectures_it_knows(gpu):
    status, said = gpu("--check", GPU="sm_120 NVIDIA RTX PRO")
    assert status == 0 and "does not compile for sm_120" in said
    assert "compiling for every architecture" in (gpu.out / "build.log").read_text()


def test_what_cannot_be_written_costs_the_file_alone(gpu):
    for name in ("build.log", "tests-cuda.log", "benchmark.log"):
        (gpu.out / name).mkdir(parents=True)
    status, said = gpu()
    assert status == 0, said
    assert "fastsam: cuda extension built" in said and "cuda: exit status 0, 8 passed" in said
    assert "| all | 1 | met |" in said


def test_a_second_run_leaves_nothing_of_the_first_in_its_place(gpu):
    gpu()
    status, _ = gpu("--measure", MEASURED_STATUS="1")
    assert status == 1 and files(gpu) == CHECKS | {"benchmark.log"}


@pytest.mark.parametrize("arguments", [("--fast",), ("--check", "--measure")])
def test_how_it_is_called(gpu, arguments):
    status, said = gpu(*arguments)
    assert status == 2 and "usage: benchmarks/gpu.sh OUTDIR [--check | --measure]" in said
    assert not gpu.out.exists()
